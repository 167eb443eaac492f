"""What folding ten updates of a ResNet-18 costs: `OMP_NUM_THREADS=1 python -m benchmarks.aggregation`.

Times are CPU time of one thread; all ways run in turn. Flower's own functions take part where `flwr` is installed:
`PYTHONPATH=toolkit build/flower/bin/python -m benchmarks.aggregation`.
"""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import in_turns, parser, ratio, save, setting
from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.fold import Fold
from fedprune.model.architecture import (
    Architecture,
    Axis,
    ChannelGroup,
    LayerRow,
    Segment,
    TensorKind,
    TensorSpec,
    widths_at,
)
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.importance.scoring import random_ranks

CLIENTS, FLEET, REPEATS = 10, 100, 3
DENSITIES = (1.0, 0.75, 0.5, 0.25)
REFERENCE = "plain numpy, float32"

Updates = list[tuple[Selection, Tensors, int]]
Way = tuple[Callable[[Updates], Callable[[], object]], Updates]
"""Makes the call to measure out of updates; and the updates."""


def resnet18() -> Architecture:
    """ResNet-18 without a model file: one group per residual stream, one inside every block."""
    groups: list[ChannelGroup] = []
    tensors: list[TensorSpec] = []
    layers: list[LayerRow] = []

    def group(size: int) -> Axis:
        groups.append(ChannelGroup(f"group{len(groups)}", size))
        return Axis((Segment(len(groups) - 1, 0, size),))

    def layer(operator: str, name: str, *axes: Axis) -> None:
        tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, axes))
        vectors = list(TensorKind)[2:] if operator == "Conv" else [TensorKind.BIAS]
        tensors.extend(TensorSpec(f"{name}.{kind.value}", kind, axes[:1]) for kind in vectors)
        layers.append(LayerRow(name, operator, f"{name}.weight", 1))

    def conv(name: str, out: Axis, into: Axis, kernel: int) -> None:
        layer("Conv", name, out, into, Axis.fixed(kernel), Axis.fixed(kernel))

    stream = group(64)
    conv("stem", stream, Axis.fixed(3), 7)
    for stage, width in enumerate((64, 128, 256, 512)):
        before, stream = stream, group(width) if stage else stream
        for block in range(2):
            name, inner = f"stage{stage}.{block}", group(width)
            conv(f"{name}.conv1", inner, before, 3)
            conv(f"{name}.conv2", stream, inner, 3)
            if before is not stream:
                conv(f"{name}.shortcut", stream, before, 1)
            before = stream
    layer("Gemm", "fc", Axis.fixed(1000), stream)
    return Architecture("resnet18", tuple(groups), tuple(tensors), tuple(layers), (), (3, 32, 32), (1000,))


NET = resnet18()
_RANDOM = np.random.default_rng(0)
BASE = {t.name: np.abs(_RANDOM.standard_normal(t.shape, np.float32) * np.float32(0.05)) for t in NET.tensors}
"""Small normal numbers, as trained weights are."""

SIZE = sum(value.size for value in BASE.values())


def updates(densities: tuple[float, ...], order: str) -> Updates:
    """Updates of clients; the channels' order is the model's `own`, `common` to all, or `various`."""
    made = []
    for k in range(CLIENTS):
        ranks = None if order == "own" else random_ranks(NET, 0, k if order == "various" else 0)
        selection = Selection.of(NET, widths_at(NET, densities[k % len(densities)]), ranks)
        made.append((selection, {n: v + np.float32(1e-3) for n, v in selection.gather(BASE).items()}, 100 + 37 * k))
    return made


def folding(given: Updates, **options: Any) -> Callable[[], Tensors]:
    """Our fold."""

    def run() -> Tensors:
        sums = Fold(NET, BASE, **options)
        for selection, part, weight in given:
            sums.add(selection, part, weight, 10)
        return sums.close()[0]

    return run


def by_numpy_alone(given: Updates) -> Callable[[], Any]:
    run = folding(given)

    def without() -> Any:
        kernels = compiled_kernels.current_kernels()
        compiled_kernels.use_kernels({})
        try:
            return run()
        finally:
            compiled_kernels.use_kernels(kernels)

    return without


def plain(given: Updates) -> Callable[[], Tensors]:
    """What one writes without thinking: total += weight · value, unchecked, whole models only."""

    def run() -> Tensors:
        total = {n: np.zeros(v.shape, np.float32) for n, v in given[0][1].items()}
        for _, part, weight in given:
            for name, value in part.items():
                total[name] += value * np.float32(weight)
        count = np.float32(sum(weight for _, _, weight in given))
        return {name: value / count for name, value in total.items()}

    return run


def flower_ways(given: Updates) -> dict[str, Callable[[], object]]:
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


def peak_mb(run: Callable[[], object]) -> float:
    """Largest extra memory, result included."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main() -> None:
    options = parser(__doc__).parse_args()
    whole, ranked = updates((1.0,), "own"), updates(DENSITIES, "common")
    compiled_kernels.load_kernels()
    folds = {
        "whole": whole,
        "mixed widths, own order": updates(DENSITIES, "own"),
        "mixed widths, one ranking": ranked,
        "mixed widths, a ranking per device": updates(DENSITIES, "various"),
    }
    whole_models: dict[str, Callable[[Updates], Callable[[], object]]] = {
        REFERENCE: plain,
        **{name: (lambda given, name=name: flower_ways(given)[name]) for name in flower_ways(whole)},  # type: ignore[misc]
        "fold, whole": folding,
    }
    ways: dict[str, Way] = {
        **{name: (make, whole) for name, make in whole_models.items()},
        **{f"fold, {name}": (folding, given) for name, given in folds.items()},
        **{f"fold by numpy alone, {name}": (by_numpy_alone, given) for name, given in folds.items()},
        **{f"{name}, {FLEET} updates": (make, whole * (FLEET // CLIENTS)) for name, make in whole_models.items()},
        "fold, whole, evidence": (partial(folding, evidence=True), whole),
        "fold, mixed widths, one ranking, fill": (partial(folding, rule="fill"), ranked),
    }
    runs = {name: make(given) for name, (make, given) in ways.items()}
    seconds = in_turns(runs, REPEATS)
    rows = []
    for name, (_, given) in ways.items():
        middle = statistics.median(seconds[name])
        received = sum(value.size for _, part, _ in given for value in part.values())
        rows.append(
            {
                "way": name,
                "ms": middle * 1e3,
                "ns_per_parameter_and_client": middle * 1e9 / SIZE / len(given),
                "ns_per_received_parameter": middle * 1e9 / received,
                "to_plain": ratio(seconds[name], seconds[REFERENCE]) * CLIENTS / len(given),
                "peak_mb": peak_mb(runs[name]),
            }
        )
    body = {"setting": setting("flwr", "numba"), "parameters": SIZE, "clients": CLIENTS, "rows": rows}
    save(options.out or "aggregation", body)


if __name__ == "__main__":
    main()
