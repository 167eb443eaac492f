"""Makes the tensors of a model at lower precision from float32 weights.

The graphs that travel with a model do everything to its weights. The code that runs them, on a board as in an export,
knows neither norms nor quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ModelError, value_text
from fedprune.model.step_contract import X
from fedprune.runtime.precision_files import INT8, calibrate_file, precision_graphs, prepare_file, weights_file
from fedprune.runtime.session import OnnxSession

Array = npt.NDArray[Any]

# Output of the calibrate graph and input of the prepare graph: least and largest value of each activation, float32 [n,
# 2].
RANGES = "~ranges"

# Samples on which ranges are measured: their mean over batches hardly changes with more, and a board waits for it.
CALIBRATION_SAMPLES = 256

# Samples of a batch: ranges are means over batches, so that one outlier doesn't stretch the scale of all.
_BATCH_SIZE = 32


def measure_ranges(calibrate: OnnxSession, x: Array) -> Array:
    """Ranges of activations, float32 [activations, 2]: the mean over batches of the least and the largest numbers. Of
    the samples `x` [n, ...] at most `CALIBRATION_SAMPLES` are used. Raises `ModelError` if there are none, the graph
    can't be run, or an activation isn't finite."""
    x = x[:CALIBRATION_SAMPLES]
    if not len(x):
        raise ModelError("ranges of activations can't be measured without samples")
    batches = np.array_split(x, -(-len(x) // _BATCH_SIZE))
    batch_ranges = [check_ranges(calibrate.run({X: batch}, [RANGES])[RANGES]) for batch in batches]
    if any(ranges.shape != batch_ranges[0].shape for ranges in batch_ranges):
        raise ModelError("ranges of activations", expected="as many for every batch")
    return np.asarray(np.mean(batch_ranges, axis=0, dtype=np.float64), np.float32)


def check_ranges(ranges: Array) -> Array:
    """Ranges that a model can be prepared with. Raises `ModelError` if they are not float32 [n, 2], not finite, or
    upside down."""
    if ranges.dtype != np.float32 or ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ModelError("ranges of activations", expected="float32 [n, 2]", got=f"{ranges.dtype} {ranges.shape}")
    if not np.isfinite(ranges).all() or (ranges[:, 0] > ranges[:, 1]).any():
        raise ModelError("ranges of activations", expected="finite numbers, the least first")
    return ranges


def prepare_tensors(graph: OnnxSession, tensors: Mapping[str, Array], ranges: Array | None = None) -> dict[str, Array]:
    """The tensors of a model at lower precision, in the order of its file, with `ranges` of activations if the graph
    takes them. The prepare graph takes those float32 weights that it needs. Raises `ModelError` if a weight is missing
    or of another shape, the ranges don't fit, or a result isn't finite."""
    feeds = {n: tensors[n] for n in graph.inputs if n in tensors}
    if RANGES in graph.inputs:
        if ranges is None:
            raise ModelError("this precision needs ranges of activations", expected=f"the tensor {RANGES}")
        feeds[RANGES] = check_ranges(ranges)
    missing = sorted(graph.inputs.keys() - feeds.keys())
    if missing:
        raise ModelError("a lowered model can't be prepared: weights are missing", got=", ".join(missing[:5]))
    prepared = graph.run(feeds)
    for name, value in prepared.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelError(f"tensor {name} of the lowered model is not finite")
    return {n: np.asarray(v) for n, v in prepared.items()} | ({} if ranges is None else {RANGES: feeds[RANGES]})


def pack_graphs(graphs: Mapping[str, bytes]) -> bytes:
    """Pack the graphs of a precision into the tensor file in which they travel to a board."""
    return tensorfile.encode({n: np.frombuffer(raw, np.uint8) for n, raw in graphs.items()})


def unpack_graphs(raw: bytes, precision: str) -> dict[str, bytes]:
    """Unpack the graphs of a precision, by file name, from a file that `pack_graphs` wrote. Raises `BundleError` if the
    file is damaged, or holds other graphs."""
    graphs = tensorfile.decode(raw)
    if graphs.keys() != set(precision_graphs(precision)) or any(v.dtype != np.uint8 for v in graphs.values()):
        raise BundleError(
            f"graphs of {precision}", expected=", ".join(precision_graphs(precision)), got=value_text(sorted(graphs))
        )
    return {n: v.tobytes() for n, v in graphs.items()}


def lowered_weights(folder: Path, precision: str, tensors: Mapping[str, Array], x: Array | None = None) -> bytes:
    """The weights file of a lowered model, made of float32 weights by the graphs in a folder.

    The folder has `files_of` the precision, and the float32 weights with which ranges are measured on samples `x`.
    Without samples, the ranges of the weights file that is there are kept. Raises `ModelError` as `prepare_tensors`, or
    if a graph can't be loaded or run or there are neither samples nor ranges; `BundleError` if there are no samples and
    the weights file is damaged.
    """
    ranges = None
    if precision == INT8 and x is not None and len(x):
        ranges = measure_ranges(OnnxSession(folder / calibrate_file(precision)), x)
    elif precision == INT8:
        ranges = tensorfile.load_tensors(folder / weights_file(precision)).get(RANGES)
    return tensorfile.encode(prepare_tensors(OnnxSession(folder / prepare_file(precision)), tensors, ranges))
