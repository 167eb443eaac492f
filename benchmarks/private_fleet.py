"""What privacy costs a fleet of twenty boards: accuracy at ε of 2, 8, 32 and none, over several seeds.

    OMP_NUM_THREADS=1 python benchmarks/private_fleet.py

Simulated boards of the demo's kinds on its digits, FedAvg and fedprune, `shared` noise. Runs that the JSON among the
results has already are not repeated; `--anew` forgets them.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from kept_runs import kept_runs
from synthetic_nets import setting, write

from fedprune.blobs.blob_store import BlobStore
from fedprune.jobs.job import Job
from fedprune.updates.privacy import SHARED, Privacy, epsilon
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import Digits, deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet import virtual_device
from fedprune_server.simulation.fleet.simulated_fleet import DEMO_BOARDS, demo_job, demo_reference_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

DELTA = 1e-5
COUNT, ROUNDS, EPOCHS, CLIP = 20, 6, 2, 1.0
EPSILONS = (2.0, 8.0, 32.0, math.inf)
SEEDS = (0, 1, 2)
STRATEGIES = ("fedavg", "fedprune")
KINDS = {
    f"{DEMO_BOARDS[i % len(DEMO_BOARDS)].name}-{i // len(DEMO_BOARDS)}": DEMO_BOARDS[i % len(DEMO_BOARDS)]
    for i in range(COUNT)
}


@dataclass(frozen=True)
class Case:
    """A run: a strategy, the ε that the dearest board may have cost at its end, or none, and a seed."""

    strategy: str
    epsilon: float | None
    seed: int


def cases() -> list[Case]:
    return [Case(s, None if math.isinf(e) else e, seed) for seed in SEEDS for s in STRATEGIES for e in EPSILONS]


@cache
def digits() -> Model:
    return import_onnx(digits_model(), "digits-net")


@cache
def hands(seed: int) -> Digits:
    return deal(tuple(KINDS), seed=seed)


def job(case: Case, privacy: Privacy, rounds: int = ROUNDS) -> Job:
    plain = (demo_job if case.strategy == "fedprune" else demo_reference_job)(case.seed, rounds)
    recipe = replace(plain.recipe, epochs=EPOCHS, evaluate_every=ROUNDS)
    return replace(plain, devices=COUNT, privacy=privacy, recipe=recipe)


@cache
def multiplier(target: float) -> float:
    """The noise multiplier at which every round may be released for a board to have cost ε at the end."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(ROUNDS / middle**2, DELTA) > target else (low, middle)
    return high


@cache
def holders(strategy: str) -> int:
    """How many boards hold what the board holds that shares the least: found out in a round of hardly any noise."""
    trial = Privacy(CLIP, 0.01, SHARED, COUNT - 1, DELTA)
    state = simulated(Case(strategy, None, SEEDS[0]), trial, rounds=1)[1].coordinator.state
    least = min(float(z) for device in state.devices.values() for z in device.releases)
    return 1 + round((least / 0.01) ** 2 * (COUNT - 1))


def settings(case: Case) -> Privacy:
    if case.epsilon is None:
        return Privacy()
    sigma = multiplier(case.epsilon) * math.sqrt((COUNT - 1) / max(1, holders(case.strategy) - 1))
    return Privacy(CLIP, sigma, SHARED, COUNT - 1, DELTA)


def simulated(case: Case, privacy: Privacy, rounds: int = ROUNDS) -> tuple[list[dict[str, Any]], Simulation]:
    with tempfile.TemporaryDirectory() as folder:
        data, store = hands(case.seed), BlobStore(Path(folder), durable=False)
        devices = [VirtualDevice(n, b.profile(), data.devices[n]) for n, b in KINDS.items()]
        what = Experiment("private", job(case, privacy, rounds), digits(), devices, (data.x, data.y), data.calibration)
        simulation = Simulation(what, store)
        return simulation.run(), simulation


def run(case: Case) -> dict[str, Any]:
    """Global accuracy, and that of what boards serve at the end, which is overheard here: boards don't tell it."""
    heard: dict[int, list[float]] = {}

    class Overheard(virtual_device.RoundRunner):
        def make(self, offer: Any, **how: Any) -> Any:
            made = super().make(offer, **how)
            served = made.metrics.get("accuracy_average", made.metrics.get("accuracy_after"))
            if served is not None:
                heard.setdefault(offer.round, []).append(served)
            return made

    began, plain, privacy = time.perf_counter(), virtual_device.RoundRunner, settings(case)
    virtual_device.RoundRunner = Overheard  # type: ignore[misc]
    try:
        history, _ = simulated(case, privacy)
    finally:
        virtual_device.RoundRunner = plain  # type: ignore[misc]
    rows = [row["metrics"] for row in history]
    return {
        **asdict(case),
        "noise_multiplier": privacy.noise_multiplier,
        "spent": rows[-1].get("epsilon"),
        "accuracy": rows[-1]["accuracy"],
        "accuracies": [row["accuracy"] for row in rows],
        "local_accuracy": float(np.mean(heard[ROUNDS])),
        "seconds": round(time.perf_counter() - began, 1),
    }


def shares(values: list[float]) -> str:
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for strategy in STRATEGIES:
        for target in EPSILONS:
            wanted = None if math.isinf(target) else target
            own = [r for r in rows if (r["strategy"], r["epsilon"]) == (strategy, wanted)]
            if not own:
                continue
            noise = f"{own[0]['noise_multiplier']:.3g}" if wanted else ""
            spent = f"{max(r['spent'] for r in own):.3g}" if wanted else "no promise"
            words = (strategy, spent, noise, str(len(own)))
            words += (shares([r["accuracy"] for r in own]), shares([r["local_accuracy"] for r in own]))
            lines.append("| " + " | ".join(words) + " |")
    table = "\n".join(lines)
    return f"""# Twenty private boards: accuracy against ε

{about["date"]}, {about["cpu"]}, Python {about["python"]}, dp-accounting {about["dp-accounting"]}.
`OMP_NUM_THREADS=1 python benchmarks/private_fleet.py`

{COUNT} simulated boards of the demo's kinds with its digits (some 60 images each) and its model, {ROUNDS} rounds of
{EPOCHS} epochs in which all take part, clip {CLIP:g}, `shared` noise among {COUNT - 1} and credited less one board's,
δ = {DELTA:g}. The noise is chosen so that the board with the highest ε reaches the ε of the row in the last round, for
all of its samples, by the server's accounting. Global accuracy is measured on the server's 449 images after the last
round, local accuracy is that of what each board serves then, on its own test images. Means over the seeds, which deal
the data anew, and the least and the most.

| strategy | ε | noise multiplier | seeds | global accuracy | local accuracy |
|---|---:|---:|---:|---:|---:|
{table}

A tenth is what guessing gives. In fedprune {holders("fedprune")} of the {COUNT} boards hold the widest channels, and
their noise alone hides there: for the same ε it has to be larger for all. Where ε is above what was aimed at, fewer
boards' updates with those channels counted in some round than in the trial that the noise was reckoned by.
"""


def main() -> None:
    rows = kept_runs("private_fleet", __doc__, cases(), run)
    about = setting("dp-accounting")
    write("private_fleet", {"setting": about, "rows": rows}, page(about, rows))


if __name__ == "__main__":
    main()
