"""What poisoned updates do to the model: hostile boards among ten, with the default limits and without any.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py attacks
    FEDPRUNE_DATA=DIR OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py honest

`attacks` plays the attacks on the demo's digits, `honest` measures what the limits cost the fleets of the accuracy
tables. Simulated boards train honestly; the hostile ones then change what they hand in. Runs that the JSON among the
results has already are not repeated; `--anew` forgets them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from kept_runs import kept_runs
from synthetic_nets import setting, write

from benchmarks.accuracy.protocol import Method, Protocol
from benchmarks.accuracy.protocols import CIFAR, EIGHT, PROTOCOLS
from benchmarks.accuracy.run import UNLIMITED, experiment_of, rounds_of
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import Outcome, StoredData, VirtualDevice
from fedprune_server.simulation.results.run_folder import simulate

ATTACKS, HONEST = "attacks", "honest"

SEEDS = (0, 1)

STRATEGIES = ("fedavg", "fedprune")

ROUNDS = 8
SAMPLES = 4000
"""The short form of a table's protocol. Everything else is the table's: partition, net, boards, local training."""

SHORT = {"cifar10-partial": 20, "fedobp-q": 20, "autoflip-clean": 16, "pr-fl-time": 40}
"""Rounds of protocols in which a part of the boards trains in each."""

TABLE_NAMES = tuple(protocol.name for protocol in EIGHT)
"""Those of the accuracy tables."""

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

BOARDS = 10

EDGE = 7.9
"""Largest weight that the numeric check lets through while the model's own are small."""

STATISTIC = 1e6
"""A batch-norm statistic that the numeric check lets through."""

BOAST = 1000

FAR = {"flip": 8.0, "reverse": 12.0}
"""An attack's length in honest ones: longer than the limits allow, and too short to be rejected. A mean is shorter than
what it is made of."""

NONE = "none"

KINDS = {
    NONE: "no board is hostile",
    "x100": "100 times its own change, as far as the numeric check allows",
    "bound": f"every weight {EDGE}, every statistic {STATISTIC:g}",
    "flip": "its own change with the sign reversed",
    "flip, boasting": f"{FAR['flip']:g} times that, of boards that claim {BOAST:,} times their samples and steps",
    "reverse, boasting": f"the same, with {FAR['reverse']:g} times the honest boards' mean change, which they know",
}


@dataclass(frozen=True)
class Case:
    """A run; `data` is `digits` or the name of a table's protocol."""

    data: str
    strategy: str
    limits: bool
    attack: str
    hostile: int
    seed: int


def cases(part: str) -> Iterator[Case]:
    """The runs of a part; without limits, attacks are played once."""
    if part == ATTACKS:
        yield from _attacks()
        return
    tables = [(table, strategy) for table in TABLE_NAMES for strategy in STRATEGIES]
    for seed, runs in ((0, [*tables, *PAPERS.items()]), (1, tables)):
        for data, strategy in runs:
            for limits in (True, False):
                yield Case(data, strategy, limits, NONE, 0, seed)


def _attacks() -> Iterator[Case]:
    for limits in (True, False):
        for seed in SEEDS:
            yield Case("digits", "fedavg", limits, NONE, 0, seed)
    for attack, counts in (
        ("reverse, boasting", (1, 2, 3)),
        ("flip, boasting", (1, 2, 3)),
        ("flip", (2,)),
        ("x100", (2,)),
        ("bound", (2,)),
    ):
        for hostile in counts:
            yield Case("digits", "fedavg", True, attack, hostile, SEEDS[0])
    yield Case("digits", "fedavg", False, "reverse, boasting", 1, SEEDS[0])
    for hostile in (0, 1, 2):
        attack = "reverse, boasting" if hostile else NONE
        yield Case("digits", "fedprune", True, attack, hostile, SEEDS[0])


def method_of(case: Case) -> Method:
    """The row of the case's table; of the first table where it has none."""
    rows = [m for m in PROTOCOLS[case.data].methods if m.name == case.strategy]
    return replace(rows[0] if rows else CIFAR.method(case.strategy), recipe={})


