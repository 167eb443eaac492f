"""What folding ten updates of a ResNet-18 costs: `python benchmarks/aggregation.py`.

Times are CPU time of one thread. All ways run in turn within each repetition, so that neighbours on the machine hit
them alike; ratios are taken within a repetition. Memory is measured with ten updates and with a hundred (the same ten
over again, where that doesn't take too long). Flower's own functions take part where `flwr` is installed, as in the
environment that `make test` makes for it (with numba installed there, too):
`PYTHONPATH=toolkit build/flower/bin/python benchmarks/aggregation.py`.
"""

from __future__ import annotations

import hashlib
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from synthetic_nets import parameters, resnet18, setting, weights, write

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.fold import Fold
from fedprune.core import tensorfile
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.importance.scoring import random_ranks
from fedprune.strategies.methods.robust import Robust, Robustness
from fedprune.strategies.values import Cut, Report, Scene, Submodel, Turn

CLIENTS = 10
REPEATS = 3
DENSITIES = (1.0, 0.75, 0.5, 0.25)
BLOCK = 65_536

FLEET = 100
LARGE = (
    "plain numpy, float32",
    "Flower `aggregate`",
    "Flower `aggregate_arrayrecords`",
    "fold, whole",
    "fold, mixed widths, one ranking",
    "fold, mixed widths, a ranking per device",
    "robust, mixed widths, one ranking, median",
)
"""Of these, memory is measured with a fleet, too."""

Updates = list[tuple[Selection, Tensors, int]]
Way = tuple[Callable[[Updates], Callable[[], object]], Updates]
"""Makes the call to measure out of updates; and the updates."""


def updates(architecture: Architecture, base: Tensors, densities: tuple[float, ...], order: str) -> Updates:
    out = []
    for k in range(CLIENTS):
        ranks = None if order == "own" else random_ranks(architecture, 0, k if order == "various" else 0)
        selection = Selection.of(architecture, widths_at(architecture, densities[k % len(densities)]), ranks)
        part = {n: v + np.float32(1e-3) for n, v in selection.gather(base).items()}
        out.append((selection, part, 100 + 37 * k))
    return out


def fold(architecture: Architecture, base: Tensors, given: Updates, **options: Any) -> Callable[[], Tensors]:
    def run() -> Tensors:
        sums = Fold(architecture, base, **options)
        for selection, part, weight in given:
            sums.add(selection, part, weight, 10)
        return sums.close()[0]

    return run


