"""Tables of `benchmarks/accuracy`: every row's settings hold, and every table runs, here for a round on noise."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fedprune import __version__
from fedprune.core.tensorfile import encode
from fedprune.model.architecture import widths_at
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
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    from benchmarks.accuracy import protocols, run, sets

    monkeypatch.setattr(sets, "samples", noise)
    return protocols, run


def noise(name, n=3000):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, *SHAPES[name]), np.uint8)
    if name == "har":
        x = x.astype(np.float32)
    y = np.arange(n) % (6 if name == "har" else 10)
    kept = n * 5 // 6
    owners = [np.arange(kept) % 30, np.arange(kept, n) % 30] if name == "har" else None
    return assembled([(x[:kept], y[:kept], False), (x[kept:], y[kept:], True)], owners=owners)


def tables():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.accuracy.protocols import PROTOCOLS
    finally:
        sys.path.remove(str(ROOT))
    return PROTOCOLS


TABLES = tables()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.soak
def test_every_row_is_a_strategy(accuracy, table):
    _, run = accuracy
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
    _, run = accuracy
    check(run, small(TABLES[table]), tmp_path / "runs")


@pytest.mark.soak
@pytest.mark.soak
def test_a_run_of_earlier_code_counts_if_its_first_rounds_are_repeated(accuracy, tmp_path):
    from benchmarks.accuracy import page
    from benchmarks.accuracy.replay import VERSIONS, fingerprints, replay

    _, run = accuracy
    protocol = small(TABLES["fashion-pathological"]).lasting(2)
    method = protocol.method("heterofl")
    made = run.run(protocol, method, 0, tmp_path, quiet=True)
    path = run.result_path(method, 0, tmp_path)

    def replayed(**differing):
        path.write_text(json.dumps({**made, "key": "of other code", **differing}))
        return replay(protocol, method, 0, tmp_path, 1), json.loads(path.read_text())

    said, found = replayed()
    assert (said, found["key"], found["rounds"]) == ("", made["key"], made["rounds"])
    assert "1 runs are of earlier code" in " ".join(page._replayed([found, made]))
    assert page._replayed([made]) == []
    for name in ("up", "macs"):
        rounds = [{**made["rounds"][0], name: made["rounds"][0][name] + 1}, made["rounds"][1]]
        said, found = replayed(rounds=rounds)
        assert said.startswith(f"round 1: {name} was ")
        assert found["key"] == "of other code"
    assert replayed(fingerprint="other")[0] == "other settings, data or model"
    assert VERSIONS[-1] == __version__
    (earlier,) = fingerprints(run.experiment_of(protocol, method, 0)) - {made["fingerprint"]}
    assert replayed(fingerprint=earlier)[0] == ""


@pytest.mark.soak
@pytest.mark.parametrize("table", sorted(TABLES.keys() - set(QUICK)))
@pytest.mark.soak
def test_every_other_table_runs(accuracy, table, tmp_path):
    _, run = accuracy
    check(run, small(TABLES[table]), tmp_path / "runs")


# At every push `test_presets_simulated.py` runs each preset twice.
@pytest.mark.soak
@pytest.mark.soak
def test_the_same_run_gives_the_same_numbers(accuracy, tmp_path):
    _, run = accuracy
    protocol = small(TABLES["fedprune-ablation"])
    first, second = (check(run, protocol, tmp_path / name) for name in "ab")
    for result in (first, second):
        result.pop("wall_s"), result.pop("cpu_s")
    assert json.dumps(first) == json.dumps(second)


def test_a_run_gives_a_page(accuracy, tmp_path, monkeypatch):
    _, run = accuracy
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.accuracy.__main__ import slim, whole
    from benchmarks.accuracy.page import page

    protocol = small(TABLES["fedprune-ablation"])
    first = check(run, protocol, tmp_path / "runs")
    better = json.loads(json.dumps(first))
    better["method"] = "slices"
    better["rounds"][0]["measured"]["global"] += 0.1
    better["rounds"][0]["down"] *= 3
    header = {"date": "today", "machine": "here", "versions": {"Python": "3"}}
    runs = [{**r, "cpu_s": 1.0} for r in (first, better)]
    text = page(protocol, runs, header)
    assert page(protocol, slim(runs), header) == text
    assert page(protocol, whole(slim(runs)), header) == text
    rows = [line for line in text.splitlines() if line.startswith("| slices |")]
    assert "+10.0" in rows[0]
    assert len(rows) >= 2  # it is among the costlier ones, too
    assert "Not run yet (seeds): fedprune (1, 2), given start (0, 1, 2)," in text
    assert text.endswith("slices (1, 2).\n")


class KilledError(Exception):
    pass


@pytest.mark.soak
@pytest.mark.soak
def test_the_result_is_there_before_the_state_goes_and_what_is_run_again_begins_anew(accuracy, tmp_path, monkeypatch):
    _, run = accuracy
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

    from benchmarks.accuracy import __main__ as command

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
    from benchmarks.accuracy import nets, protocol

    table = TABLES["cifar10-dirichlet"]
    key = table.key(table.methods[0], 0)
    assert key == table.key(table.methods[0], 0)
    assert key != table.key(table.methods[0], 0, cuda=True)
    for name in ("AVERAGE", "CALIBRATION"):
        with monkeypatch.context() as patch:
            patch.setattr(protocol, name, 1)
            assert key != table.key(table.methods[0], 0)
    for name in ("definition", "code_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(protocol, name, lambda *_, **__: "another")
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
    from benchmarks.accuracy import nets

    text = Path(nets.__file__).read_text()
    assert text.count(old) == 1
    before = {n: nets.definition.__wrapped__(n) for n in nets.NETS}
    (tmp_path / "nets.py").write_text(text.replace(old, new))
    monkeypatch.setattr(nets, "__file__", str(tmp_path / "nets.py"))
    assert {n for n in nets.NETS if nets.definition.__wrapped__(n) != before[n]} == changed


@pytest.mark.soak
def test_shares_of_elements_weigh_what_submodels_weigh(accuracy):
    _, run = accuracy
    from benchmarks.accuracy import nets
    from benchmarks.accuracy.shares import shares

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
        masked = 2 * len(encode(mask.pack(tensors))) + len(encode(mask.to_tensors()))
        assert masked == pytest.approx(2 * len(encode(submodel)), rel=0.01)
    with pytest.raises(ValueError, match="weighs less"):
        shares(architecture, (0.05,))


@pytest.mark.soak
def test_runs_that_end_by_time_are_read_by_time(accuracy):
    from benchmarks.accuracy import page

    protocol = replace(TABLES["pr-fl-time"], until_s=100.0, every_s=100, reads=(0.5, 1.0), ends_at_target=False)

    def made(*times):
        rows = [(at, {"global": at / 1000}) for at in times]
        return {"rounds": [{"round": i + 1, "at": at, "measured": m} for i, (at, m) in enumerate(rows)]}

    read = page.measured("global")
    # Many rounds at first, and few later: half of the rounds is not half of the time.
    assert page.figure(protocol, made(10, 20, 30, 40, 49, 60, 101), read) == pytest.approx((4.9 + 10.1) / 2)
    assert page.figure(protocol, made(10, 40, 60), read) == pytest.approx((4 + 6) / 2)  # one that ended by itself
    assert page.figure(protocol, made(10, 40, 60), read, 2) == pytest.approx((1 + 4) / 2)
    text = " ".join(page._reading(protocol, [0]))
    assert "measured last by 50, 100 simulated seconds" in text
    assert "measured every 100 simulated seconds" in text
    assert "means of rounds 10, 20" in " ".join(page._reading(replace(CIFAR, reads=(0.5, 1.0)), [0]))


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
def test_figures_of_runs_made_by_hand(accuracy):
    """Rounds 2 and 4 of four are read; who sends twice as much stops at half of the rounds."""
    from benchmarks.accuracy import page

    protocol = replace(CIFAR, rounds=4, reads=(0.5, 1.0), target=0.3, reference="heterofl", submodels=False)
    runs = [by_hand("heterofl", 10, [0.1, 0.2, 0.3, 0.4], 5.0), by_hand("fedavg", 20, [0.2, 0.3, 0.35, 0.9])]
    read = page.measured("global")
    assert [page.figure(protocol, r, read) for r in runs] == pytest.approx([30, 60])
    assert [page.target_time(protocol, r) for r in runs] == [15, 2]
    assert page.target_time(replace(protocol, target=0.95), runs[0]) == math.inf
    equal = {name: value for name, value, decimals in page._at_equal_bytes(protocol, runs) if decimals >= 0}
    assert [equal["rounds"](r) for r in runs] == [4, 2]
    assert [equal["global"](r) for r in runs] == pytest.approx([30, 25])  # of fedavg rounds 1 and 2 are read
    assert [equal["MB a device"](r) for r in runs] == pytest.approx([80e-6, 80e-6])
    text = page.page(
        protocol,
        [{**r, "cpu_s": 1.0, "trainer": "torch", "code": "c", "parameters": [1234, 5]} for r in runs],
        {"date": "today", "machine": "here", "versions": {}},
    )
    before, after = text.split("## At equal bytes")
    assert "| fedavg | 60.0 | +30.0 |" in before
    assert "| fedavg | 25.0 | −5.0 |" in after
    assert "1,234 parameters and 5 batch-norm statistics" in " ".join(text.split())


@pytest.mark.soak
def test_a_run_ends_at_its_target(accuracy, tmp_path):
    _, run = accuracy
    protocol = replace(small(TABLES["pr-fl-time"]), rounds=9, every_s=0, target=1e-9)
    result = check(run, protocol, tmp_path / "reached")
    assert result["rounds"][0]["density"] == 1
    assert len(run.run(replace(protocol, target=1.1, rounds=2), protocol.method("fedasync"), 0, tmp_path)["rounds"]) > 1
    assert protocol.key(protocol.methods[0], 0) != replace(protocol, ends_at_target=False).key(protocol.methods[0], 0)


@pytest.mark.soak
def test_densities_that_change_are_on_the_page(accuracy):
    from benchmarks.accuracy import page

    def run_with(method, *densities):
        run = by_hand(method, 10, [0.1] * len(densities))
        return {**run, "rounds": [row | {"density": d} for row, d in zip(run["rounds"], densities, strict=True)]}

    runs = [run_with("pr-fl", 0.4, 0.2, 0.3, 0.6, 1.0), run_with("fedasync", 1.0, 1.0)]
    lines = page._densities(TABLES["pr-fl-time"], runs)
    assert lines[-1] == "| pr-fl | 0.40 | 0.20 | 0.30 | 0.60 | 1.00 |"
    assert page._densities(TABLES["pr-fl-time"], runs[1:]) == []


@pytest.mark.soak
@pytest.mark.soak
def test_a_run_by_simulated_time_that_is_killed_is_measured_in_the_same_rounds(accuracy, tmp_path, monkeypatch):
    _, run = accuracy
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
def test_the_page_about_papers_names_tables_that_there_are(accuracy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.accuracy.docs import filled

    text = (ROOT / "docs/reproduce-a-paper.md").read_text()
    assert filled(text, ROOT / "benchmarks/results/accuracy") == text, "run python -m benchmarks.accuracy.docs"
    named = set(re.findall(r"<!-- results: (\S+) -->", text)) | set(
        re.findall(r"benchmarks\.accuracy ([a-z][\w-]+)", text)
    )
    assert named - {"list", "summary"} <= TABLES.keys()
    assert {n for n, p in TABLES.items() if p.full} <= named
    rounds = [{"round": 1, "at": 1.0, "down": 9, "up": 9, "macs": 1e12, "measured": {"global": 0.5}, "own": {}}]
    runs = [{"method": "subflot", "seed": 0, "rounds": rounds, "devices": {"a": [1.0, 1, 1]}}]
    (tmp_path / "subflot-regime.json").write_text(json.dumps({"runs": runs, "date": "today"}))
    once = filled(text, tmp_path)
    assert "| subflot | 50.0 |" in once
    assert "Not run yet: `python -m benchmarks.accuracy har`" in once
    assert filled(once, tmp_path) == once


@pytest.mark.soak
def test_pages_are_what_the_code_makes_of_the_committed_numbers(accuracy):
    from benchmarks.accuracy.docs import filled, pages

    results = ROOT / "benchmarks/results/accuracy"
    for name, text in pages(results).items():
        # The first paragraph of the verdicts names commits that the history lacks, and a clone may have less of it.
        made, there = ((t.partition("Made by")[2] or t) for t in (text, (results / name).read_text()))
        assert made == there, f"{name}: run python -m benchmarks.accuracy.docs"
    for path in sorted((ROOT / "docs/strategies").glob("*.md")):
        assert filled(path.read_text(), results) == path.read_text(), "run python -m benchmarks.accuracy.docs"


@pytest.mark.parametrize(
    ("stale", "said"), [((0, 0), ""), ((1, 0), ", in part on older code"), ((1, 1), ", on older code")]
)
@pytest.mark.soak
def test_a_verdict_on_runs_of_older_code_is_marked(accuracy, tmp_path, stale, said):
    from benchmarks.accuracy.docs import filled

    for name, old in zip(("fedobp-q", "har"), stale, strict=True):
        run = {"method": "fedavg", "seed": 0} | ({"stale": True} if old else {})
        (tmp_path / f"{name}.json").write_text(json.dumps({"runs": [run]}))
    place = "**Mostly**<!-- age of fedobp-q har -->{}<!-- end --> (two seeds)."
    assert filled(place.format(", whatever"), tmp_path) == place.format(said)


@pytest.mark.soak
def test_a_row_that_sends_more_is_measured_in_every_round(accuracy):
    for protocol in TABLES.values():
        if protocol.recipe.evaluate_every > 1:
            costly = [m for m in protocol.methods if not m.densities]
            assert all(m.recipe.get("evaluate_every") == 1 for m in costly), protocol.name
            for share in protocol.reads:
                assert round(share * protocol.rounds) % protocol.recipe.evaluate_every == 0, protocol.name


@pytest.mark.soak
def test_a_share_without_a_measurement_gives_no_figure(accuracy, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.accuracy.page import figure

    protocol = TABLES["cifar10-dirichlet"]
    rounds = [{"round": r, "at": 1.0 * r, "value": v} for r, v in ((8, None), (16, None), (20, 0.5))]
    assert figure(protocol, {"rounds": rounds}, lambda row: row["value"]) is None
    rounds[0]["value"], rounds[1]["value"] = 0.1, 0.3
    assert figure(protocol, {"rounds": rounds}, lambda row: row["value"]) == pytest.approx((0.1 + 0.1 + 0.5) / 3)


def command(*arguments, **environment):
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
    ended = command(*arguments, FEDPRUNE_DATA="/nowhere")
    assert ended.returncode == code
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.soak
def test_a_changed_protocol_is_called_a_look_and_is_no_result(accuracy):
    from benchmarks.accuracy import __main__ as command
    from benchmarks.accuracy.page import page

    options = command.parser().parse_args(["har", "--rounds", "3", "--steps", "2"])
    protocol = command.changed(TABLES["har"], options)
    assert (protocol.rounds, protocol.recipe.max_steps, protocol.recipe.evaluate_every) == (3, 2, 1)
    assert not any("rounds" in m.job for m in protocol.methods), "a row of more rounds has as many, too"
    assert TABLES["har"].method("fedprune").job["rounds"] > TABLES["har"].rounds
    text = " ".join(page(protocol, [], {"date": "today", "machine": "here", "versions": {}}).split())
    assert "`python -m benchmarks.accuracy har --rounds 3 --steps 2`" in text
    assert "A first look, with --rounds 3 --steps 2 instead of what is said here." in text
    whole = command.changed(TABLES["har"], command.parser().parse_args(["har", "--seeds", "0"]))
    assert not whole.changes


@pytest.mark.soak
def test_finished_runs_are_taken_from_committed_results(accuracy, tmp_path, monkeypatch):
    from benchmarks.accuracy import __main__ as command

    protocol = TABLES["har"]
    method, seed = protocol.methods[0], protocol.seeds[0]
    rows = [{"round": r, "own": {"accuracy_after": {"mean": 0.5, "n": 3}}, "measured": {"global": 0.1}} for r in (1, 2)]
    run = {"method": method.name, "seed": seed, "rounds": rows, "key": protocol.key(method, seed)}
    stale = {**run, "key": "of other code", "seed": protocol.seeds[1]}
    others = [stale, {**run, "method": "nobody's"}]
    stored = {"runs": command.slim([run, *others]), "machine": "theirs"}
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    options = command.parser().parse_args(["har", "--runs", str(tmp_path / "runs")])

    command.restore(protocol, options)
    assert not (tmp_path / "runs").exists(), "there is nothing to take"
    (tmp_path / "results").mkdir()
    (tmp_path / "results/har.json").write_text(json.dumps(stored))
    command.restore(protocol, options)
    theirs = [{**run, "machine": "theirs"}, {**stale, "machine": "theirs", "stale": True}]
    assert command.results(protocol, options) == theirs, "a stale run doesn't vanish"
    here = command.result_of(protocol, method, seed, options)
    here.write_text(json.dumps({**run, "machine": "here"}))
    command.restore(protocol, options)
    assert command.results(protocol, options)[0]["machine"] == "here", "what was run here stays"
    here.write_text(json.dumps({**run, "machine": "here", "key": "of older code"}))
    command.restore(protocol, options)
    assert command.results(protocol, options) == theirs, "a committed run that counts takes the place of a stale one"


@pytest.mark.soak
def test_a_stale_run_is_shown_marked_until_its_row_was_run_again(accuracy):
    from benchmarks.accuracy import page

    protocol = replace(CIFAR, reads=(1.0,), submodels=False)
    header = {"date": "today", "machine": "here", "versions": {}, "code": "c2"}
    kept = {"cpu_s": 1.0, "trainer": "onnxruntime"}
    fresh = {**by_hand("heterofl", 10, [0.2]), **kept, "code": "c2"}
    old = {**by_hand("subflot", 10, [0.5]), **kept, "code": "c1", "stale": True}
    text = " ".join(page.page(protocol, [fresh, old], header).split())
    assert "2 runs, 0 CPU minutes; code: c2." in text
    assert (
        "**To be run again (seeds): subflot (0).** Their code or settings have changed since they ran (commits: c1)."
        in text
    )
    assert "| subflot † | 50.0 | – |" in text, "runs of two codes differ in more than their rows"
    elder = [{**fresh, "code": "c1", "stale": True}, old]
    assert "| subflot † | 50.0 | +30.0 |" in page.page(protocol, elder, header)
    again = {**fresh, **by_hand("subflot", 10, [0.4]), "seed": 1}
    text = " ".join(page.page(protocol, [fresh, old, again], header).split())
    assert "| subflot (seed 1) | 40.0 |" in text, "a row never mixes runs of two codes"
    assert "| heterofl (seed 0) | 20.0 |" in text, "a page of two seeds names those of a row that lacks one"
    assert "**To be run again (seeds): subflot (0).**" in text
    assert "To be run again" not in page.page(protocol, [fresh, again], header)


@pytest.mark.soak
def test_an_interval_is_student_s(accuracy):
    from scipy.stats import ttest_1samp

    from benchmarks.accuracy.figures import Difference

    gaps = [1.5, -0.25, 3.0]
    found, oracle = Difference.of(gaps), ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(oracle))
    assert str(Difference.of([-1.0])) == "−1.0"
    assert Difference.of([]) is None


def rows_by_hand(protocol, found, served=None):
    """Runs of all seeds whose global models and boards are so good, a row's bytes being those of its place."""
    runs = []
    for place, (name, values) in enumerate(found.items(), 1):
        for seed, value in zip(protocol.seeds, values, strict=False):
            run = by_hand(name, 10 * place, [value])
            run["seed"], run["rounds"][0]["macs"] = seed, float(place)
            for metric in ("after", "average"):
                run["rounds"][0]["own"][f"accuracy_{metric}"] = {"mean": (served or found)[name][seed]}
            runs.append(run)
    return runs