def short(table: Protocol) -> Protocol:
    """The short form of a table's protocol."""
    rounds = SHORT.get(table.name, ROUNDS)
    recipe = replace(table.recipe, evaluate_every=rounds // 2)
    data = {**table.data, "most": SAMPLES}
    return replace(table, data=data, rounds=rounds, recipe=recipe, submodels=False, every_global=1, every_s=0.0)


def experiment(case: Case) -> Experiment:
    """Honest boards and data."""
    limits: dict[str, Any] = {} if case.limits else dict(UNLIMITED)
    if case.data != "digits":
        what = experiment_of(short(PROTOCOLS[case.data]), method_of(case), case.seed)
        own = {"move_limit": Job.move_limit, "weight_limit": Job.weight_limit} if case.limits else UNLIMITED
        return replace(what, job=replace(what.job, **own))
    names = [f"board-{i}" for i in range(BOARDS)]
    data = deal(names, seed=case.seed)
    recipe = Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9)
    limits |= {"compression": "none"}  # hostile boards read and write plain updates
    job = Job("poisoning", case.seed, 12, BOARDS, deadline_s=1e7, strategy=case.strategy, recipe=recipe, **limits)
    boards = [VirtualDevice(n, find("raspberry-pi-5"), data.devices[n]) for n in names]
    model = import_onnx(digits_model(), "digits-net")
    return Experiment("poisoning", job, model, boards, (data.x, data.y), data.calibration)


