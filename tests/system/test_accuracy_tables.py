"""Tables of `benchmarks/accuracy`: every row's settings hold, and every table runs, here for a round on noise."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprune.strategies import compose
from fedprune_server.data.samples import assembled

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
SHAPES = {"cifar10": (32, 32, 3), "fashion_mnist": (28, 28), "har": (9, 128)}


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
    import sys

    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.accuracy.protocols import PROTOCOLS
    finally:
        sys.path.remove(str(ROOT))
    return PROTOCOLS


TABLES = tables()


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_a_strategy(accuracy, table):
    _, run = accuracy
    protocol = TABLES[table]
    names = [m.name for m in protocol.methods]
    assert len(set(names)) == len(names)
    assert protocol.reference in names
    keys = {protocol.key(m, s) for m in protocol.methods for s in protocol.seeds}
    assert len(keys) == len(names) * len(protocol.seeds)
    for method in protocol.methods:
        compose(run.job_of(protocol, method, 20, 0))


def small(protocol):
    """A round of one step on a few samples."""
    data = {**protocol.data, "least": 5}
    if protocol.source != "har":
        data["most"] = 1200
    recipe = replace(protocol.recipe, max_steps=1, batch_size=16)
    return replace(protocol, rounds=1, recipe=recipe, data=data, every=1, every_global=1)


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
    assert not list(folder.glob("*/run"))
    return result


QUICK = ("cifar10-dirichlet", "har", "ca-hfp-scores", "pr-fl-time")


@pytest.mark.parametrize("table", QUICK)
def test_a_table_runs(accuracy, table, tmp_path):
    _, run = accuracy
    check(run, small(TABLES[table]), tmp_path / "runs")


@pytest.mark.soak
@pytest.mark.parametrize("table", sorted(TABLES.keys() - set(QUICK)))
def test_every_other_table_runs(accuracy, table, tmp_path):
    _, run = accuracy
    check(run, small(TABLES[table]), tmp_path / "runs")


def test_the_same_run_gives_the_same_numbers_and_a_page(accuracy, tmp_path, monkeypatch):
    _, run = accuracy
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.accuracy.page import page

    protocol = small(TABLES["cifar10-ingredients"])
    first, second = (check(run, protocol, tmp_path / name) for name in "ab")
    for result in (first, second):
        result.pop("wall_s"), result.pop("cpu_s")
    assert json.dumps(first) == json.dumps(second)
    better = json.loads(json.dumps(first))
    better["method"] = "la"
    better["rounds"][0]["measured"]["global"] += 0.1
    better["rounds"][0]["down"] *= 3
    text = page(
        protocol,
        [{**r, "cpu_s": 1.0} for r in (first, better)],
        {"date": "today", "machine": "here", "versions": {"Python": "3"}},
    )
    rows = [line for line in text.splitlines() if line.startswith("| la |")]
    assert "+10.0" in rows[0]
    assert len(rows) >= 2  # it is among the costlier ones, too
    assert "Not run yet (seeds): slices (1, 2), la (1, 2)" in text


class KilledError(Exception):
    pass


def test_a_run_by_simulated_time_that_is_killed_is_measured_in_the_same_rounds(accuracy, tmp_path, monkeypatch):
    _, run = accuracy
    protocol = replace(small(TABLES["pr-fl-time"]), rounds=9, every_s=20, until_s=0)
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


def test_the_page_about_papers_names_tables_that_there_are(accuracy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.accuracy.docs import filled

    text = (ROOT / "docs/reproduce-a-paper.md").read_text()
    named = set(re.findall(r"<!-- results: (\S+) -->", text)) | set(
        re.findall(r"benchmarks\.accuracy ([a-z][\w-]+)", text)
    )
    assert named - {"list"} <= TABLES.keys()
    assert {n for n, p in TABLES.items() if p.full} <= named
    rounds = [{"round": 1, "at": 1.0, "down": 9, "up": 9, "macs": 1e12, "measured": {"global": 0.5}, "own": {}}]
    runs = [{"method": "subflot", "seed": 0, "rounds": rounds, "devices": {"a": [1.0, 1, 1]}}]
    (tmp_path / "subflot-regime.json").write_text(json.dumps({"runs": runs, "date": "today"}))
    once = filled(text, tmp_path)
    assert "| subflot | 50.0 |" in once
    assert filled(once, tmp_path) == once
