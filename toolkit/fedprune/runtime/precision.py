"""Models at lower precision: their names, their files, and how their tensors are made from float32 weights.

Whatever is done to weights is in the graphs that travel with a model. What runs them, on a board as in an export, knows
of neither norms nor quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ModelError, shown
from fedprune.model.step_contract import X
from fedprune.runtime.precision_files import (
    INT8,
    calibrate_file,
    graphs_of,
    prepare_file,
    weights_file,
)
from fedprune.runtime.session import Session

Array = npt.NDArray[Any]

RANGES = "~ranges"
"""What calibration gives and preparation takes: least and largest number of every activation, float32 [n, 2]."""

CALIBRATION_SAMPLES = 256
"""Samples that ranges are measured on."""

_AT_ONCE = 32


def measured_ranges(calibrate: Session, x: Array) -> Array:
    """Ranges of activations, float32 [activations, 2]: the mean over batches of the least and the largest numbers.

    `x` are samples [n, ...], of which at most `CALIBRATION_SAMPLES` are used. Raises `ModelError` if there are none,
    the graph can't be run, or an activation isn't finite.
    """
    x = x[:CALIBRATION_SAMPLES]
    if not len(x):
        raise ModelError("ranges of activations can't be measured without samples")
    parts = np.array_split(x, -(-len(x) // _AT_ONCE))
    found = [checked_ranges(calibrate.run({X: p}, [RANGES])[RANGES]) for p in parts]
    if any(f.shape != found[0].shape for f in found):
        raise ModelError("ranges of activations", expected="as many for every batch")
    return np.asarray(np.mean(found, axis=0, dtype=np.float64), np.float32)


def checked_ranges(ranges: Array) -> Array:
    """Ranges that a model can be prepared with. Raises `ModelError` if they are not float32 [n, 2], not finite, or
    upside down."""
    if ranges.dtype != np.float32 or ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ModelError("ranges of activations", expected="float32 [n, 2]", got=f"{ranges.dtype} {ranges.shape}")
    if not np.isfinite(ranges).all() or (ranges[:, 0] > ranges[:, 1]).any():
        raise ModelError("ranges of activations", expected="finite numbers, the least first")
    return ranges


def prepare(graph: Session, tensors: Mapping[str, Array], ranges: Array | None = None) -> dict[str, Array]:
    """The tensors of a lowered model, in the order of its file; `ranges` are among them where there are any.

    Args:
        graph: Its prepare graph.
        tensors: Float32 weights by name; more than it needs may be there.
        ranges: Ranges of activations, where it takes some.

    Raises:
        ModelError: A weight is missing or of another shape, the ranges don't fit, or what comes out isn't finite.
    """
    feeds = {n: tensors[n] for n in graph.inputs if n in tensors}
    if RANGES in graph.inputs:
        if ranges is None:
            raise ModelError("this precision needs ranges of activations", expected=f"the tensor {RANGES}")
        feeds[RANGES] = checked_ranges(ranges)
    missing = sorted(graph.inputs.keys() - feeds.keys())
    if missing:
        raise ModelError("a lowered model can't be prepared: weights are missing", got=", ".join(missing[:5]))
    made = graph.run(feeds)
    for name, value in made.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelError(f"tensor {name} of the lowered model is not finite")
    return {n: np.asarray(v) for n, v in made.items()} | ({} if ranges is None else {RANGES: feeds[RANGES]})


def packed(graphs: Mapping[str, bytes]) -> bytes:
    """The graphs of a precision as one file, in which they travel to a board: bytes by name, as a tensor file."""
    return tensorfile.encode({n: np.frombuffer(raw, np.uint8) for n, raw in graphs.items()})


def unpacked(raw: bytes, precision: str) -> dict[str, bytes]:
    """The graphs of a precision by file name, as `packed` wrote them. Raises `BundleError` if the file is damaged,
    or holds other graphs."""
    found = tensorfile.decode(raw)
    if found.keys() != set(graphs_of(precision)) or any(v.dtype != np.uint8 for v in found.values()):
        raise BundleError(f"graphs of {precision}", expected=", ".join(graphs_of(precision)), got=shown(sorted(found)))
    return {n: v.tobytes() for n, v in found.items()}


def lowered_weights(folder: Path, precision: str, tensors: Mapping[str, Array], x: Array | None = None) -> bytes:
    """The weights file of a lowered model, made of float32 weights by the graphs in a folder.

    Args:
        folder: Where `files_of` are, and the float32 weights that ranges are measured with.
        precision: One of `PRECISIONS`.
        x: Samples to measure ranges on; without any, those of the weights file that is there are kept.

    Raises:
        ModelError: As `prepare`; a graph can't be loaded or run; or there are neither samples nor ranges.
        BundleError: There are no samples, and the weights file that is there is damaged.
    """
    ranges = None
    if precision == INT8 and x is not None and len(x):
        ranges = measured_ranges(Session(folder / calibrate_file(precision)), x)
    elif precision == INT8:
        ranges = tensorfile.load(folder / weights_file(precision)).get(RANGES)
    return tensorfile.encode(prepare(Session(folder / prepare_file(precision)), tensors, ranges))
