"""Models at lower precision: how their tensors are made from float32 weights, and the rule that lets them serve.

The graphs that travel with a model do everything to its weights. The code that runs them, on a board as in an export,
knows neither norms nor quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ModelError, value_text
from fedprune.core.text import quantity
from fedprune.model.features import JUDGED_LABELS, labels_of
from fedprune.model.step_contract import X
from fedprune.runtime.precision_files import (
    INT8,
    calibrate_file,
    precision_graphs,
    prepare_file,
    weights_file,
)
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
    """Ranges of activations, float32 [activations, 2]: the mean over batches of the least and the largest numbers.

    `x` are samples [n, ...], of which at most `CALIBRATION_SAMPLES` are used. Raises `ModelError` if there are none,
    the graph can't be run, or an activation isn't finite.
    """
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
    """The tensors of a model at lower precision, in the order of its file, with `ranges` if there are any.

    Args:
        graph: Its prepare graph.
        tensors: Float32 weights by name; the graph takes those that it needs.
        ranges: Ranges of activations, if the graph takes them.

    Raises:
        ModelError: A weight is missing or of another shape, the ranges don't fit, or what comes out isn't finite.
    """
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

    Args:
        folder: Where `files_of` are, and the float32 weights that ranges are measured with.
        precision: One of `PRECISIONS`.
        x: Samples to measure ranges on; without any, those of the weights file that is there are kept.

    Raises:
        ModelError: As `prepare_tensors`; a graph can't be loaded or run; or there are neither samples nor ranges.
        BundleError: There are no samples, and the weights file that is there is damaged.
    """
    ranges = None
    if precision == INT8 and x is not None and len(x):
        ranges = measure_ranges(OnnxSession(folder / calibrate_file(precision)), x)
    elif precision == INT8:
        ranges = tensorfile.load_tensors(folder / weights_file(precision)).get(RANGES)
    return tensorfile.encode(prepare_tensors(OnnxSession(folder / prepare_file(precision)), tensors, ranges))


# Samples on which both precisions are compared, at most: they resolve the limits below, and a board waits for them.
MAX_COMPARED_SAMPLES = 512

# Share of decisions that must be the same as in float32.
MIN_SAME_SHARE = 0.95

# Share of right answers that may be lost: one point of accuracy.
MAX_ACCURACY_LOSS = 0.01

# Of a model that predicts numbers: how far its outputs may be from float32's, in standard deviations of those.
MAX_RELATIVE_ERROR = 0.1

# The least spread that outputs count with, as a share of the largest: equal outputs don't spread at all. A tenth of it
# is allowed, which is twice the rounding error of float16.
_MIN_SPREAD_RATIO = 1e-2


@dataclass(frozen=True)
class Agreement:
    """How far a model's outputs are from those of float32.

    Attributes:
        same: Share of decisions (the class, or every label) that are the same; None where numbers are predicted, or
            there are no samples.
        error: Root of the mean squared difference of outputs, over the standard deviation of float32's, which counts as
            a hundredth of the largest of them at least.
        right: Shares of right answers of float32 and of the model; None where no labels were given or numbers are
            predicted.
    """

    samples: int
    same: float | None
    error: float
    right: tuple[float, float] | None = None

    @property
    def refusal(self) -> str:
        """The reason why the model must not serve; empty if it may. One changed decision is always allowed."""
        if not self.samples:
            return "there are no samples to compare it on"
        one_decision = 1 / self.samples
        if not np.isfinite(self.error):
            return "its outputs are not finite"
        if self.same is None and self.error > MAX_RELATIVE_ERROR:
            return f"its outputs are off by {self.error:.2g} of their spread, {MAX_RELATIVE_ERROR:g} is allowed"
        if self.same is not None and 1 - self.same > max(1 - MIN_SAME_SHARE, one_decision) + 1e-9:
            return (
                f"it decides {self.same:.1%} of {self.samples} samples as float32 does, "
                f"{MIN_SAME_SHARE:.0%} is asked for"
            )
        if self.right is not None and self.right[0] - self.right[1] > max(MAX_ACCURACY_LOSS, one_decision) + 1e-9:
            reference_accuracy, own_accuracy = self.right
            accuracies = f"{own_accuracy:.1%}, that of float32 is {reference_accuracy:.1%}"
            return f"its accuracy on {self.samples} samples is {accuracies}"
        return ""

    def describe(self) -> str:
        clauses = [f"on {quantity(self.samples, 'sample', form=',')}"]
        if self.same is not None:
            clauses.append(f"{self.same:.1%} decided alike")
        if self.right is not None:
            clauses.append(f"accuracy {self.right[0]:.1%} -> {self.right[1]:.1%}")
        return ", ".join([*clauses, f"outputs {self.error:.2g} of their spread apart"])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "right": None if self.right is None else list(self.right)}


def compare_outputs(loss: str, reference: Array, outputs: Array, y: Array | None = None) -> Agreement:
    """Compare outputs [n, K] with float32's (`reference`). Raises `ModelError` if they have another shape.

    Args:
        loss: What the model was trained with: `cross_entropy`, `bce`, or one of numbers.
        y: The samples' labels, if known: int64 [n] for `cross_entropy`, 0 to 1 [n, K] for `bce`.
    """
    if outputs.shape != reference.shape:
        raise ModelError("outputs at lower precision", expected=reference.shape, got=outputs.shape)
    if not reference.size:
        return Agreement(0, None, 0.0)
    rms_difference = np.sqrt(np.mean((outputs.astype(np.float64) - reference) ** 2))
    spread = max(float(np.std(reference, dtype=np.float64)), _MIN_SPREAD_RATIO * float(np.abs(reference).max()), 1e-30)
    error = float(rms_difference / spread)
    if labels_of(loss) not in JUDGED_LABELS:
        return Agreement(len(reference), None, error)
    decisions = [o.argmax(1) if loss == "cross_entropy" else o > 0 for o in (reference, outputs)]
    same = float(np.mean(decisions[0] == decisions[1]))
    right = None
    if y is not None:
        truth = y if loss == "cross_entropy" else y > 0.5
        right = float(np.mean(decisions[0] == truth)), float(np.mean(decisions[1] == truth))
    return Agreement(len(reference), same, error, right)