@dataclass
class Attack:
    """What hostile boards hand in. They train last in a round, and know what the others have handed in."""

    architecture: Architecture
    kind: str
    honest: dict[str, list[dict[str, npt.NDArray[np.float64]]]] = field(default_factory=dict)

    def watch(self, outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> Outcome:
        """Note an honest board's change, by the offered ranking, which is another one in each round."""
        self.honest.setdefault(self._key(offer), []).append(self._changes(outcome, offer, store)[1])
        return outcome

    def spoil(self, outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> Outcome:
        sent, own = self._changes(outcome, offer, store)
        tensors = tensorfile.decode(store.read(outcome.weights.sha256))
        known = self.honest.get(self._key(offer), [])
        same = [d for d in known if all(d[n].shape == own[n].shape for n in own)] if "reverse" in self.kind else []
        change = {n: np.mean([d[n] for d in same], axis=0) for n in own} if same else own
        times = {"x100": 100.0, "flip": -1.0}.get(self.kind, -FAR.get(self.kind.partition(",")[0], 1.0))
        out = {}
        for name, value in tensors.items():
            if self.kind == "bound":
                trainable = self.architecture.by_name[name].kind.trainable
                out[name] = np.full_like(value, EDGE if trainable else STATISTIC)
            elif name in change:
                out[name] = np.clip(sent[name] + times * change[name], -EDGE, EDGE).astype(np.float32)
            else:
                out[name] = np.array(value)
        steps = BOAST * outcome.steps if "boasting" in self.kind else outcome.steps
        return replace(outcome, weights=store.put(tensorfile.encode(out)), steps=steps)

    def _key(self, offer: Mapping[str, Any]) -> str:
        return str(offer["weights"]["sha256"])

    def _changes(self, outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> tuple[Any, Any]:
        """What was sent, and by trained tensor the change."""
        sent = tensorfile.decode(store.read(offer["weights"]["sha256"]))
        got = tensorfile.decode(store.read(outcome.weights.sha256))
        trained = [name for name in got if self.architecture.by_name[name].kind.trainable]
        return sent, {name: got[name].astype(np.float64) - sent[name] for name in trained}


def attacked(what: Experiment, case: Case) -> Experiment:
    """The experiment with its last boards hostile."""
    attack = Attack(what.model.architecture, case.attack)
    ordered = sorted(what.devices, key=lambda device: device.name)
    edge = len(ordered) - case.hostile
    honest = [replace(device, tamper=attack.watch) for device in ordered[:edge]]
    hostile = [replace(device, tamper=attack.spoil) for device in ordered[edge:]]
    if "boasting" in case.attack:
        hostile = [boasting(device) for device in hostile]
    return replace(what, devices=(*honest, *hostile))


def boasting(device: VirtualDevice) -> VirtualDevice:
    """A board that claims more samples than it has."""
    known = StoredData.of(device.load)
    return replace(device, data=replace(known, samples=BOAST * known.samples))


def run(case: Case) -> dict[str, Any]:
    """Accuracy of the global model."""
    what = experiment(case)
    if case.hostile:
        what = attacked(what, case)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = simulate(what, Path(folder))
    accuracies = [row.accuracy if case.data == "digits" else row.measured["global"] for row in record.rounds]
    serves = "after" if case.data == "digits" else method_of(case).serves
    limited, updates = record.count_limited
    return {
        **asdict(case),
        "accuracy": statistics.fmean(a or 0.0 for a in accuracies[-LAST:]),
        "local": rounds_of(record)[-1]["own"].get(f"accuracy_{serves}", {}).get("mean"),
        "limited": limited / max(1, updates),
        "accuracies": accuracies,
        "seconds": round(time.perf_counter() - began, 1),
    }


def heading(title: str, about: dict[str, Any], part: str) -> str:
    return f"""# {title}

{about["date"]}, {about["cpu"]}, Python {about["python"]}, onnxruntime {about["onnxruntime"]}.
`OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/poisoning.py {part}`
"""


def attacks_page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    by_case: dict[tuple[str, bool, str, int], list[float]] = {}
    for row in rows:
        by_case.setdefault((row["strategy"], row["limits"], row["attack"], row["hostile"]), []).append(row["accuracy"])
    keys = dict.fromkeys((strategy, attack, hostile) for strategy, _, attack, hostile in by_case)
    lines = "\n".join(
        f"| {strategy} | {attack} | {hostile or ''} | "
        + " | ".join(_spread(by_case.get((strategy, limits, attack, hostile), [])) for limits in (True, False))
        + " |"
        for strategy, attack, hostile in sorted(keys)
    )
    kinds = "\n".join(f"- {name}: {what}." for name, what in KINDS.items())
    return f"""{heading("Poisoned updates", about, ATTACKS)}
Simulated fleets of {BOARDS} boards with the default limits on updates and without any: the demo's digits and network,
Dirichlet .5, 12 rounds. *Global* is the accuracy of the global model, the mean of the last {LAST} rounds; with several
seeds the lowest and the highest are in brackets. The same boards are hostile in every round:

{kinds}

| strategy | attack | hostile boards | global, default limits | no limits |
|---|---|---:|---:|---:|
{lines}
"""


def honest_page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    differences: dict[str, list[float]] = {}
    lines = []
    for data, strategy in dict.fromkeys((row["data"], row["strategy"]) for row in rows):
        on, off = (
            {r["seed"]: r for r in rows if (r["data"], r["strategy"], r["limits"]) == (data, strategy, limits)}
            for limits in (True, False)
        )
        if on and off:
            limited = statistics.fmean(row["limited"] for row in on.values())
            lines.append(f"| {data} | {strategy} | {_compared(on, off, differences)} | {limited:.1%} |")
    means = "; ".join(
        f"{key}: {100 * statistics.fmean(d):+.2f} ± {100 * statistics.stdev(d) / len(d) ** 0.5:.2f}"
        for key, d in differences.items()
        if len(d) > 1
    )
    others = ", ".join(f"`{table}` {rounds}" for table, rounds in SHORT.items())
    table = "\n".join(lines)
    return f"""{heading("What the limits on updates cost honest fleets", about, f"{HONEST}, with FEDPRUNE_DATA=DIR")}
The protocols of the accuracy tables in a short form: {SAMPLES:,} samples and {ROUNDS} rounds ({others}).
Partition, net, boards and local training are the tables'. The papers' own protocols follow, each with the paper's
method. Δ is, seed by seed, by how many points a run with limits is better than the same run without; *limited* is the
share of updates of which less counts than was sent, by however little.

| protocol | method | global | without | Δ | local | without | Δ | limited |
|---|---|---:|---:|---:|---:|---:|---:|---:|
{table}

Mean Δ over all runs with its standard error, in points: {means}.
"""


def _compared(on: dict[int, Any], off: dict[int, Any], differences: dict[str, list[float]]) -> str:
    cells = []
    for key, name in (("accuracy", "global"), ("local", "local")):
        seeds = [s for s in on if s in off and None not in (on[s].get(key), off[s].get(key))]
        deltas = [on[s][key] - off[s][key] for s in seeds]
        differences.setdefault(name, []).extend(deltas)
        means = [f"{statistics.fmean(side[s][key] for s in seeds):.1%}" if seeds else "" for side in (on, off)]
        cells += [*means, " ".join(f"{100 * d:+.1f}" for d in deltas)]
    return " | ".join(cells)


def _spread(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    span = f" ({min(accuracies):.1%}–{max(accuracies):.1%})" if len(accuracies) > 1 else ""
    return f"{statistics.fmean(accuracies):.1%}{span}"


def main() -> None:
    part = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in (ATTACKS, HONEST) else ATTACKS
    name = "poisoning" if part == ATTACKS else "limits_on_honest_fleets"
    rows = kept_runs(name, __doc__, cases(part), run)
    about = setting("onnxruntime")
    write(name, {"setting": about, "rows": rows}, (attacks_page if part == ATTACKS else honest_page)(about, rows))


if __name__ == "__main__":
    main()
