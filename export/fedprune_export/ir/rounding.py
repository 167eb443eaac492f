"""Compares outputs with a reference's, to what rounding explains.

Float32 sums in another order differ by less than 1e-5. Some models amplify rounding, such as those that normalise small
differences of large numbers. How far they may differ is measured on the reference alone: by its own outputs once all
its numbers are one unit in the last place away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import onnx

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array

# More, where rounding isn't amplified, means that something else is computed.
MAX_DISTANCE = 1e-4

_DRAWS = 4
# Another order of sums rounds in other places than a draw, and not farther.
_SLACK = 2.0
# Beyond this agreement would prove nothing.
_MAX_EXPLAINED_DISTANCE = 0.05


class Distance(NamedTuple):
    """How far outputs are from a reference's, relative to the largest of these.

    `rounding`: how far the reference itself moves by rounding; None if outputs are so near that it wasn't measured.
    """

    value: float
    rounding: float | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence about a model that amplifies rounding."""
        if self.rounding is None:
            return ()
        sentence = (
            f"The model amplifies rounding: its outputs move by {self.rounding:.1g} of the largest if its inputs and "
            f"weights move by one unit in the last place. They were compared to {_tolerance(self.rounding):.1g}, and "
            "boards, which sum in another order, may be as far off."
        )
        return (sentence,)


def relative_distance(before: Array, after: Array, least_scale: float = 1e-6) -> float:
    """How far numbers are from those before, relative to the largest of these. Numbers that aren't finite are only
    close to the same: NaN or infinity comes out otherwise, as for another shape.

    `least_scale` stands for the largest number where all are smaller.
    """
    if before.shape != after.shape:
        return math.inf
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    is_same = (old == new) | (np.isnan(old) & np.isnan(new))
    distances = np.abs(np.subtract(old, new, out=np.zeros(old.shape), where=~is_same))
    return float(distances.max(initial=0)) / max(float(np.abs(old[np.isfinite(old)]).max(initial=0)), least_scale)


def check_outputs(
    outputs: Array,
    expected: Array,
    rerun: Callable[[np.random.Generator], Array],
    subject: str,
    hint: str = "",
    *,
    limit: float = MAX_DISTANCE,
    least_scale: float = 1e-6,
) -> Distance:
    """Compare outputs with a reference's. Raises `ModelError` if they are farther away than rounding explains.

    Args:
        rerun: The reference's outputs once its inputs (`round_array`) and weights (`round_weights`) have moved by a
            rounding. Called only if outputs are farther away than `limit`.
        subject: What it means if they are.
    """
    value = relative_distance(expected, outputs, least_scale)
    if value <= limit:
        return Distance(value)
    rounding = 0.0
    for draw in range(_DRAWS if math.isfinite(value) else 0):
        # A scale of a Resize that moves gives another size, and some constants end in NaN: such draws say nothing.
        with suppress(ModelError):
            distance = relative_distance(expected, rerun(np.random.default_rng(draw)), least_scale)
            rounding = max(rounding, distance if math.isfinite(distance) else 0.0)
    if value <= (tolerance := max(limit, _tolerance(rounding))):
        return Distance(value, rounding)
    if value <= _SLACK * rounding:
        raise ModelError(
            "the model amplifies rounding so much that no comparison of outputs proves anything",
            expected=f"outputs that move by less than {_MAX_EXPLAINED_DISTANCE:g} of the largest if inputs and weights "
            "move by a rounding",
            got=f"{rounding:.1g}",
            hint="Look for small differences of large numbers, such as a norm behind a large bias, and centre them.",
        )
    raise ModelError(
        subject,
        expected=f"outputs that agree to {tolerance:.1g}",
        got=f"a difference of {value:.2g}",
        hint=hint or "Please report this with the model.",
    )


def _tolerance(rounding: float) -> float:
    """How far outputs may be from a reference's that moves so far by rounding."""
    return min(_SLACK * rounding, _MAX_EXPLAINED_DISTANCE)


def round_array(values: Array, random: np.random.Generator, levels: int = 0) -> Array:
    """Float32 numbers moved by a rounding: one unit in the last place to a random side or, where numbers are rounded to
    so many levels of their range, up to half a level; others, and zeros, as they are."""
    if values.dtype != np.float32:
        return values
    if levels:
        steps = np.ptp(values) / (levels - 1) * (random.random(values.shape) - 0.5)
        return np.where(values == 0, values, values + steps.astype(np.float32))
    sides = np.where(random.random(values.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
    return np.where(values == 0, values, np.nextafter(values, sides))


def round_weights(raw: bytes, random: np.random.Generator, levels: int = 0) -> bytes:
    """A model's file with its weights moved as by `round_array`; scalars are exponents and bounds, which stay, as do
    the scales of a Resize, which decide where nearest numbers are."""
    proto = onnx.load_model_from_string(raw)
    fixed = {i for node in proto.graph.node if node.op_type in ("Resize", "Upsample") for i in node.input[1:]}
    constants = [n for n in proto.graph.node if n.op_type == "Constant" and fixed.isdisjoint(n.output)]
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name not in fixed]
    for tensor in [*tensors, *(a.t for node in constants for a in node.attribute if a.HasField("t"))]:
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 1:
            values = round_array(onnx.numpy_helper.to_array(tensor), random, levels)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    moved: bytes = proto.SerializeToString()
    return moved
