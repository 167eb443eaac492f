"""What differential privacy costs: accuracy against ε, for FedAvg and fedprune on the demo's digits.

    OMP_NUM_THREADS=1 python benchmarks/privacy.py

The demo's six boards in simulation. Runs that the JSON among the results has already are not repeated; `--anew` forgets
them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from kept_runs import kept_runs
from synthetic_nets import RESULTS, setting, write

from fedprune.blobs.blob_store import BlobStore
from fedprune.jobs.job import Job
from fedprune.updates.privacy import Privacy
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import Digits, deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet import virtual_device
from fedprune_server.simulation.fleet.simulated_fleet import DEMO_BOARDS, demo_job, demo_reference_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

DELTA = 1e-5
LAST = 3
"""Rounds of which accuracies are means."""

ROUNDS, CLIP = 12, 1.0


@dataclass(frozen=True)
class Case:
    """A run: a strategy, and how private it is."""

    strategy: str
    clip: float = 0.0
    noise: str = "local"
    multiplier: float = 0.0

    @property
    def privacy(self) -> Privacy:
        if not self.clip:
            return Privacy()
        boards = 0 if self.noise == "local" else len(DEMO_BOARDS) - 1
        return Privacy(self.clip, self.multiplier, self.noise, boards, DELTA)


def cases() -> Iterator[Case]:
    for strategy in ("fedavg", "fedprune"):
        yield Case(strategy)
        yield Case(strategy, CLIP)
        for noise, multipliers in (("local", (0.03, 0.1, 0.3)), ("shared", (0.1, 0.3, 1.0))):
            for multiplier in multipliers:
                yield Case(strategy, CLIP, noise, multiplier)


@cache
def digits() -> Model:
    return import_onnx(digits_model(), "digits-net")


@cache
def hands() -> Digits:
    return deal([b.name for b in DEMO_BOARDS])


def job(case: Case) -> Job:
    make = demo_job if case.strategy == "fedprune" else demo_reference_job
    return replace(make(0, ROUNDS), privacy=case.privacy)


def run(case: Case) -> dict[str, Any]:
    """Global and local accuracy, and ε. What boards measure isn't told to the server; it is overheard here."""
    heard: dict[int, list[float]] = {}

    class Overheard(virtual_device.RoundRunner):
        def make(self, offer: Any, **how: Any) -> Any:
            made = super().make(offer, **how)
            served = made.metrics.get("accuracy_average", made.metrics.get("accuracy_after"))
            if served is not None:
                heard.setdefault(offer.round, []).append(served)
            return made

    began, plain = time.perf_counter(), virtual_device.RoundRunner
    virtual_device.RoundRunner = Overheard  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder:
            data, store = hands(), BlobStore(Path(folder), durable=False)
            devices = [VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in DEMO_BOARDS]
            what = Experiment("privacy", job(case), digits(), devices, (data.x, data.y), data.calibration)
            simulation = Simulation(what, store)
            history = simulation.run()
    finally:
        virtual_device.RoundRunner = plain  # type: ignore[misc]
    rows = [row["metrics"] for row in history]
    local = [float(np.mean(heard[number])) for number in sorted(heard)[-LAST:]]
    return {
        **asdict(case),
        "epsilon": rows[-1].get("epsilon"),
        "accuracy": float(np.mean([row["accuracy"] for row in rows[-LAST:]])),
        "local_accuracy": float(np.mean(local)),
        "accuracies": [row["accuracy"] for row in rows],
        "epsilons": [row.get("epsilon") for row in rows],
        "seconds": round(time.perf_counter() - began, 1),
    }


