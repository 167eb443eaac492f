"""Tables of `benchmarks/accuracy`: every row's settings hold, and every table runs, here for a round on noise."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import nets, report, sets
from benchmarks.accuracy import protocol as protocol_module
from benchmarks.accuracy import run as run_module
from benchmarks.accuracy.protocol import CALIBRATION, FULL, SAME_LOSS
from benchmarks.accuracy.protocols import EIGHT, PROTOCOLS
from benchmarks.accuracy.shares import shares
from fedprune.core.tensorfile import encode
from fedprune.model.architecture import widths_at
from fedprune.model.element_mask import pack, to_bits
from fedprune.model.selection import Selection
from fedprune.strategies import compose
from fedprune.strategies.importance.element_ranking import magnitudes, prunable, top
from fedprune_server.simulation.datasets.samples import assembled
from support.paths import ROOT

pytestmark = pytest.mark.torch

SHAPES = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "fashion_mnist": (28, 28), "har": (9, 128)}


@pytest.fixture
def accuracy(monkeypatch, tmp_path):
    """The package, with noise in the place of data, and everything that it writes in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sets, "samples", noise)
    return run_module


TABLES = PROTOCOLS


def noise(name, n=3000):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *SHAPES[name]), np.uint8)
    if name == "har":
        x = x.astype(np.float32)
    y = np.arange(n) % (6 if name == "har" else 10)
    kept = n * 5 // 6
    owners = [np.arange(kept) % 30, np.arange(kept, n) % 30] if name == "har" else None
    return assembled([(x[:kept], y[:kept], False), (x[kept:], y[kept:], True)], owners=owners)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.soak
def test_every_row_is_a_strategy(accuracy, table):
    run = accuracy
    protocol = TABLES[table]
    names = [m.name for m in protocol.methods]
    assert len(set(names)) == len(names)
    assert protocol.reference in names
    keys = {protocol.key(m, s) for m in protocol.methods for s in protocol.seeds}
    assert len(keys) == len(names) * len(protocol.seeds)
    for method in protocol.methods:
        job = run.job_of(protocol, method, 20, 0, protocol.densities)
        compose(job)
        assert not job.move_limit, "tables compare strategies as they are published"
        assert not job.weight_limit


def small(protocol):
    """A round of one step on a few samples."""
    data = {**protocol.data, "least": 5}
    if protocol.source != "har":
        data["most"] = 1200
    recipe = replace(protocol.recipe, max_steps=1, batch_size=16, evaluate_every=1)
    return replace(protocol, recipe=recipe, data=data, every=1, every_global=1).lasting(1)


def check(run, protocol, folder, rounds=1):
    method = next(m for m in protocol.methods if m.name == protocol.reference)
    result = run.run(protocol, method, 0, folder, quiet=True)
    if rounds:
        assert len(result["rounds"]) == rounds
    row = result["rounds"][-1]
    assert math.isfinite(row["measured"]["global_loss"])
    assert 0 <= row["measured"]["global"] <= 1
    assert row["own"]["accuracy_after"]["n"] >= 1
    assert row["down"] > 0
    assert row["up"] > 0
    assert row["macs"] > 0
    assert row["at"] > 0
    assert [p.name for p in folder.iterdir()] == [f"{protocol.reference}-0.json"]  # and nothing of its state
    return result


QUICK = ("ca-hfp-scores", "pr-fl-time")


@pytest.mark.parametrize("table", QUICK)
@pytest.mark.soak
def test_a_table_runs(accuracy, table, tmp_path):
    run = accuracy
    check(run, small(TABLES[table]), tmp_path / "runs")


@pytest.mark.soak
@pytest.mark.parametrize("table", sorted(TABLES.keys() - set(QUICK)))
@pytest.mark.soak
def test_every_other_table_runs(accuracy, table, tmp_path):
    run = accuracy
    check(run, small(TABLES[table]), tmp_path / "runs")


# At every push `test_presets_simulated.py` runs each preset twice.
@pytest.mark.soak
def test_the_same_run_gives_the_same_numbers(accuracy, tmp_path):
    run = accuracy
    protocol = small(TABLES["fedprune-ablation"])
    first, second = (check(run, protocol, tmp_path / name) for name in "ab")
    for result in (first, second):
        result.pop("wall_s"), result.pop("cpu_s")
    assert json.dumps(first) == json.dumps(second)


class KilledError(Exception):
    pass


