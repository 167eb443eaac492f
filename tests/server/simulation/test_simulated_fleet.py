"""What a `fleet.toml` makes of a simulation: devices in bulk, links, data dealt out, tables of the simulator's own."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ConfigError, ExitCode, FedpruneError
from fedprune.jobs.job import Job
from fedprune.planning.profile_store import find_profile
from fedprune_device.data.labels import Targets
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.table_options import TableOptions
from fedprune_device.data.table_windows import TableFile
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.digits import deal_digits, digits_model
from fedprune_server.simulation.experiment import fedavg_job
from fedprune_server.simulation.fleet.device_table import MAX_LOADED_FLEET
from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
from fedprune_server.simulation.fleet.virtual_device import StoredData
from fedprune_server.simulation.network_model import PR_FL_WEATHER, Availability, Weather
from fedprune_server.simulation.results.comparison import read_runs, target_rows
from support.paths import ROOT

EXAMPLES = ROOT / "examples"
HEAD = """
[job]
name = "yard"
rounds = 2
density = 0.25
recipe = { max_steps = 1 }
[model]
path = "model.onnx"
"""
DATA = """
[data]
source = "all.npz"
partition = "iid"
"""
ROW = """
[[devices]]
name = "barn"
profile = "raspberry-pi-4b"
data = "barn.npz"
"""


@pytest.fixture
def write(tmp_path):
    hand = deal_digits(["barn"], seed=5).devices["barn"]
    (tmp_path / "model.onnx").write_bytes(digits_model())
    np.savez(tmp_path / "barn.npz", x=hand.x_train, y=hand.y_train)
    x, y = np.tile(hand.x_train, (3, 1, 1, 1))[:600], np.tile(hand.y_train, 3)[:600]
    np.savez(tmp_path / "all.npz", x=x, y=y)

    def file(text, head=HEAD):
        (tmp_path / "fleet.toml").write_text(head + text)
        return tmp_path / "fleet.toml"

    return file


def test_one_row_makes_many_devices(write):
    plan = read_fleet_plan(write(ROW.replace("[[devices]]", "[[devices]]\ncount = 3") + ROW.replace("barn", "dock", 1)))
    assert [d.name for d in plan.devices] == ["barn-001", "barn-002", "barn-003", "dock"]
    assert plan.job.devices == 4
    assert len({d.fingerprint for d in plan.devices}) == 4  # each device has a split of its own
    assert plan.devices[0].profile is plan.devices[1].profile


def test_profiles_and_links_take_turns(write):
    text = ROW.replace('"raspberry-pi-4b"', '["raspberry-pi-4b", "jetson-nano"]') + (
        "count = 4\nlink = [{ up_mb_s = 1 }, { up_mb_s = 2, latency_s = 0.5 }, { down_mb_s = 3 }]\n"
    )
    devices = read_fleet_plan(write(text)).devices
    links = find_profile("raspberry-pi-4b").link, find_profile("jetson-nano").link
    assert [d.profile.name for d in devices] == ["raspberry-pi-4b", "jetson-nano"] * 2
    assert [d.profile.link.up_bytes_s for d in devices] == [1e6, 2e6, links[0].up_bytes_s, 1e6]
    assert [d.profile.link.down_bytes_s for d in devices][2] == 3e6
    assert [d.profile.link.latency_s for d in devices] == [
        links[0].latency_s,
        0.5,
        links[0].latency_s,
        links[1].latency_s,
    ]


def test_large_fleets_read_their_samples_when_they_need_them(write):
    few = read_fleet_plan(write(ROW + f"count = {MAX_LOADED_FLEET}\n")).devices
    many = read_fleet_plan(write(ROW + f"count = {MAX_LOADED_FLEET + 1}\n")).devices
    assert not any(isinstance(d.data, StoredData) for d in few)
    assert all(isinstance(d.data, StoredData) for d in many)
    assert [d.fingerprint for d in many[:MAX_LOADED_FLEET]] == [d.fingerprint for d in few]
    assert many[0].load().samples == many[0].samples == few[0].samples


def test_data_is_dealt_out_to_the_devices(write):
    plan = read_fleet_plan(write(DATA + "devices = 4\nserver = 0.1\n[[devices]]\nprofile = 'raspberry-pi-4b'\n"))
    assert len(plan.devices) == 4
    assert len({d.name for d in plan.devices}) == 4
    assert plan.evaluation is not None
    assert (sum(len(d.load().y_train) + len(d.load().y_test) for d in plan.devices) + len(plan.evaluation[1])) == 600
    counted = read_fleet_plan(write(DATA + "[[devices]]\nname = 'a'\ncount = 5\nprofile = 'raspberry-pi-4b'\n"))
    assert [d.name for d in counted.devices] == [f"a-{i:03}" for i in range(1, 6)]


def window_model(columns, steps, classes):
    """A model of windows [columns, steps] with one hidden layer."""
    rng = np.random.default_rng(0)
    shapes = {"w": (16, columns * steps), "b": (16,), "v": (classes, 16), "c": (classes,)}
    arrays = [numpy_helper.from_array(rng.standard_normal(s).astype("f4"), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "c"], ["y"], transB=1),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
        for name, shape in (("x", (columns, steps)), ("y", (classes,)))
    )
    graph = helper.make_graph(nodes, "windows", [x], [y], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_a_device_takes_windows_of_a_table_as_a_board_does(write, tmp_path):
    rows = np.random.default_rng(0).random((900, 8))
    times = np.arange(900) + 100 * (np.arange(900) >= 450)
    cells = [[time, *row, n % 10] for n, (time, row) in enumerate(zip(times, rows, strict=True))]
    cells[7][3] = ""
    names = ["time", *"abcdefgh", "class"]
    (tmp_path / "barn.csv").write_text("\n".join(",".join(map(str, row)) for row in [names, *cells]))
    head = HEAD.replace("model.onnx", "table.onnx").replace("max_steps = 1", "max_steps = 1, scaling = ['board']")
    (tmp_path / "table.onnx").write_bytes(window_model(8, 8, 10))
    text = ROW.replace("barn.npz", "barn.csv") + "missing = 'hold'\n"
    (device,) = read_fleet_plan(write(text, head)).devices
    shares = SplitShares(seed=0, device="barn")
    table = TableFile(tmp_path / "barn.csv", shares, 10_000, options=TableOptions("hold"))
    expected = table.snapshot((8, 8), Targets("cross_entropy", 10))
    np.testing.assert_array_equal(device.load().x_train, expected.x_train[:])
    np.testing.assert_array_equal(device.load().y_train, expected.y_train)
    with pytest.raises(FedpruneError, match="missing"):
        read_fleet_plan(write(text.replace("hold", "error"), head))
    with pytest.raises(ConfigError, match="missing"):
        read_fleet_plan(write(text.replace("hold", "guess"), head))


def test_samples_of_the_server_are_scaled_as_those_of_boards(write):
    table = DATA + "devices = 4\nserver = 0.1\ncalibration = 0.1\n[[devices]]\nprofile = 'raspberry-pi-4b'\n"
    plain = read_fleet_plan(write(table))
    head = HEAD.replace("max_steps = 1", "max_steps = 1, scaling = ['grey:0.5:0.25']")
    scaled = read_fleet_plan(write(table, head))
    np.testing.assert_allclose(scaled.evaluation[0], (plain.evaluation[0] - 0.5) / 0.25, rtol=1e-5)
    np.testing.assert_allclose(scaled.calibration, (plain.calibration - 0.5) / 0.25, rtol=1e-5)
    own = read_fleet_plan(write(table, HEAD.replace("max_steps = 1", "max_steps = 1, scaling = ['board']")))
    np.testing.assert_allclose([own.evaluation[0].mean(), own.evaluation[0].std()], [0, 1], atol=1e-4)
    np.testing.assert_array_equal(own.evaluation[1], plain.evaluation[1])
    np.testing.assert_array_equal(own.devices[0].load().x_train, plain.devices[0].load().x_train)  # as measured


def test_samples_of_the_server_keep_the_names_of_their_columns(write, tmp_path):
    x, y = np.random.default_rng(0).random((2, 30, 2, 2)).astype("f4")[:, :, :, :2]
    y = y[:, 0]  # what follows of one column: [30, 2]
    (tmp_path / "table.onnx").write_bytes(window_model(2, 2, 2))
    names = {"columns": [["heat"], ["damp"]], "target_columns": ["target_load"]}
    np.savez(tmp_path / "server.npz", x=x, y=y, **names)
    np.savez(tmp_path / "barn.npz", x=x, y=y, **names)
    scales = "'damp:5:2', 'heat:1:4', 'target_load:3:0.5'"
    recipe = f"max_steps = 1, loss = 'mse', scaling = [{scales}]"
    head = HEAD.replace("model.onnx", "table.onnx").replace("max_steps = 1", recipe)
    files = "[evaluation]\ndata = 'server.npz'\n[calibration]\ndata = 'server.npz'\n"
    plan = read_fleet_plan(write(files + ROW, head))
    np.testing.assert_allclose(np.sort(plan.evaluation[1], 0), np.sort((y - 3) / 0.5, 0), rtol=1e-5)
    np.testing.assert_allclose(plan.calibration, (x - [[1], [5]]) / [[4], [2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["barn.csv", "photos"])
def test_tables_and_folders_as_samples_of_the_server_name_the_command_that_writes_them(write, tmp_path, source):
    (tmp_path / "photos").mkdir()
    (tmp_path / "barn.csv").write_text("a,class\n1,0\n")
    for table in ("evaluation", "calibration"):
        with pytest.raises(FedpruneError, match="data check"):
            read_fleet_plan(write(f"[{table}]\ndata = '{source}'\n" + ROW))


def test_the_example_has_the_paper_s_links(write, tmp_path):
    np.savez(tmp_path / "data.npz", **np.load(tmp_path / "all.npz"))
    plan = read_fleet_plan(write((EXAMPLES / "pr_fl_links.toml").read_text(), head=""))
    assert plan.weather == PR_FL_WEATHER
    links = [d.profile.link for d in plan.devices]
    assert [round(n.down_bytes_s / 1e6, 6) for n in links] == [20, 18, 12, 10, 6, 4, 2.5, 2, 2, 1.5]
    assert [round(n.up_bytes_s / 1e6, 6) for n in links] == [5, 4, 3, 2.5, 1.5, 1, 0.6, 0.5, 0.5, 0.4]


def test_tables_of_the_simulator_s_own_are_read(write):
    text = ROW + (
        "[weather]\nlike = 'pr-fl'\nlinks_sigma = 0.1\nserver_up_mb_s = 3\n"
        "[availability]\nperiod_s = 100\nleast = 0.5\nmost = 0.7\n"
        "[simulation]\ncheckpoints = 5\nworkers = 2\ncuda = true\n"
    )
    plan = read_fleet_plan(write(text))
    weather = Weather(0.1, draws=20, server_up_mb_s=3.0, server_down_mb_s=50.0, server_sigma=0.1, server_cache=True)
    assert plan.weather == weather
    assert plan.availability == Availability(100, 0.5, 0.7)
    assert (plan.checkpoints, plan.workers, plan.cuda) == (5, 2, True)
    assert plan.devices[0].profile.link.down_bytes_s == 20e6


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (ROW + "count = 0\n", "devices[0].count"),
        (ROW + "count = 2\n" + ROW.replace('"barn"', '"barn-001"', 1), "devices[1].name: expected another"),
        (ROW + "link = { up = 3 }\n", "devices[0].link.up: unknown key"),
        (ROW + "validation = []\n", "devices[0].validation"),
        (ROW + "[weather]\nlike = 'rain'\n", "weather.like"),
        (ROW + "[weather]\nwind = 1\n", "weather.wind: unknown key"),
        (ROW + "[availability]\nperiod_s = 9\nleast = 0.9\nmost = 0.5\n", "availability.least"),
        (ROW + "[simulation]\ndensities = [0.5]\n", "simulation.densities: expected samples"),
        (DATA + ROW, "devices[0].data: unknown key"),
        (DATA + "devices = 3\n[[devices]]\nname = 'a'\nprofile = 'raspberry-pi-4b'\n", "as many devices as [data]"),
        ("[[devices]]\ncount = 2\nprofile = 'raspberry-pi-4b'\ndata = 'barn.npz'\n", "devices[0].name: expected"),
    ],
)
def test_what_is_wrong_is_named(write, text, named):
    with pytest.raises(FedpruneError) as caught:
        read_fleet_plan(write(text))
    assert named in str(caught.value)
    assert "fleet.toml: " in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_whatever_the_strategy_is_the_reference_is_fedavg():
    job = Job(strategy="heterofl", options={"densities": [1.0, 0.5]}, rounds=7, seed=9)
    plain = fedavg_job(job)
    assert (plain.strategy, plain.options, plain.density, plain.scorer) == ("fedavg", {}, 0.0, "magnitude")
    assert (plain.rounds, plain.seed, plain.recipe.lr) == (7, 9, job.recipe.lr)


@pytest.mark.parametrize(
    ("strategy", "line", "limits"),
    [
        ("fedavg", "", (0, 0)),
        ("fedavg", "move_limit = 2", (2, 0)),
        ("fedprune", "", (Job.move_limit, Job.weight_limit)),
        ("fedprune", "move_limit = 2", (2, Job.weight_limit)),
    ],
)
def test_published_strategies_have_no_limits_on_updates_that_the_job_does_not_set(write, strategy, line, limits):
    head = HEAD.replace("rounds = 2", f"rounds = 2\nstrategy = '{strategy}'\n{line}")
    plan = read_fleet_plan(write(ROW, head), reference=True)
    assert (plan.job.move_limit, plan.job.weight_limit) == limits
    assert (plan.reference.move_limit, plan.reference.weight_limit) == (2 if line else 0, 0)


# What a run leaves behind.


@pytest.fixture
def run(write, tmp_path):
    path = write(
        DATA + "devices = 3\nserver = 0.2\n[[devices]]\nprofile = 'raspberry-pi-4b'\n[simulation]\ndensities=[0.5]\n"
    )

    def make(folder, *arguments):
        assert main(["--config", str(path), "--out", str(tmp_path / folder), *arguments]) == ExitCode.OK
        return tmp_path / folder

    return make


def test_what_a_target_cost_is_read_off_the_first_round_that_reaches_it(run):
    (record,) = read_runs([run("one")])
    values = record.global_values()
    best = max(values)
    (_, row) = target_rows([record], best)
    first = record.rounds[values.index(best)]
    assert row[1:5] == (str(first.round), f"{first.elapsed_s:.0f}", "1.00", f"{(first.down + first.up) / 1e6:.2f}")
    assert target_rows([record], 1.01)[1][1:3] == ("never", "–")
