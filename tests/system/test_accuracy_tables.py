"""Tables of `benchmarks/accuracy`: every row's settings hold, and every table runs, here for a round on noise."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.accuracy import report, sets
from benchmarks.accuracy import run as run_module
from benchmarks.accuracy.protocol import FULL, SAME_LOSS
from benchmarks.accuracy.protocols import PROTOCOLS
from fedprune.model.recipe import Recipe
from fedprune_server.simulation.datasets.samples import assemble_samples
from fedprune_server.simulation.measure import ModelMeasure
from fedprune_server.simulation.results.differences import difference_text
from support.fakes.digits_simulation import digits, digits_experiment
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
    x = np.random.default_rng(0).integers(0, 256, (n, *SHAPES[name]), np.uint8)
    if name == "har":
        x = x.astype(np.float32)
    y = np.arange(n) % (6 if name == "har" else 10)
    kept = n * 5 // 6
    owners = [np.arange(kept) % 30, np.arange(kept, n) % 30] if name == "har" else None
    return assemble_samples([(x[:kept], y[:kept], False), (x[kept:], y[kept:], True)], owners=owners)


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
    assert [*folder.iterdir()] == [run.result_path(method, 0, folder)]  # and nothing of its state
    return result


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.soak
def test_a_table_runs(accuracy, table, tmp_path):
    check(accuracy, small(TABLES[table]), tmp_path / "runs")


CIFAR = TABLES["cifar10-dirichlet"]


def test_a_run_ends_with_the_round_that_reaches_its_target(monkeypatch, tmp_path):
    """And not before the first one, although every device's training is progress."""
    measure = ModelMeasure(digits().x, digits().y)
    experiment = digits_experiment(rounds=3, recipe=Recipe(max_steps=1), measure=measure)
    monkeypatch.setattr(run_module, "experiment_of", lambda *_, **__: experiment)
    protocol = replace(CIFAR, ends_at_target=True, target=0.0)
    result = run_module.run(protocol, CIFAR.methods[0], 0, tmp_path, quiet=True)
    assert [row["round"] for row in result["rounds"]] == [1]


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


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("no-such-table",), 14, "error: table: expected list, summary, papers, older or one of cifar10-dirichlet"),
        (("har", "--methods", "nothing"), 14, "error: rows of har: expected local"),
        (("har", "--seeds", "x"), 2, "expected whole numbers separated by commas, got 'x'"),
        (("har", "--rounds", "1"), 13, "error: data 'har': expected a .npz file or a folder that exists"),
    ],
)
@pytest.mark.at_push(1)
def test_a_mistake_is_one_line(arguments, code, said):
    command, environment = [sys.executable, "-m", "benchmarks.accuracy", *arguments], {"FEDPRUNE_DATA": "/nowhere"}
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
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


def test_an_interval_is_students():
    gaps = [1.5, -0.25, 3.0]
    oracle = ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert difference_text(gaps) == f"{np.mean(gaps):+.1f} ± {(oracle.high - oracle.low) / 2:.1f}"
    assert [difference_text([-1.0]), difference_text([])] == ["−1.0", None]


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