@pytest.mark.soak
def test_the_result_is_there_before_the_state_goes_and_what_is_run_again_begins_anew(accuracy, tmp_path, monkeypatch):
    run = accuracy
    protocol = small(TABLES["fedprune-ablation"])
    method, folder = protocol.method("slices"), tmp_path / "runs" / protocol.name

    def killed(_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(run, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KilledError):
            run.run(protocol, method, 0, folder, quiet=True)
    path = run.result_path(method, 0, folder)
    result = json.loads(path.read_text())
    assert run.state_path(protocol, method, 0, folder).is_dir()

    options = SimpleNamespace(runs=folder.parent, cuda=False)
    assert command.finished(protocol, method, 0, options)
    command.forget(protocol, method, 0, options)
    assert not list(folder.iterdir())
    clock = iter(range(10**6))
    monkeypatch.setattr(run, "cpu_seconds", lambda: next(clock))
    first, second = (run.run(protocol, method, 0, folder, quiet=True) for _ in range(2))
    assert first["cpu_s"] == second["cpu_s"]  # not those of both
    assert first["rounds"] == second["rounds"] == result["rounds"]


@pytest.mark.soak
def test_a_run_s_key_holds_its_constants_and_its_network(accuracy, monkeypatch):
    table = TABLES["cifar10-dirichlet"]
    key = table.key(table.methods[0], 0)
    assert key == table.key(table.methods[0], 0)
    assert key != table.key(table.methods[0], 0, cuda=True)
    for name in ("AVERAGE", "CALIBRATION"):
        with monkeypatch.context() as patch:
            patch.setattr(protocol_module, name, 1)
            assert key != table.key(table.methods[0], 0)
    with monkeypatch.context() as patch:
        patch.setattr(protocol_module, "definition", lambda *_, **__: "another")
        assert key != table.key(table.methods[0], 0)
    assert len({nets.definition(n) for n in nets.NETS}) == len(nets.NETS)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("(48, 9), (96, 7), (96, 5)", "(48, 9), (96, 7), (96, 3)", {"motion_net"}),
        ("self.bn2(self.conv2(", "self.bn1(self.conv2(", {"resnet8", "resnet32"}),  # by name, and by what it calls
        ("_VGG11 = (64, 0,", "_VGG11 = (64,", {"vgg11", "vgg11_plain"}),
        ('"""VGG for 32×32 images', '"""Nets for 32×32 images', set()),
        ("# The last pool", "# This pool", set()),
    ],
)
@pytest.mark.soak
def test_a_network_s_definition_is_its_code(accuracy, tmp_path, monkeypatch, old, new, changed):
    text = Path(nets.__file__).read_text()
    assert text.count(old) == 1
    before = {n: nets.definition.__wrapped__(n) for n in nets.NETS}
    (tmp_path / "nets.py").write_text(text.replace(old, new))
    monkeypatch.setattr(nets, "__file__", str(tmp_path / "nets.py"))
    assert {n for n in nets.NETS if nets.definition.__wrapped__(n) != before[n]} == changed


@pytest.mark.soak
def test_shares_of_elements_weigh_what_submodels_weigh(accuracy):
    run = accuracy
    model = nets.model("small_cnn", (3, 16, 16), 10, 0)
    architecture, tensors = model.architecture, dict(model.tensors)
    order = magnitudes(tensors, prunable(architecture))
    densities = TABLES["cifar10-dirichlet"].densities
    found = shares(architecture, densities)
    assert found[0] == 1.0
    assert sum(run.parameters(model)) == sum(v.size for v in tensors.values())
    for density, share in zip(densities[1:], found[1:], strict=True):
        submodel = Selection.of(architecture, widths_at(architecture, density)).gather(tensors)
        mask = top(order, share)
        masked = 2 * len(encode(pack(mask, tensors))) + len(encode(to_bits(mask)))
        assert masked == pytest.approx(2 * len(encode(submodel)), rel=0.01)
    with pytest.raises(ValueError, match="weighs less"):
        shares(architecture, (0.05,))


CIFAR = TABLES["cifar10-dirichlet"]


def by_hand(method, sent, found, step=1.0):
    """A run whose rounds send so many bytes each way, and whose global model is so good after each."""
    rows = [
        {
            "round": i,
            "at": i * step,
            "down": sent * i,
            "up": sent * i,
            "macs": 0.0,
            "measured": {"global": v},
            "own": {},
        }
        for i, v in enumerate(found, 1)
    ]
    return {"method": method, "seed": 0, "devices": {"a": [1.0, 1, 1]}, "rounds": rows}


@pytest.mark.soak
def test_a_run_ends_at_its_target(accuracy, tmp_path):
    run = accuracy
    protocol = replace(small(TABLES["pr-fl-time"]), rounds=9, every_s=0, target=1e-9)
    result = check(run, protocol, tmp_path / "reached")
    assert result["rounds"][0]["density"] == 1
    assert len(run.run(replace(protocol, target=1.1, rounds=2), protocol.method("fedasync"), 0, tmp_path)["rounds"]) > 1
    assert protocol.key(protocol.methods[0], 0) != replace(protocol, ends_at_target=False).key(protocol.methods[0], 0)