def slowly(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same by numpy alone."""

    def without() -> Any:
        kernels = compiled_kernels.kernels()
        compiled_kernels.use({})
        try:
            return run()
        finally:
            compiled_kernels.use(kernels)

    return without


def ends(architecture: Architecture, base: Tensors, given: Updates) -> Callable[[], Tensors]:
    """What a fold costs however many updates there are: sums are made, and closed after one update."""
    return fold(architecture, base, [(Selection.full(architecture), base, 1)])


def masked(architecture: Architecture, base: Tensors, given: Updates) -> Callable[[], Tensors]:
    """Updates of which a random half of every tensor's elements counts."""
    dice = np.random.default_rng(0)
    masks = [
        ElementMask({t.name: dice.random(part[t.name].shape, np.float32) < 0.5 for t in architecture.trainable})
        for _, part, _ in given
    ]

    def run() -> Tensors:
        sums = Fold(architecture, base)
        for (selection, part, weight), mask in zip(given, masks, strict=True):
            sums.add(selection, part, weight, 10, mask=mask)
        return sums.close()[0]

    return run


def moved(architecture: Architecture, base: Tensors, given: Updates) -> Callable[[], Tensors]:
    """Updates of an earlier model, which move the base as they moved that."""
    earlier = [{n: v - np.float32(1e-3) for n, v in part.items()} for _, part, _ in given]

    def run() -> Tensors:
        sums = Fold(architecture, base)
        for (selection, part, weight), sent in zip(given, earlier, strict=True):
            sums.add(selection, part, weight, 10, sent=sent)
        return sums.close()[0]

    return run


def robust(architecture: Architecture, base: Tensors, given: Updates, how: Robustness) -> Callable[[], Tensors]:
    """A round through an aggregator that clips, checks or takes medians; reading updates again costs nothing here."""
    scene = Scene(architecture, 0, 1, base)
    reports = [
        Report(
            Cut(scene, Turn(0, 1, f"d{k}", selection.widths), selection),
            Submodel(selection, part),
            weight,
            10,
            partial(Submodel, selection, part),
        )
        for k, (selection, part, weight) in enumerate(given)
    ]
    aggregator = Robust(Mean(), how)

    def run() -> Tensors:
        sums = aggregator.fold(scene, evidence=False)
        for report in reports:
            aggregator.add(sums, report, report.trained)
        return aggregator.close(sums, scene, 1.0, lambda: ((r, r.trained) for r in reports)).model

    return run


def plain(given: Updates, kind: type[np.floating[Any]]) -> Callable[[], Tensors]:
    """What one writes without thinking: total += weight · value, unchecked, whole models only."""

    def run() -> Tensors:
        total = {n: np.zeros(v.shape, kind) for n, v in given[0][1].items()}
        for _, part, weight in given:
            for name, value in part.items():
                total[name] += value.astype(kind, copy=False) * kind(weight)
        n = kind(sum(w for _, _, w in given))
        return {name: (value / n).astype(np.float32, copy=False) for name, value in total.items()}

    return run


def blocked(given: Updates) -> Callable[[], Tensors]:
    """The same in float32, in blocks that stay in the cache."""

    def run() -> Tensors:
        total = {n: np.zeros(v.shape, np.float32) for n, v in given[0][1].items()}
        scratch = np.empty(BLOCK, np.float32)
        for _, part, weight in given:
            for name, value in part.items():
                flat, into = value.reshape(-1), total[name].reshape(-1)
                for at in range(0, flat.size, BLOCK):
                    source, target = flat[at : at + BLOCK], into[at : at + BLOCK]
                    np.multiply(source, np.float32(weight), out=scratch[: source.size])
                    target += scratch[: source.size]
        n = np.float32(sum(w for _, _, w in given))
        for value in total.values():
            value /= n
        return total

    return run


def flower(given: Updates) -> dict[str, Callable[[], object]]:
    """Flower's two ways, where it is installed."""
    try:
        from flwr.common import ArrayRecord, MetricRecord, RecordDict
        from flwr.server.strategy.aggregate import aggregate
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    except ImportError:
        return {}
    lists = [(list(part.values()), weight) for _, part, weight in given]
    records = [
        RecordDict({"arrays": ArrayRecord(list(part.values())), "metrics": MetricRecord({"n": weight})})
        for _, part, weight in given
    ]
    return {
        "Flower `aggregate`": lambda: aggregate(lists),
        "Flower `aggregate_arrayrecords`": lambda: aggregate_arrayrecords(records, "n"),
    }


def hashing(given: Updates) -> Callable[[], None]:
    """sha256 of the updates' bytes."""
    files = [tensorfile.encode(part) for _, part, _ in given]

    def run() -> None:
        for raw in files:
            hashlib.sha256(raw).digest()

    return run


def reading(given: Updates, folder: Path) -> Callable[[], None]:
    """Reading the updates' files, which the system keeps in memory."""
    paths = []
    for k, (_, part, _) in enumerate(given):
        paths.append(folder / f"{k}-{len(given)}")
        paths[-1].write_bytes(tensorfile.encode(part))

    def run() -> None:
        for path in paths:
            path.read_bytes()

    return run


def peak(run: Callable[[], object]) -> float:
    """Largest extra memory in MB, result included."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main() -> None:
    net = resnet18()
    base = weights(net)
    size = parameters(base)
    whole = updates(net, base, (1.0,), "own")
    mixed, ranked, various = (updates(net, base, DENSITIES, o) for o in ("own", "common", "various"))
    folded, middle = partial(fold, net, base), Robustness(centre="median")
    start = time.perf_counter()
    compiled = compiled_kernels.load()
    about_loops = (
        f"Folds use loops compiled by numba, which took {time.perf_counter() - start:.1f} s, once per process."
        if compiled
        else "numba is not installed: folds are numpy's work."
    )

    def alone(given: Updates) -> Callable[[], object]:
        return slowly(folded(given))

    cases = {
        "fold, whole": whole,
        "fold, mixed widths, own order": mixed,
        "fold, mixed widths, one ranking": ranked,
        "fold, mixed widths, a ranking per device": various,
    }

    def aggregated(how: Robustness) -> Callable[[Updates], Callable[[], object]]:
        return lambda given: robust(net, base, given, how)

    reference = "plain numpy, float32"
    ways_of: dict[str, Callable[[Updates], Callable[[], object]]] = {
        reference: lambda given: plain(given, np.float32),
        **{name: (lambda given, n=name: flower(given)[n]) for name in flower(whole)},  # type: ignore[misc]
        "fold, whole": folded,
    }
    with TemporaryDirectory() as folder:
        ways: dict[str, Way] = {
            "sha256 of the updates' bytes, for comparison": (hashing, whole),
            "reading the updates' files, for comparison": (lambda given: reading(given, Path(folder)), whole),
            reference: (lambda given: plain(given, np.float32), whole),
            "plain numpy, float64": (lambda given: plain(given, np.float64), whole),
            "plain numpy, float32, blocked": (blocked, whole),
            **{name: (lambda given, n=name: flower(given)[n], whole) for name in flower(whole)},  # type: ignore[misc]
            **{name: (folded, given) for name, given in cases.items()},
            "fold, no update but one: the share of its ends": (partial(ends, net, base), whole),
            **({n.replace("fold", "fold by numpy alone"): (alone, g) for n, g in cases.items()} if compiled else {}),
            **{f"{name}, {FLEET} updates": (ways_of[name], whole * (FLEET // CLIENTS)) for name in ways_of},
            "fold, whole, evidence": (partial(folded, evidence=True), whole),
            "fold, mixed widths, one ranking, fill": (partial(folded, rule="fill"), ranked),
            "fold, whole, masks of elements": (partial(masked, net, base), whole),
            "fold, whole, moves of earlier models": (partial(moved, net, base), whole),
            "robust, whole, clipped": (aggregated(Robustness(clip=1e-6)), whole),
            "robust, whole, checked by norm and cosine": (aggregated(Robustness(check="both")), whole),
            "robust, whole, median": (aggregated(middle), whole),
            "robust, whole, trimmed mean": (aggregated(Robustness(centre="trimmed", trim=0.2)), whole),
            "robust, mixed widths, one ranking, median": (aggregated(middle), ranked),
        }
        runs = {name: make(given) for name, (make, given) in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(REPEATS + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                if repeat:
                    times[name].append(time.process_time() - start)
        rows = []
        for name, (make, given) in ways.items():
            seconds = statistics.median(times[name])
            received = sum(parameters(part) for _, part, _ in given)
            compared = name.endswith("comparison")
            rows.append(
                {
                    "way": name,
                    "ms": seconds * 1e3,
                    "ns_per_parameter_and_client": seconds * 1e9 / size / len(given),
                    "ns_per_received_parameter": seconds * 1e9 / received,
                    "to_plain": statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))
                    * CLIENTS
                    / len(given),
                    "peak_mb": None if compared else peak(runs[name]),
                    "peak_mb_of_fleet": peak(make(given * (FLEET // CLIENTS))) if name in LARGE else None,
                }
            )
    about = setting("flwr", "numba")
    lines = [
        "# Aggregation",
        "",
        (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores (load {about['load']} from neighbours), "
            f"Python {about['python']}, numpy {about['numpy']}, "
            f"numba {about['numba']}, flwr {about['flwr']}. `OMP_NUM_THREADS=1 python benchmarks/aggregation.py`"
        ),
        "",
        (
            f"{CLIENTS} updates of a ResNet-18 ({size / 1e6:.1f} M float32 numbers, {size * 4 / 1e6:.0f} MB), from "
            f"updates to next model; mixed widths: {', '.join(f'{d:g}' for d in DENSITIES)} in turn. CPU time, medians "
            f"of {REPEATS} interleaved runs; *×plain* is the median ratio within a run. A fold checks every update "
            "(names, shapes, finite, in range) before it adds, and its bits don't depend on the order; the others do "
            f"neither. {about_loops} Reading files and hashing them are shown beside, and not counted. Memory includes "
            f"the result, but not the updates; the last column is with {FLEET} of them, where it was measured."
        ),
        "",
        f"| way | ms | ns per parameter and client | ns per received parameter | ×plain | extra MB | with {FLEET} |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['way']} | {r['ms']:.0f} | {r['ns_per_parameter_and_client']:.2f} "
        f"| {r['ns_per_received_parameter']:.2f} | {r['to_plain']:.2f} "
        f"| {_megabytes(r['peak_mb'])} | {_megabytes(r['peak_mb_of_fleet'])} |"
        for r in rows
    ]
    body = {"setting": about, "parameters": size, "clients": CLIENTS, "rows": rows}
    write("aggregation", body, "\n".join(lines) + "\n")


def _megabytes(value: Any) -> str:
    return "" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    main()