@pytest.mark.soak
def test_verdicts_are_computed_from_paired_runs(accuracy):
    from benchmarks.accuracy import verdicts
    from benchmarks.accuracy.protocol import FULL, SAME_LOSS

    rows = tuple(m for m in CIFAR.methods if m.name in ("fedprune", "heterofl", SAME_LOSS, FULL))
    protocol = replace(CIFAR, reads=(1.0,), methods=rows)
    # Rows weigh 1, 2, 3 and 4 parts of the float32 row's 4.
    found = {
        "fedprune": [0.50, 0.52, 0.54],
        "heterofl": [0.40, 0.42, 0.44],
        SAME_LOSS: [0.53, 0.55, 0.57],
        FULL: [0.51, 0.55, 0.53],
    }
    served = {**found, FULL: [0.20, 0.20, 0.20], SAME_LOSS: [0.50, 0.51, 0.58]}
    runs = rows_by_hand(protocol, found, served)
    by_name = {v.promise: v for v in verdicts.verdicts(protocol, runs)}
    assert by_name["served, published"].miss == pytest.approx(-10)  # heterofl, 10 behind in each seed
    assert by_name["served, same loss"].miss == pytest.approx(1.0 - np.std([0, 1, -4], ddof=1) / 3**0.5)
    assert by_name["served, same loss"].word == "true"
    assert by_name["global, published"].miss == pytest.approx(1.0)  # float32: −1, −3, +1
    assert by_name["global, published"].word == "false, by 1.0"
    assert by_name["global, same loss"].miss == pytest.approx(3 - verdicts.NEAR)
    assert by_name["bytes"].miss == pytest.approx(25 - 15)
    assert by_name["MACs"].miss == pytest.approx(25 - 80)
    words = [v.word for v in verdicts.verdicts(protocol, runs[1:])]  # a seed of fedprune's is missing
    assert words == ["open"] * 6
    stale = [{**r, "stale": r["method"] == "heterofl"} for r in runs]
    assert {v.promise for v in verdicts.verdicts(protocol, stale) if v.word == "open"} == {
        "served, published",
        "global, published",
    }
    text = verdicts.summary({"a": (protocol, runs), "b": (protocol, [])}, "today")
    assert "| [a](a.md) | true: 52.0, heterofl 42.0: +10.0 ± 0.0 |" in text
    assert "| [b](b.md) | open: – |" in text
    assert "kept in 0 of 2 tables" in text
    assert "| [a](a.md) | 52.0, heterofl's trained model 42.0: +10.0 ± 0.0 |" in text
    unseen = text.partition("without seed 0:")[2]
    assert "| [a](a.md) | true: 53.0, heterofl 43.0: +10.0 ± 0.0 |" in unseen
    for seed, run in enumerate(r for r in runs if r["method"] == "heterofl"):
        run["rounds"][0]["own"]["accuracy_before"] = {"mean": [0.51, 0.51, 0.57][seed]}
    assert verdicts.at_best(protocol, runs).startswith("52.0, heterofl's received model 53.0: −1.0 ± ")
    assert verdicts.verdicts(TABLES["har"], []) != []
    assert verdicts.verdicts(TABLES["ca-hfp-scores"], []) == []


