"""What poisoned updates do to the model: two hostile boards of ten, with the default limits and without any.

    FEDPRUNE_DATA=DIR OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py

Simulated boards train honestly; the hostile ones then change what they send. Runs that the JSON among the results has
already are not repeated; `--anew` forgets them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.accuracy.protocols import FASHION, HAR
from benchmarks.accuracy.run import experiment_of
from kept_runs import kept_runs
from synthetic_nets import setting, write

from fedprune import tensorfile
from fedprune.architecture import Architecture
from fedprune.influence import TENSOR
from fedprune.job import Job
from fedprune.profile_store import find
from fedprune.recipe import Recipe
from fedprune_export.importing import import_onnx
from fedprune_server.simulation import virtual_device
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.run_folder import simulate
from fedprune_server.simulation.virtual_device import VirtualDevice

SEEDS = (0, 1, 2)
LAST = 3
"""Rounds of which accuracies are means."""

EDGE = 7.9
"""Largest weight that the numeric check lets through while the model's own are small."""

STATISTIC = 1e6
"""A batch-norm statistic that the numeric check lets through."""

ATTACKS = {
    "none": "nobody is hostile",
    "x100": "100 times the honest change, as far as the numeric check allows",
    "bound": f"every weight {EDGE}, every statistic {STATISTIC:g}",
    "flip": "the honest change with its sign reversed",
    "flip, longest": "the reversed change, as long as the limit allows",
}


@dataclass(frozen=True)
class Case:
    """A run."""

    data: str
    strategy: str
    limits: bool
    attack: str
    seed: int


def cases() -> Iterator[Case]:
    """All runs; without limits, attacks are played with the first seed alone."""
    for strategy in ("fedavg", "fedprune"):
        for attack in ATTACKS:
            for seed in SEEDS:
                yield Case("digits", strategy, True, attack, seed)
                if attack == "none" or (seed == SEEDS[0] and attack != "flip, longest"):
                    yield Case("digits", strategy, False, attack, seed)
    for seed in SEEDS:
        for data in ("fashion, Dirichlet .1", "fashion", "HAR"):
            for strategy in ("fedprune", "fedavg"):
                for limits in (True, False):
                    yield Case(data, strategy, limits, "none", seed)


def experiment(case: Case) -> Experiment:
    """Honest boards and data."""
    limits = {} if case.limits else {"move_limit": 0.0, "weight_limit": 0.0}
    if case.data == "digits":
        names = [f"board-{i}" for i in range(10)]
        data = deal(names, seed=case.seed)
        recipe = Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9)
        job = Job("poisoning", case.seed, 12, 10, deadline_s=1e7, strategy=case.strategy, recipe=recipe, **limits)
        boards = [VirtualDevice(n, find("raspberry-pi-5"), data.devices[n]) for n in names]
        model = import_onnx(digits_model(), "digits-net")
        return Experiment("poisoning", job, model, boards, (data.x, data.y), data.calibration)
    if case.data == "HAR":
        table = replace(HAR, rounds=8, submodels=False)
    else:
        alpha, devices = (0.5, 10) if case.data == "fashion" else (0.1, 20)
        dealt = {**FASHION.data, "devices": devices, "alpha": alpha, "most": 4000}
        table = replace(FASHION, data=dealt, rounds=10, submodels=False)
    method = next(m for m in FASHION.methods if m.name == case.strategy)
    what = experiment_of(table, method, case.seed)
    return replace(what, job=replace(what.job, **limits))