def secret_lots() -> list[dict[str, float]]:
    """What thousands of boards would pay if nobody could know whom a round asks, which this server doesn't claim."""
    import dp_accounting as accounting

    rows = []
    for share in (1.0, 0.1, 0.01):
        accountant = accounting.rdp.RdpAccountant()
        event = accounting.GaussianDpEvent(1.0)
        accountant.compose(event if share == 1 else accounting.PoissonSampledDpEvent(share, event), 100)
        rows.append({"share": share, "poisson": accountant.get_epsilon(DELTA)})
        rounds = round(100 * share)
        rows[-1]["asked"] = float(accounting.get_epsilon_gaussian(rounds**-0.5, DELTA))
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    from benchmarks.picture_style import FLEET, REFERENCE, save, styled

    with styled():
        figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for strategy, colour in (("fedavg", REFERENCE), ("fedprune", FLEET)):
            for noise, line, mark in (("local", "--", "s"), ("shared", "-", "o")):
                own = [r for r in rows if (r["strategy"], r["noise"]) == (strategy, noise) and r["epsilon"]]
                own.sort(key=lambda r: r["epsilon"])
                x, y = [r["epsilon"] for r in own], [r["accuracy"] for r in own]
                axis.semilogx(x, y, line, marker=mark, color=colour, label=f"{strategy}, {noise} noise")
            for row in rows:
                if (row["strategy"], row["clip"]) == (strategy, 0):
                    axis.axhline(row["accuracy"], color=colour, linestyle=":", linewidth=1)
        axis.set_title("Global accuracy of six boards; dotted: not private")
        axis.set_xlabel(f"ε at δ = {DELTA:g}")
        axis.set_ylim(0, 1)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        save(figure, path, rows)


def page(about: dict[str, Any], rows: list[dict[str, Any]], lots: list[dict[str, float]]) -> str:
    lines = []
    for row in rows:
        how = "none" if not row["clip"] else "clip alone" if not row["multiplier"] else row["noise"]
        epsilon = "no promise" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
        sigma = f"{row['multiplier']:g}" if row["multiplier"] else ""
        cells = (row["strategy"], how, sigma, epsilon)
        lines.append("| " + " | ".join((*cells, f"{row['accuracy']:.1%}", f"{row['local_accuracy']:.1%}")) + " |")
    asked = "\n".join(f"| {r['share']:.0%} | {r['asked']:.3g} | {r['poisson']:.3g} |" for r in lots)
    table = "\n".join(lines)
    return f"""# What differential privacy costs: accuracy against ε

{about["date"]}, {about["cpu"]}, Python {about["python"]}, dp-accounting {about["dp-accounting"]}.
`OMP_NUM_THREADS=1 python benchmarks/privacy.py`

The demo's six boards, digits and model in simulation, one seed, {ROUNDS} rounds, clip {CLIP:g}. ε is that of the board
that it costs most, for all of its samples, at δ = {DELTA:g}, without any discount for sampling. Global accuracy is
measured on the server's 449 images, local accuracy is what each board serves, on its own test images: means of the last
{LAST} rounds. Boards report nothing of the latter to the server; the simulation reads it. "Shared" noise trusts the
server; it is shared out among five, and credited less one board's. With equal noise FedAvg's ε is smaller, because all
its boards hold all of the model: in fedprune's only three hold the widest channels, which have their noise alone.

![Accuracy against ε](privacy.png)

| strategy | privacy | noise multiplier | ε | global accuracy | local accuracy |
|---|---|---:|---:|---:|---:|
{table}

With so few boards a useful ε (below 10, say) leaves nothing of the global model: noise that hides one board hides what
all have learnt. FedAvg's boards serve what they trained last, without noise but from a noisy start; fedprune's serve an
average in which half are the weights that they received, noise and all (its option `blend`; 0 leaves that out). The
noise of a mean shrinks with the number of boards: privacy of whole boards is for fleets of thousands.

## What a fleet of thousands would pay

100 rounds at noise multiplier 1, shared, δ = {DELTA:g}. "As asked" is what fedprune counts for a board that is asked as
often as the share says. "By secret lots" is the usual figure of papers: dp-accounting's RDP accountant for Poisson
sampling, in which the drawing of boards is secret. Here every offer contains the job's seed, from which the drawing
follows, so this figure is not claimed.

| share of boards that a round asks | ε as asked | ε by secret lots |
|---:|---:|---:|
{asked}
"""


def main() -> None:
    rows = kept_runs("privacy", __doc__, cases(), run)
    about, lots = setting("dp-accounting"), secret_lots()
    picture(rows, RESULTS / "privacy.png")
    write("privacy", {"setting": about, "rows": rows, "secret_lots": lots}, page(about, rows, lots))


if __name__ == "__main__":
    main()