@pytest.mark.soak
def test_the_list_says_what_tables_cost_and_the_summary_is_written(accuracy, tmp_path, monkeypatch, capsys):
    protocols, _ = accuracy
    from benchmarks.accuracy import __main__ as command

    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    took = [{"method": "fedavg", "cpu_s": 60.0 * minutes} for minutes in (100, 200)]
    (tmp_path / "results/har.json").write_text(json.dumps({"runs": took}))
    har = TABLES["har"]
    assert command._minutes(har, har.method("fedavg")) == 150
    assert command._minutes(har, har.method("fedavg same loss")) == 150  # as a row like it
    assert command._minutes(har, har.method("heterofl")) == har.minutes
    (tmp_path / "results/har.json").unlink()
    command.table(command.parser().parse_args(["list"]))
    listed = capsys.readouterr().out
    runs = sum(3 * len(p.methods) for p in protocols.EIGHT)
    assert f"the 8 of the summary         {runs} runs, " in listed
    command.table(command.parser().parse_args(["summary", "--runs", str(tmp_path / "runs")]))
    assert capsys.readouterr().out.strip() == (tmp_path / "results/summary.md").read_text().strip()


@pytest.mark.soak
def test_tables_of_the_summary_have_what_verdicts_need(accuracy):
    protocols, run = accuracy
    from benchmarks.accuracy.protocol import CALIBRATION, FULL, SAME_LOSS
    from fedprune.strategies.values import Turn

    assert len(protocols.EIGHT) == 8
    for protocol in protocols.EIGHT:
        assert len(protocol.seeds) == 3
        jobs = {m.name: run.job_of(protocol, m, 20, 0, protocol.densities) for m in protocol.methods}
        for name, job in jobs.items():
            masked = job.strategy in ("fiarse", "pr-fl", "autoflip")
            longer = job.strategy == "fedprune" and name != SAME_LOSS
            codecs = ("int4", "int4") if longer else ("int8", "float16" if masked else "int8")
            assert (job.compression, job.compression_down) == (("none", "none") if name == FULL else codecs), name
            assert job.rounds == protocol.rounds * (2.5 if longer else 1)
        same = compose(jobs[SAME_LOSS])
        turn = Turn(0, 1, "board", (32,), 1.0)
        assert same.recipe(jobs[SAME_LOSS].recipe, turn) == replace(
            compose(jobs["fedprune"]).recipe(jobs["fedprune"].recipe, turn), ordered_dropout=(),
            evaluate_every=jobs[SAME_LOSS].recipe.evaluate_every,
        )  # fmt: skip
        assert same.widths == ()
    found = {
        n: run.experiment_of(TABLES["har"], TABLES["har"].method(n), 0).calibration for n in ("fedprune", "fedavg")
    }
    assert len(found["fedprune"]) == CALIBRATION
    assert found["fedavg"] is None