def run(case: Case) -> dict[str, Any]:
    """Accuracy of the global model with two hostile boards."""
    what = experiment(case)
    names = sorted(d.name for d in what.devices)
    hostile = [] if case.attack == "none" else [names[1], names[len(names) // 2 + 1]]
    longest = TENSOR * what.job.move_limit if what.job.move_limit else 1.0
    began, plain = time.perf_counter(), virtual_device.Workbench

    class Hostile(virtual_device.Workbench):
        def make(self, offer: Any, **how: Any) -> Any:
            made = super().make(offer, **how)
            if self._device not in hostile:
                return made
            sent = tensorfile.decode(self._blobs.map(offer.weights.sha256))
            tensors = tensorfile.decode(self._blobs.read(made.update.weights.sha256))
            spoilt = poisoned(what.model.architecture, tensors, sent, case.attack, longest)
            return replace(made, update=replace(made.update, weights=self._blobs.put(tensorfile.encode(spoilt))))

    virtual_device.Workbench = Hostile  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder:
            record = simulate(what, Path(folder))
    finally:
        virtual_device.Workbench = plain  # type: ignore[misc]
    accuracies = [row.accuracy if case.data == "digits" else row.measured["global"] for row in record.rounds]
    return {
        **asdict(case),
        "accuracy": statistics.fmean(a or 0.0 for a in accuracies[-LAST:]),
        "accuracies": accuracies,
        "seconds": round(time.perf_counter() - began, 1),
    }


def poisoned(
    architecture: Architecture, tensors: dict[str, Any], sent: dict[str, Any], attack: str, longest: float
) -> dict[str, Any]:
    """What a hostile board sends in place of what it trained."""
    times = {"x100": 100.0, "flip": -1.0, "flip, longest": -longest}.get(attack, 1.0)
    out = {}
    for name, value in tensors.items():
        trained = architecture.by_name[name].kind.trainable
        if attack == "bound":
            out[name] = np.full_like(value, EDGE if trained else STATISTIC)
        elif trained:
            out[name] = np.clip(sent[name] + times * (value - sent[name]), -EDGE, EDGE).astype(np.float32)
        else:
            out[name] = np.array(value)
    return out


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results."""
    found: dict[tuple[str, str, bool, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["data"], row["strategy"], row["limits"], row["attack"]), []).append(row["accuracy"])
    lines, honest = [], []
    for data, strategy in dict.fromkeys((row["data"], row["strategy"]) for row in rows):
        for attack in ATTACKS:
            pair = [found.get((data, strategy, limits, attack)) for limits in (True, False)]
            cells = [f"{statistics.fmean(p):.1%}" + _spread(p) if p else "" for p in pair]
            if any(cells):
                (honest if attack == "none" else lines).append(
                    f"| {data} | {strategy} | {attack} | {' | '.join(cells)} |"
                )
    head = "| data | strategy | attack | default limits | no limits |\n|---|---|---|---:|---:|"
    attacks = "\n".join(f"- {name}: {what}." for name, what in ATTACKS.items())
    rule = "\n"
    return f"""# Poisoned updates

{about["date"]}, {about["cpu"]}, Python {about["python"]}, onnxruntime {about["onnxruntime"]}.
`FEDPRUNE_DATA=DIR OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py`

Simulated fleets; accuracy of the global model, mean of the last {LAST} rounds over {len(SEEDS)} seeds, with the lowest
and the highest seed in brackets. Attacks: two boards of ten are hostile in every round.

{attacks}

`digits`: the demo's images and network, Dirichlet .5, 12 rounds. `fashion`: 4,000 images of Fashion-MNIST, 14×14,
convolutions 32-64-128-128, Dirichlet .5, 10 rounds, densities 1 to .25 with fedprune. `fashion, Dirichlet .1`: the same
images over 20 boards. `HAR`: thirty people, 8 rounds. Where a row has no brackets it is of one seed; without limits,
attacks are played with the first seed alone.

## What the limits cost honest fleets

{head}
{rule.join(honest)}

## Two hostile boards of ten

{head}
{rule.join(lines)}
"""


def _spread(accuracies: list[float]) -> str:
    return f" ({min(accuracies):.1%}–{max(accuracies):.1%})" if len(accuracies) > 1 else ""


def main() -> None:
    rows = kept_runs("poisoning", __doc__, cases(), run)
    about = setting("onnxruntime")
    write("poisoning", {"setting": about, "rows": rows}, page(about, rows))


if __name__ == "__main__":
    main()
