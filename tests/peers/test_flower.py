"""Our means beside Flower's: the same to float32 rounding, wherever Flower has one.

Flower runs in an environment of its own, which `make` installs under `build/flower`.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.model.architecture import Architecture, Axis, ChannelGroup, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import Aggregator, DeltaMean, Mean
from fedprune.strategies.methods.robust import RobustAggregator, Robustness
from support.fakes.strategy_reports import close, report, scene
from support.nets.drawn_models import model
from support.paths import ROOT

PYTHON = Path(os.environ.get("FEDPRUNE_FLOWER", ROOT / "build/flower/bin/python"))

ROUNDS, CLIENTS = 3, 7
TRIM, MOMENTUM, RATE = 0.2, 0.9, 0.7
UNIT = 2.0**-24
"""What a float32 is off by at most, relatively."""


def architecture() -> Architecture:
    """A convolution with batch norm and a last layer."""
    into, channels, classes = Axis.fixed(3), Axis((Segment(0, 0, 24),)), Axis.fixed(10)
    kernel = Axis.fixed(3)
    vectors = [k for k in TensorKind if k not in (TensorKind.WEIGHT, TensorKind.BIAS)]
    return Architecture(
        "peer",
        (ChannelGroup("c", 24),),
        (
            TensorSpec("conv.weight", TensorKind.WEIGHT, (channels, into, kernel, kernel)),
            *(TensorSpec(f"norm.{k.value}", k, (channels,)) for k in vectors),
            TensorSpec("fc.weight", TensorKind.WEIGHT, (classes, channels)),
            TensorSpec("fc.bias", TensorKind.BIAS, (classes,)),
        ),
        (LayerRow("conv", "Conv", "conv.weight", 1), LayerRow("fc", "Gemm", "fc.weight", 1)),
        (),
        (3, 8, 8),
        (10,),
    )


NET = architecture()
BASE = model(NET, 0)
WEIGHTS = np.random.default_rng(1).integers(1, 10_000, (ROUNDS, CLIENTS))


def update(round_: int, client: int) -> Tensors:
    """What a client hands in; it doesn't depend on what the server made of the round before."""
    noise = model(NET, 100 + 10 * round_ + client, 0.3)
    return {n: np.abs(v + noise[n]) if n.endswith("var") else v + noise[n] for n, v in BASE.items()}


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Flower makes of all rounds."""
    if not PYTHON.exists():
        pytest.skip(f"Flower is not installed: no {PYTHON} (`make build/flower/installed`)")
    folder = tmp_path_factory.mktemp("flower")
    inputs: dict[str, Any] = {"weights": WEIGHTS, "trim": TRIM, "momentum": MOMENTUM, "rate": RATE}
    inputs |= {f"base/{n}": v for n, v in BASE.items()}
    for r in range(ROUNDS):
        for k in range(CLIENTS):
            inputs |= {f"{r}/{k}/{n}": v for n, v in update(r, k).items()}
    np.savez(folder / "in.npz", **inputs)
    script = Path(__file__).parent / "flower_aggregates.py"
    subprocess.run(
        [PYTHON, script, folder / "in.npz", folder / "out.npz"],
        check=True,
        timeout=240,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
    )
    return dict(np.load(folder / "out.npz"))


def ours(aggregator: Aggregator, round_: int, base: Tensors = BASE, memory: Any = None, rate: float = 1.0) -> Any:
    round_scene, full_selection = scene(NET, base, memory, round=round_ + 1), Selection.full(NET)
    reports = [
        report(round_scene, full_selection, update(round_, k), int(WEIGHTS[round_, k]), device=f"d{k}")
        for k in range(CLIENTS)
    ]
    return close(aggregator, round_scene, reports, rate)


def size(round_: int, name: str) -> Any:
    """The largest magnitude that goes into a coordinate."""
    return np.max([np.abs(update(round_, k)[name]) for k in range(CLIENTS)], axis=0).astype(np.float64)


@pytest.mark.parametrize("aggregator", [Mean(), Mean(rule="fill"), DeltaMean()], ids=["mean", "fill", "moves"])
def test_means_agree(flower: dict[str, Any], aggregator: Aggregator) -> None:
    for r in range(ROUNDS):
        for name, value in ours(aggregator, r).model.items():
            theirs = flower[f"mean/{r}/{name}"].astype(np.float64)
            # Theirs rounds every product and every sum to float32; ours is rounded once.
            assert (np.abs(value - theirs) <= (CLIENTS + 3) * UNIT * size(r, name)).all()
            exact = sum(int(WEIGHTS[r, k]) * update(r, k)[name].astype(np.float64) for k in range(CLIENTS))
            exact /= int(WEIGHTS[r].sum())
            assert (np.abs(value - exact) <= UNIT * size(r, name) + 2.0**-34).all()


@pytest.mark.parametrize(
    ("statistic", "robustness"),
    [("median", Robustness(centre="median")), ("trimmed", Robustness(centre="trimmed", trim=TRIM))],
)
def test_medians_and_trimmed_means_agree(flower: dict[str, Any], statistic: str, robustness: Robustness) -> None:
    for r in range(ROUNDS):
        for name, value in ours(RobustAggregator(Mean(), robustness), r).model.items():
            theirs = flower[f"{statistic}/{r}/{name}"].astype(np.float64)
            assert (np.abs(value - theirs) <= (CLIENTS + 3) * UNIT * size(r, name) + 2.0**-34).all()


def test_server_momentum_and_rate_agree(flower: dict[str, Any]) -> None:
    now, memory = BASE, {}
    for r in range(ROUNDS):
        closing = ours(Mean(server_momentum=MOMENTUM), r, now, memory, RATE)
        now, memory = closing.model, {**memory, **closing.memories}
        for spec in NET.trainable:  # Flower gives statistics momentum, too; ours are measured
            theirs = flower[f"momentum/{r}/{spec.name}"].astype(np.float64)
            assert np.allclose(now[spec.name], theirs, rtol=0, atol=64 * UNIT * (1 + size(r, spec.name).max()))