CODE = '''
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedprune.jobs.job import Job

__version__ = "1.0"

log = logging.getLogger("x")


def halved(value: float) -> float:
    """Half of it."""
    if value < 0:
        raise ValueError("negative")
    log.warning("halving %s", value)
    return value / 2
'''


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("Half of it.", "A half.", False),
        ("value / 2", "value / 2  # exactly", False),
        ('"negative"', '"below 0"', False),
        ("halving %s", "now %s", False),
        ("value: float", "value: int", False),
        ("jobs.job import Job", "jobs.schedule import Schedule", False),
        ('__version__ = "1.0"', '__version__ = "1.1"', False),
        ("value / 2", "value / 3", True),
        ("value < 0", "value <= 0", True),
        ("def halved", "def half", True),
        ("import logging\n", "import logging\nimport math\n", True),
    ],
)
@pytest.mark.soak
def test_a_digest_of_code_is_of_what_it_computes(accuracy, tmp_path, old, new, changed):
    from benchmarks.accuracy import code_digest

    paths = tmp_path / "before.py", tmp_path / "after.py"
    for path, text in zip(paths, (CODE, CODE.replace(old, new)), strict=True):
        path.write_text(text)
    before, after = map(code_digest._essence, paths)
    assert CODE.count(old) == 1
    assert (before != after) is changed


