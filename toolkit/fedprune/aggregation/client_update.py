"""One update on its way into a round's sums."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import check_range
from fedprune.model.architecture import Architecture
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection, Tensors, mesh

Moves = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What `Fold.add` is given, checked.

    Attributes:
        weight: n_k.
        steps: Optimiser steps behind it.
        mask: Which elements count; None for all.
        sent: What the device began with, where that is not the fold's base.
    """

    selection: Selection
    tensors: Mapping[str, npt.NDArray[np.float32]]
    weight: int
    steps: int = 1
    mask: ElementMask | None = None
    sent: Mapping[str, npt.NDArray[np.float32]] | None = None

    def began(self, name: str, base: Tensors) -> npt.NDArray[np.float32]:
        """What a tensor was before training, in the submodel's coordinates."""
        if self.sent is not None:
            return self.sent[name]
        return np.asarray(base[name][mesh(self.selection.maps(name))])

    def moves(self, base: Tensors, left_out: Collection[str] = ()) -> Moves:
        """Δ_k by trained tensor, 0 where masked; `base` is the fold's w_t."""
        out: Moves = {}
        for spec in self.selection.architecture.trainable:
            if spec.name in left_out:
                continue
            moved = self.tensors[spec.name].astype(np.float64) - self.began(spec.name, base)
            if self.mask is not None and spec.name in self.mask.active:
                moved *= self.mask.active[spec.name]
            out[spec.name] = moved
        return out

    def size(self, left_out: Collection[str] = ()) -> int:
        """Elements of trained tensors that it holds."""
        total = 0
        for spec in self.selection.architecture.trainable:
            if spec.name not in left_out:
                mask = None if self.mask is None else self.mask.active.get(spec.name)
                total += self.tensors[spec.name].size if mask is None else int(mask.sum())
        return total

    def shortened(self, base: Tensors, factor: float) -> ClientUpdate:
        """The same with factor·Δ_k; statistics stay."""
        tensors = dict(self.tensors)
        for spec in self.selection.architecture.trainable:
            if spec.name in tensors:
                before = self.began(spec.name, base)
                moved = tensors[spec.name].astype(np.float64) - before
                tensors[spec.name] = (before + factor * moved).astype(np.float32)
        return replace(self, tensors=tensors)


def norm(moves: Mapping[str, npt.NDArray[np.float64]]) -> float:
    """The Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(np.vdot(v, v)) for v in moves.values()))


def rebased(
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
    shapes, and are float64 where they were moved.

    Args:
        trained: w_k, checked.
        sent: w_sent, checked.
        base: w_t, the whole model.
        bounds: By tensor the largest magnitude that a sum accepts.
        left_out: Tensors that don't enter the sums.

    Raises:
        ProtocolError: A sum is out of bounds; the message names the tensor.
    """
    out: dict[str, npt.NDArray[Any]] = dict(trained)
    for spec in architecture.trainable:
        name = spec.name
        if name in left_out:
            continue
        now = base[name][mesh(selection.maps(name))]
        if np.array_equal(now, sent[name]):
            continue
        moved = trained[name].astype(np.float64)
        moved -= sent[name]
        moved += now
        check_range(f"{name}, moved as an earlier model was", moved, bounds[name])
        out[name] = moved
    return out