@pytest.mark.soak
def test_a_run_by_simulated_time_that_is_killed_is_measured_in_the_same_rounds(accuracy, tmp_path, monkeypatch):
    run = accuracy
    protocol = replace(small(TABLES["pr-fl-time"]), rounds=9, every_s=20, until_s=0, ends_at_target=False)
    whole = check(run, protocol, tmp_path / "whole", rounds=None)
    simulate = run.simulate
    for rounds in (2, 5):

        def killed(experiment, place, progress, rounds=rounds):
            def stop(simulation):
                progress(simulation)
                if len(simulation.state.history) == rounds:
                    raise KilledError

            return simulate(experiment, place, stop)

        monkeypatch.setattr(run, "simulate", killed)
        with pytest.raises(KilledError):
            check(run, protocol, tmp_path / "killed")
    monkeypatch.setattr(run, "simulate", simulate)
    resumed = check(run, protocol, tmp_path / "killed", rounds=None)
    assert resumed["rounds"] == whole["rounds"]
    times = [r["at"] // 20 for r in whole["rounds"] if r["measured"]]
    assert 3 < len(times) < 9
    assert len(set(times[:-1])) == len(times) - 1


@pytest.mark.soak
def test_a_row_that_sends_more_is_measured_in_every_round(accuracy):
    for protocol in TABLES.values():
        if protocol.recipe.evaluate_every > 1:
            costly = [m for m in protocol.methods if not m.densities]
            assert all(m.recipe.get("evaluate_every") == 1 for m in costly), protocol.name
            for share in protocol.reads:
                assert round(share * protocol.rounds) % protocol.recipe.evaluate_every == 0, protocol.name


def started(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("no-such-table",), 14, "error: table: expected list, summary or one of cifar10-dirichlet"),
        (("har", "--methods", "nothing"), 14, "error: rows of har: expected local"),
        (("har", "--seeds", "x"), 2, "expected whole numbers separated by commas, got 'x'"),
        (("har", "--rounds", "1"), 13, "error: data 'har': expected a .npz file or a folder that exists"),
    ],
)
@pytest.mark.at_push(1)
def test_a_mistake_is_one_line(arguments, code, said):
    ended = started(*arguments, FEDPRUNE_DATA="/nowhere")
    assert ended.returncode == code
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def rows_by_hand(table, found, served=None):
    """Runs of all seeds whose global models and boards are so good, a row's bytes being those of its place."""
    runs = []
    for place, (name, values) in enumerate(found.items(), 1):
        for seed, value in zip(table.seeds, values, strict=False):
            run = by_hand(name, 10 * place, [value])
            run["seed"], run["rounds"][0]["macs"] = seed, float(place)
            for metric in ("after", "average"):
                run["rounds"][0]["own"][f"accuracy_{metric}"] = {"mean": (served or found)[name][seed]}
            runs.append(run)
    return runs


def test_figures_of_runs_made_by_hand():
    """Rounds 2 and 4 of four are read; who sends twice as much stops at half of the rounds."""
    table = replace(CIFAR, rounds=4, reads=(0.5, 1.0), target=0.3, submodels=False)
    runs = [by_hand("heterofl", 10, [0.1, 0.2, 0.3, 0.4], 5.0), by_hand("fedavg", 20, [0.2, 0.3, 0.35, 0.9])]
    heterofl, fedavg = report.rows(table, runs)
    assert (heterofl["global"], fedavg["global"], fedavg["global_gap"]) == (30.0, 60.0, "+30.0")
    assert (heterofl["reached"], fedavg["reached"]) == ("15", "2")
    assert {row["reached"] for row in report.rows(replace(table, target=0.95), runs)} == {"never"}
    equal = report.rows(table, runs, equal_bytes=True)
    assert [row["rounds"] for row in equal] == [4, 2]
    assert (equal[1]["global"], equal[1]["global_gap"]) == (25.0, "−5.0")  # of fedavg rounds 1 and 2 are read
    assert [row["mb"] for row in equal] == pytest.approx([80e-6, 80e-6])


def test_runs_that_end_by_time_are_read_by_time():
    table = replace(TABLES["pr-fl-time"], until_s=100.0, every_s=100, reads=(0.5, 1.0), ends_at_target=False)

    def figure(*times, last=0):
        rows = [{"round": i + 1, "at": at, "measured": {"global": at / 1000}} for i, at in enumerate(times)]
        return report.figure(table, {"rounds": rows}, report.measured("global"), last)

    # Many rounds at first, and few later: half of the rounds is not half of the time.
    assert figure(10, 20, 30, 40, 49, 60, 101) == pytest.approx((4.9 + 10.1) / 2)
    assert figure(10, 40, 60) == pytest.approx((4 + 6) / 2)  # one that ended by itself
    assert figure(10, 40, 60, last=2) == pytest.approx((1 + 4) / 2)


