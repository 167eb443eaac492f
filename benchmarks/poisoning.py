"""What poisoned updates do to the model: two hostile boards of ten, with the default limits and without any.

    FEDPRUNE_DATA=DIR OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py

Simulated boards train honestly; the hostile ones then change what they send. Runs that the JSON among the results has
already are not repeated; `--anew` forgets them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from kept_runs import kept_runs
from synthetic_nets import setting, write

from benchmarks.accuracy.protocol import Method, Protocol
from benchmarks.accuracy.protocols import CIFAR, PROTOCOLS, TABLES
from benchmarks.accuracy.run import UNLIMITED, experiment_of, rounds_of
from fedprune.coordination.limits import TENSOR_FACTOR, LimitedUpdates, UpdateLimits
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet import virtual_device
from fedprune_server.simulation.fleet.virtual_device import StoredData, VirtualDevice
from fedprune_server.simulation.results.run_folder import simulate

SEEDS = (0, 1, 2)
"""Seeds of runs on the digits; the tables' protocols are run with the first two."""

STRATEGIES = ("fedavg", "fedprune")

ROUNDS = 8
SAMPLES = 4000
"""The short form of a table's protocol. Everything else is the table's: partition, net, boards, local training."""

SHORT = {"cifar10-partial": 20, "fedobp-q": 20, "autoflip-clean": 16, "pr-fl-time": 40}
"""Rounds of protocols in which a part of the boards trains in each."""

HONEST = tuple(table.name for table in TABLES if table.name != "fedprune-ablation")
"""The tables' protocols; the ablation has that of `cifar10-dirichlet`."""

PAPERS = {
    "cifar10-dirichlet": "heterofl",
    "subflot-regime": "subflot",
    "ca-hfp-scores": "curvature",
    "pr-fl-time": "pr-fl",
    "fedobp-q": "fedobp 0.99",
    "autoflip-clean": "autoflip",
}
"""By paper's protocol the row of its method; HeteroFL's is that of the tables."""

LAST = 3
"""Rounds of which accuracies are means."""

EDGE = 7.9
"""Largest weight that the numeric check lets through while the model's own are small."""

STATISTIC = 1e6
"""A batch-norm statistic that the numeric check lets through."""

BOAST = 1000

