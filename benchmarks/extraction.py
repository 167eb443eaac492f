"""How long cutting a submodel out of the global model and putting it back takes: `python benchmarks/extraction.py`.

Each measurement is interleaved with a plain numpy copy: of as many bytes as the submodel has beside extraction, of
the whole model beside reconstruction (which returns a new model, so it can't be faster).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from synthetic_nets import parameters, resnet18, setting, vgg11, weights, write

from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.importance.scoring import random_ranks

REPEATS = 15


def copy(tensors: Tensors) -> Tensors:
    return {n: v.copy() for n, v in tensors.items()}


def clock(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def compare(action: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of an action, and the median of its ratios to a plain copy run right before it."""
    action()
    plain()
    pairs = [(clock(plain), clock(action)) for _ in range(REPEATS)]
    return statistics.median(a for _, a in pairs), statistics.median(a / p for p, a in pairs)


def measure(architecture: Architecture, density: float, order: str) -> dict[str, Any]:
    full = weights(architecture)
    ranks = None if order == "own" else random_ranks(architecture, 0, 0)
    selection = Selection.of(architecture, widths_at(architecture, density), ranks)
    start = time.process_time()
    part = selection.gather(full)  # the first call also makes the maps
    first = time.process_time() - start
    size = sum(v.nbytes for v in part.values())
    gather, gather_ratio = compare(lambda: selection.gather(full), lambda: copy(part))
    scatter, scatter_ratio = compare(lambda: selection.scatter(part, full), lambda: copy(full))
    again = selection.scatter(part, full)
    assert all(np.array_equal(again[n], full[n]) for n in full)
    return {
        "net": architecture.name,
        "density": density,
        "ranks": order,
        "parameters": parameters(full),
        "kept": parameters(part),
        "first_ms": first * 1e3,
        "gather_ms": gather * 1e3,
        "gather_gb_per_s": size / gather / 1e9,
        "gather_to_copy": gather_ratio,
        "scatter_ms": scatter * 1e3,
        "scatter_to_copy": scatter_ratio,
    }


def main() -> None:
    rows = [
        measure(net, density, order)
        for net in (resnet18(), vgg11())
        for density in (1.0, 0.5, 0.25)
        for order in ("own", "random")
    ]
    about = setting()
    lines = [
        "# Extraction and reconstruction",
        "",
        (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores (one used; load {about['load']} from others), "
            f"Python {about['python']}, numpy {about['numpy']}. `python benchmarks/extraction.py`"
        ),
        "",
        (
            f"CPU time, medians of {REPEATS}. *gather*: cut a device's submodel out of the global model; GB/s counts "
            "its bytes once. *×copy*: against a numpy copy of as many bytes in the same loop. *scatter*: put it back "
            "into a new copy of the global model; *×copy* against copying that. *first*: before the index maps exist."
        ),
        "",
        "| net | density | ranks | kept / all (M) | first ms | gather ms | GB/s | ×copy | scatter ms | ×copy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['net']} | {r['density']:g} | {r['ranks']} | {r['kept'] / 1e6:.2f} / {r['parameters'] / 1e6:.2f} "
        f"| {r['first_ms']:.1f} | {r['gather_ms']:.1f} | {r['gather_gb_per_s']:.1f} | {r['gather_to_copy']:.2f} "
        f"| {r['scatter_ms']:.1f} | {r['scatter_to_copy']:.2f} |"
        for r in rows
    ]
    write("extraction", {"setting": about, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