def test_an_interval_is_students():
    gaps = [1.5, -0.25, 3.0]
    oracle = ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert report.written(gaps) == f"{np.mean(gaps):+.1f} ± {(oracle.high - oracle.low) / 2:.1f}"
    assert report.written([-1.0]) == "−1.0"
    assert report.written([]) is None


def test_verdicts_are_computed_from_paired_runs():
    rows = tuple(m for m in CIFAR.methods if m.name in ("fedprune", "heterofl", SAME_LOSS, FULL))
    table = replace(CIFAR, reads=(1.0,), methods=rows)
    # Rows weigh 1, 2, 3 and 4 parts of the float32 row's 4.
    found = {
        "fedprune": [0.50, 0.52, 0.54],
        "heterofl": [0.40, 0.42, 0.44],
        SAME_LOSS: [0.53, 0.55, 0.57],
        FULL: [0.51, 0.55, 0.53],
    }
    runs = rows_by_hand(table, found, {**found, FULL: [0.20, 0.20, 0.20], SAME_LOSS: [0.50, 0.51, 0.58]})
    words = {v["promise"]: v["word"] for v in report.verdicts(table, runs)}
    assert words == {
        "served, published": "true",
        "served, same loss": "true",  # 1 behind on average, and 1.5 is the standard error
        "global, published": "false, by 1.0",  # float32: -1, -3, +1
        "global, same loss": f"false, by {3 - report.NEAR:.1f}",
        "bytes": "false, by 10.0",
        "MACs": "true",
    }
    assert {v["word"] for v in report.verdicts(table, runs[1:])} == {"open"}, "a seed of fedprune's is missing"
    stale = [{**r, "stale": r["method"] == "heterofl"} for r in runs]
    assert [v["word"] for v in report.verdicts(table, stale)].count("open") == 2
    summary = report.summary({"a": (table, runs), "b": (table, [])})
    assert summary["kept"] == 0
    assert summary["tables"][0]["best"] == "52.0, heterofl's trained model 42.0: +10.0 ± 0.0"
    assert summary["tables"][0]["unseen"]["served, published"]["found"] == "53.0, heterofl 43.0: +10.0 ± 0.0"
    assert report.verdicts(TABLES["ca-hfp-scores"], []) == []


def test_a_run_gives_a_page(accuracy, tmp_path, monkeypatch):
    table = small(TABLES["fedprune-ablation"])
    run = check(accuracy, table, tmp_path / "runs" / table.name) | {"machine": "here"}
    assert report.figures(table, command.whole(command.slim([run]))) == report.figures(table, [run])
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    committed = {"machine": "theirs", "runs": command.slim([run, {**run, "key": "of other settings", "seed": 1}])}
    (tmp_path / f"results/{table.name}.json").write_text(json.dumps(committed))
    options = SimpleNamespace(runs=tmp_path / "elsewhere", cuda=False)
    command.restore(table, options)
    restored = command.results(table, options)
    assert [r.get("stale", False) for r in restored] == [False, True], "what was run elsewhere counts; others are shown"


@pytest.mark.soak
def test_a_changed_protocol_is_no_result():
    options = command.parser().parse_args(["har", "--rounds", "3", "--steps", "2"])
    table = command.changed(TABLES["har"], options)
    assert (table.rounds, table.recipe.max_steps, table.recipe.evaluate_every) == (3, 2, 1)
    assert not any("rounds" in m.job for m in table.methods), "a row of more rounds has as many, too"
    assert table.changes == "--rounds 3 --steps 2"
    assert not command.changed(TABLES["har"], command.parser().parse_args(["har", "--seeds", "0"])).changes


@pytest.mark.soak
def test_tables_of_the_summary_have_what_verdicts_need(accuracy):
    for table in EIGHT:
        assert len(table.seeds) == 3
        jobs = {m.name: accuracy.job_of(table, m, 20, 0, table.densities) for m in table.methods}
        for name, job in jobs.items():
            longer = job.strategy == "fedprune" and name != SAME_LOSS
            codecs = ("int4", "int4") if longer else ("int8", "int8")
            assert (job.compression, job.compression_down) == (("none", "none") if name == FULL else codecs), name
            assert job.rounds == table.rounds * (2.5 if longer else 1)
        assert compose(jobs[SAME_LOSS]).widths == ()
    har = TABLES["har"]
    found = {n: accuracy.experiment_of(har, har.method(n), 0).calibration for n in ("fedprune", "fedavg")}
    assert len(found["fedprune"]) == CALIBRATION
    assert found["fedavg"] is None