@pytest.mark.soak
def test_a_changed_strategy_changes_its_own_rows(accuracy):
    from benchmarks.accuracy import code_digest
    from fedprune.strategies import PRESETS

    methods = "fedprune.strategies.methods"
    modules = {name: {m for m in code_digest.closure(name) if m.startswith(f"{methods}.")} for name in PRESETS}
    everybody = {f"{methods}.robust"}
    assert modules["subflot"] == everybody | {f"{methods}.subflot"}
    assert modules["fedbuff"] == everybody | {f"{methods}.asynchronous", f"{methods}.fedavg"}
    assert modules["history"] == everybody | {f"{methods}.fedper"}
    own = code_digest.closure("benchmarks.accuracy.compositions:slices")
    assert {"benchmarks.accuracy.compositions", "fedprune.strategies.channel_ranking"} <= own.keys()
    digests = {name: code_digest.code_digest(name) for name in ("subflot", "heterofl", "ca-hfp", "pr-fl")}
    assert len(set(digests.values())) == len(digests)
    assert code_digest.code_digest("heterofl", samples=True) != digests["heterofl"]
    for module in ("fedprune.coordination.round", "fedprune.aggregation.fold", "fedprune_device.training.trainer"):
        assert module in own
        assert module not in code_digest.BY_VALUE
        assert not code_digest._within(module, code_digest.UNDECIDING)


