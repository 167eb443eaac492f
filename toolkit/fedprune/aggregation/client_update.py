"""An update as a fold takes it: checked, and rebased where its device began with an older model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import MAX_WEIGHT, check_range, largest_magnitude, sum_of_squares
from fedprune.core.errors import BundleError, ProtocolError, value_text
from fedprune.core.validation import check_whole, is_whole
from fedprune.model.architecture import Architecture, TensorKind
from fedprune.model.selection import ElementMask, Selection, Tensors, mesh

# No recipe has more steps: a larger count is a mistake or a lie, and evidence divides by it.
MAX_STEPS = 2**31 - 1


def check_fold_base(architecture: Architecture, base: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
    """The tensors that a fold begins with. Raises `BundleError`, which names one that is missing, not float32, of
    another shape or not finite."""
    tensors: Tensors = {}
    for spec in architecture.tensors:
        value = base.get(spec.name)
        if value is None or value.dtype != np.float32 or value.shape != spec.shape:
            raise BundleError(
                f"tensor {spec.name} of the fold's base",
                expected=f"float32 {spec.shape}",
                got="nothing" if value is None else f"{value.dtype} {value.shape}",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            square = sum_of_squares(value)  # a quarter of what looking at every value costs
        if not math.isfinite(square) and not math.isfinite(largest_magnitude(value)):
            raise BundleError(f"tensor {spec.name} of the fold's base", expected="finite numbers")
        tensors[spec.name] = value
    return tensors


def check_submodel(
    architecture: Architecture,
    selection: Selection,
    submodel: Mapping[str, npt.NDArray[Any]],
    bounds: Mapping[str, float],
    optional: Collection[str] = (),
) -> None:
    """Make sure that tensors are the submodel that a selection describes, within `bounds` by tensor; `optional` ones
    may be missing.

    Raises `BundleError` if the selection is of another architecture, and `ProtocolError` if a tensor is missing,
    unknown, not float32, of another shape than the selection says, not finite or out of bounds; the message names it.
    """
    if selection.architecture is not architecture and selection.architecture.digest != architecture.digest:
        raise BundleError("update's selection belongs to another architecture")
    unknown = sorted(set(submodel) - set(architecture.by_name))
    if unknown:
        raise ProtocolError(f"update holds a tensor that the model doesn't have: {unknown[0]!r}")
    shapes = selection.shapes()
    for spec in architecture.tensors:
        value = submodel.get(spec.name)
        if value is None and spec.name in optional:
            continue
        if value is None:
            raise ProtocolError(f"update lacks tensor {spec.name}")
        if value.dtype != np.float32:
            raise ProtocolError(f"type of {spec.name} in an update", expected="float32", got=value.dtype)
        if value.shape != shapes[spec.name]:
            raise ProtocolError(f"shape of {spec.name} in an update", expected=shapes[spec.name], got=value.shape)
    present = [t for t in architecture.tensors if t.name in submodel]
    for spec in present:
        check_range(spec.name, submodel[spec.name], bounds[spec.name])
    for spec in present:
        if spec.kind is TensorKind.STAT_VAR and submodel[spec.name].size:
            smallest = float(submodel[spec.name].min())
            if smallest < 0:
                raise ProtocolError(f"values of {spec.name}", expected="variances from 0 up", got=f"{smallest:g}")


def check_squares(selection: Selection, squares: Mapping[str, npt.NDArray[Any]], requested: Collection[str]) -> None:
    """Check the squared gradients of an update: only those that the recipe requests, in the submodel's shapes.

    Raises `ProtocolError`, which names a tensor that was not asked for, is not float32, has another shape than the
    selection says, or holds values that are negative or not finite.
    """
    shapes = selection.shapes()
    largest = float(np.finfo(np.float32).max)
    for name, value in sorted(squares.items()):
        what = f"squared gradients of {value_text(name)}"
        if name not in requested:
            raise ProtocolError(f"update holds {what}, which was not requested")
        if value.dtype != np.float32:
            raise ProtocolError(f"type of {what}", expected="float32", got=value.dtype)
        if value.shape != shapes[name]:
            raise ProtocolError(f"shape of {what}", expected=shapes[name], got=value.shape)
        check_range(what, value, largest)
        if value.size and float(value.min()) < 0:
            raise ProtocolError(f"values of {what}", expected="numbers from 0 up", got=f"{float(value.min()):g}")


def check_counts(weight: object, steps: object, max_weight: int) -> None:
    """Make sure that an update's weight, up to `max_weight`, and optimiser steps are counts. Raises `ProtocolError`."""
    if not is_whole(weight, 1, max_weight):
        raise ProtocolError(
            "weight of an update",
            expected=f"a whole number from 1 to {max_weight} (a fold takes {MAX_WEIGHT} in all)",
            got=repr(weight),
        )
    check_whole("steps of an update", steps, 1, MAX_STEPS, error=ProtocolError)


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """The checked input of `Fold.add`.

    Attributes:
        weight: n_k, the device's number of samples.
        sent: What the device began with, where that is not the fold's base.
    """

    selection: Selection
    tensors: Mapping[str, npt.NDArray[np.float32]]
    weight: int
    steps: int = 1
    mask: ElementMask = field(default_factory=dict)
    sent: Mapping[str, npt.NDArray[np.float32]] | None = None


def rebase_update(
    architecture: Architecture,
    selection: Selection,
    trained: Mapping[str, npt.NDArray[np.float32]],
    sent: Mapping[str, npt.NDArray[np.float32]],
    base: Mapping[str, npt.NDArray[np.float32]],
    bounds: Mapping[str, float],
    left_out: Collection[str] = (),
) -> dict[str, npt.NDArray[Any]]:
    """w_t + (w_k − w_sent) for the tensors that are trained; statistics are measured, not moved, and stay w_k.

    Where a device was sent what the base holds now, that is w_k itself, bit for bit. Tensors have the submodel's
    shapes, and are float64 where they were moved. Raises `ProtocolError` if a sum is out of bounds; the message names
    the tensor.

    `trained`: w_k, checked; `sent`: w_sent, checked; `base`: w_t, the whole model; `bounds`: by tensor the largest
    magnitude that a sum accepts; `left_out`: tensors that don't enter the sums.
    """
    rebased_tensors: dict[str, npt.NDArray[Any]] = dict(trained)
    for spec in architecture.trainable:
        name = spec.name
        if name in left_out:
            continue
        base_value = base[name][mesh(selection.maps(name))]
        if np.array_equal(base_value, sent[name]):
            continue
        value = trained[name].astype(np.float64)
        value -= sent[name]
        value += base_value
        # Each of the two was within bounds, but their difference from the base needn't be.
        check_range(f"{name}, moved as an earlier model was", value, bounds[name])
        rebased_tensors[name] = value
    return rebased_tensors