ATTACKS = {
    "none": "no device is hostile",
    "x100": "100 times the honest change, as far as the numeric check allows",
    "bound": f"every weight {EDGE}, every statistic {STATISTIC:g}",
    "flip": "the honest change with its sign reversed",
    "flip, longest": "the reversed change, as long as the limit allows",
    "flip, boasting": f"the same from boards that claim {BOAST:,} times their samples and as many steps",
    "flip, boasting, weight_limit 1": "the same where a job says `weight_limit = 1`",
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
    for strategy in STRATEGIES:
        for attack in ATTACKS:
            for seed in SEEDS:
                yield Case("digits", strategy, True, attack, seed)
                if attack == "none" or (seed == SEEDS[0] and "," not in attack):
                    yield Case("digits", strategy, False, attack, seed)
    tables = [(table, strategy) for table in HONEST for strategy in STRATEGIES]
    for seed, runs in ((0, [*tables, *PAPERS.items()]), (1, tables)):
        for data, strategy in runs:
            for limits in (True, False):
                yield Case(data, strategy, limits, "none", seed)


def method_of(case: Case) -> Method:
    """The row of the case's table; of the first table where it has none."""
    found = [m for m in PROTOCOLS[case.data].methods if m.name == case.strategy]
    return replace(found[0] if found else CIFAR.method(case.strategy), recipe={})


def short(table: Protocol) -> Protocol:
    """The short form of a table's protocol."""
    rounds = SHORT.get(table.name, ROUNDS)
    recipe = replace(table.recipe, evaluate_every=rounds // 2)
    data = {**table.data, "most": SAMPLES}
    return replace(table, data=data, rounds=rounds, recipe=recipe, submodels=False, every_global=1, every_s=0.0)


def experiment(case: Case) -> Experiment:
    """Honest boards and data."""
    limits = {"move_limit": Job.move_limit, "weight_limit": Job.weight_limit} if case.limits else UNLIMITED
    if "weight_limit" in case.attack:
        limits = {**limits, "weight_limit": 1.0}
    if case.data == "digits":
        names = [f"board-{i}" for i in range(10)]
        data = deal(names, seed=case.seed)
        recipe = Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9)
        job = Job("poisoning", case.seed, 12, 10, deadline_s=1e7, strategy=case.strategy, recipe=recipe, **limits)
        boards = [VirtualDevice(n, find("raspberry-pi-5"), data.devices[n]) for n in names]
        model = import_onnx(digits_model(), "digits-net")
        return Experiment("poisoning", job, model, boards, (data.x, data.y), data.calibration)
    what = experiment_of(short(PROTOCOLS[case.data]), method_of(case), case.seed)
    return replace(what, job=replace(what.job, **limits))


def run(case: Case) -> dict[str, Any]:
    """Accuracy of the global model with two hostile boards."""
    what = experiment(case)
    names = sorted(d.name for d in what.devices)
    hostile = [] if case.attack == "none" else [names[1], names[len(names) // 2 + 1]]
    longest = TENSOR_FACTOR * what.job.move_limit if what.job.move_limit else 1.0
    boasts = "boasting" in case.attack
    if boasts:
        what = replace(what, devices=tuple(boasting(d) if d.name in hostile else d for d in what.devices))
        longest *= what.job.weight_limit
    began, plain, closed = time.perf_counter(), virtual_device.RoundRunner, UpdateLimits.apply
    limited: dict[int, Counter[str]] = {}

    class Hostile(virtual_device.RoundRunner):
        def make(self, offer: Any, **how: Any) -> Any:
            made = super().make(offer, **how)
            if self._device not in hostile:
                return made
            sent = tensorfile.decode(self._blobs.map(offer.weights.sha256))
            tensors = tensorfile.decode(self._blobs.read(made.update.weights.sha256))
            spoilt = poisoned(what.model.architecture, tensors, sent, case.attack, longest)
            boast = BOAST if boasts else 1
            weights = self._blobs.put(tensorfile.encode(spoilt))
            return replace(made, update=replace(made.update, weights=weights, steps=boast * made.update.steps))

    def apply(limits: UpdateLimits, scene: Any, counted: Any) -> LimitedUpdates:
        found = closed(limits, scene, counted)
        trained = {t.name for t in what.model.architecture.trainable}
        shares = [set(c.shares) for c in found.updates]
        again = limited.get(scene.round, Counter())["rejected"]
        limited[scene.round] = Counter(
            updates=len(counted) + again,
            rejected=len(found.rejected) + again,
            shortened=sum(bool(s & trained) for s in shares),
            statistics=sum(bool(s - trained) for s in shares),
        )
        return found

    virtual_device.RoundRunner = Hostile  # type: ignore[misc]
    UpdateLimits.apply = apply  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            record = simulate(what, Path(folder))
    finally:
        virtual_device.RoundRunner = plain  # type: ignore[misc]
        UpdateLimits.apply = closed  # type: ignore[method-assign]
    accuracies = [row.accuracy if case.data == "digits" else row.measured["global"] for row in record.rounds]
    serves = "after" if case.data == "digits" else method_of(case).serves
    return {
        **asdict(case),
        "accuracy": statistics.fmean(a or 0.0 for a in accuracies[-LAST:]),
        "local": rounds_of(record)[-1]["own"].get(f"accuracy_{serves}", {}).get("mean"),
        "limited": dict(sum(limited.values(), Counter[str]())),
        "accuracies": accuracies,
        "seconds": round(time.perf_counter() - began, 1),
    }


def boasting(device: VirtualDevice) -> VirtualDevice:
    """A board that claims more samples than it has."""
    known = StoredData.of(device.load)
    return replace(device, data=replace(known, samples=BOAST * known.samples))


def poisoned(
    architecture: Architecture, tensors: dict[str, Any], sent: dict[str, Any], attack: str, longest: float
) -> dict[str, Any]:
    """What a hostile board sends in place of what it trained."""
    times = {"x100": 100.0, "flip": -1.0}.get(attack, -longest if attack.startswith("flip,") else 1.0)
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
    by_case = {tuple(row[f.name] for f in fields(Case)): row for row in rows}

    def of(data: str, strategy: str, limits: bool, attack: str) -> dict[int, dict[str, Any]]:
        found = {seed: by_case.get((data, strategy, limits, attack, seed)) for seed in SEEDS}
        return {seed: row for seed, row in found.items() if row}

    honest, lines = [], []
    differences: dict[str, list[float]] = {}
    for data, strategy in dict.fromkeys((row["data"], row["strategy"]) for row in rows):
        on, off = (of(data, strategy, limits, "none") for limits in (True, False))
        if on and off and data != "digits":
            honest.append(f"| {data} | {strategy} | {_compared(on, off, differences)} | {_limited(on)} |")
        for attack in ATTACKS if data == "digits" else ():
            sides = (of(data, strategy, limits, attack) for limits in (True, False))
            pair = [[row["accuracy"] for row in side.values()] for side in sides]
            lines.append(f"| {strategy} | {attack} | {' | '.join(_spread(p) for p in pair)} |")
    attacks = "\n".join(f"- {name}: {what}." for name, what in ATTACKS.items())
    means = "; ".join(
        f"{key}: {100 * statistics.fmean(d):+.2f} ± {100 * statistics.stdev(d) / len(d) ** 0.5:.2f}, "
        f"the same to the digit in {d.count(0.0)} of {len(d)}"
        for key, d in differences.items()
        if len(d) > 1
    )
    others = ", ".join(f"`{table}` {rounds}" for table, rounds in SHORT.items())
    rule = "\n"
    return f"""# Poisoned updates

{about["date"]}, {about["cpu"]}, Python {about["python"]}, onnxruntime {about["onnxruntime"]}.
`FEDPRUNE_DATA=DIR OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py`

Simulated fleets with the default limits on updates and without any. *Global* is the accuracy of the global model, the
mean of the last {LAST} rounds; *local* is the mean of what boards predict with, each on its own test data.

## What the limits cost honest fleets

The protocols of the accuracy tables in a short form: {SAMPLES:,} samples and {ROUNDS} rounds ({others}).
Partition, net, boards and local training are the tables'. The papers' own protocols follow, each with the paper's
method. Δ is, seed by seed, by how many points a run with limits is better than the same run without. *Shortened* is the
share of updates of which some trained tensor was shortened, *statistics* of those whose batch-norm statistics were.

| protocol | method | global | without | Δ | local | without | Δ | shortened | statistics |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|
{rule.join(honest)}

Mean Δ over all runs with its standard error, in points: {means}.

## Two hostile boards of ten

The demo's digits and network, Dirichlet .5, 12 rounds. *Global* over {len(SEEDS)} seeds, with the lowest and the
highest in brackets; without brackets it is one seed. Two boards are hostile in every round:

{attacks}

| strategy | attack | default limits | no limits |
|---|---|---:|---:|
{rule.join(lines)}
"""


def _compared(on: dict[int, Any], off: dict[int, Any], differences: dict[str, list[float]]) -> str:
    cells = []
    for key, name in (("accuracy", "global"), ("local", "local")):
        seeds = [s for s in on if s in off and None not in (on[s].get(key), off[s].get(key))]
        found = [on[s][key] - off[s][key] for s in seeds]
        differences.setdefault(name, []).extend(found)
        means = [f"{statistics.fmean(side[s][key] for s in seeds):.1%}" if seeds else "" for side in (on, off)]
        cells += [*means, " ".join(f"{100 * d:+.1f}" for d in found)]
    return " | ".join(cells)


def _limited(on: dict[int, Any]) -> str:
    counts = sum((Counter(row.get("limited", {})) for row in on.values()), Counter[str]())
    return " | ".join(f"{counts[k] / max(1, counts['updates']):.1%}" for k in ("shortened", "statistics"))


def _spread(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    span = f" ({min(accuracies):.1%}–{max(accuracies):.1%})" if len(accuracies) > 1 else ""
    return f"{statistics.fmean(accuracies):.1%}{span}"


def main() -> None:
    rows = kept_runs("poisoning", __doc__, cases(), run)
    about = setting("onnxruntime")
    write("poisoning", {"setting": about, "rows": rows}, page(about, rows))


if __name__ == "__main__":
    main()