# At every push the test above looks for modules of rounds, folds and trainers in a row's digest.
@pytest.mark.soak
@pytest.mark.parametrize("row", ["fedprune", "pr-fl"])
@pytest.mark.soak
def test_all_that_a_run_loads_is_in_the_digest_of_its_code(tmp_path, row):
    """Modules that were imported in a process of its own; those of other strategies are imported, but not used."""
    code = f"""
import sys
from pathlib import Path
from importlib.util import module_from_spec, spec_from_file_location
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
spec = spec_from_file_location("tables", {__file__!r})
tables = module_from_spec(spec)
spec.loader.exec_module(tables)
from benchmarks.accuracy import code_digest, run, sets
sets.samples = tables.noise
protocol = tables.small(tables.CIFAR)
run.run(protocol, protocol.method({row!r}), 0, Path({str(tmp_path)!r}), quiet=True)
strategy = protocol.method({row!r}).strategy
own = code_digest.closure(strategy)
ours = {{m: f for m, f in sys.modules.items() if m.partition(".")[0] in code_digest._OURS}}
loaded = {{m for m, found in ours.items() if getattr(found, "__file__", None)}}
print(*sorted(m for m in loaded - own.keys() if not m.startswith(("fedprune.strategies.", "benchmarks."))))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == []


@pytest.mark.soak
def test_commits_that_the_history_lacks_are_named(accuracy, tmp_path, monkeypatch):
    from benchmarks.accuracy.run import commit, unpublished

    monkeypatch.chdir(tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], check=True)
    assert unpublished([commit(), f"{commit()}-dirty", ""]) == ""
    said = unpublished([commit(), "0123abcd-dirty"])
    assert said.endswith("out: 0123abcd.")
