"""Updates as vectors of whole numbers on a grid that all boards of a cohort share, and their sum as a fold takes it.

A tensor with a `Range` alone travels as the fold itself would add it (`fedprune.aggregation.fixed_point`): n·q with
q = round(w·2^s) in 64 bits, in as many limbs. The sum of these numbers is the plain fold's, bit for bit. It fits: all
weights together are at most 2^24 and |q| ≤ 2^38, so a sum is at most 2^62 in magnitude, below 2^63; numbers of further
limbs are at most 2^37, of 2^24 boards or fewer.

A tensor with a step 2^m, too, travels in 32 bits: n·c with the code c = round(Δ/2^m) of the difference to the weights
that were sent, from −127 to 127 as in the codec `int8`, but with one step for all boards. It fits: the sum is at most
127·2^24 = 2,130,706,432 in magnitude, below 2^31 = 2,147,483,648. What is left over is given back for the next update
(error feedback). The sum is that of a plain fold of w_sent + c·2^m, bit for bit: 2^m is an even number of the fold's
units, so that c·2^m neither is rounded nor turns a tie.

A board can't see the others' weights. So each may have at most an equal share of 2^24, and the sum of the weights
travels masked, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import check_submodel
from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Range
from fedprune.aggregation.layout import places
from fedprune.aggregation.update_sums import Key, PartialSums
from fedprune.core.errors import ProtocolError
from fedprune.core.validation import whole
from fedprune.model.selection import Selection, Tensors
from fedprune.secure_aggregation.masks import Vector

CODES = 127
"""The largest code of a difference."""

_LEAST = 1 - VALUE_BITS
"""A step is at least twice the fold's unit, as a power of two of the bound."""
_MOST = -8
"""With larger steps, codes could leave the range."""

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorGrid:
    """How a tensor travels: what its sum accepts and, if it is coded in 32 bits, m of its step 2^m."""

    span: Range
    step: int | None = None

    def __post_init__(self) -> None:
        if self.step is None:
            return
        if self.span.limbs > 1:
            raise ProtocolError("step of a tensor of several limbs", expected="none", got=self.step)
        low, high = self.span.exponent + _LEAST, self.span.exponent + _MOST
        if not low <= self.step <= high:
            raise ProtocolError("exponent of a tensor's step", expected=f"from {low} to {high}", got=self.step)

    @property
    def units(self) -> int:
        """A step in units of the fold, an even number."""
        return 0 if self.step is None else 1 << (self.step + VALUE_BITS - self.span.exponent)


class Grid:
    """The numbers of a cohort's updates.

    Args:
        selection: What all boards of the cohort hold.
        tensors: By name, how the shared tensors travel.
        boards: The most boards that the cohort may have; a board's weight is at most 2^24 divided by it.
    """

    def __init__(self, selection: Selection, tensors: Mapping[str, TensorGrid], boards: int) -> None:
        known = selection.architecture.by_name
        unknown = sorted(set(tensors) - set(known))
        if unknown or not tensors:
            raise ProtocolError("tensors of a grid", expected="some of the model's", got=", ".join(unknown) or "none")
        for name, grid in tensors.items():
            if grid.step is not None and not known[name].kind.trainable:
                raise ProtocolError(f"step of {name}", expected="none for statistics", got=grid.step)
        whole("boards of a cohort", boards, 1, MAX_WEIGHT, error=ProtocolError)
        self.selection = selection
        self.most_weight = MAX_WEIGHT // boards
        self._boards = boards
        self._specs = [t for t in selection.architecture.tensors if t.name in tensors]
        self._tensors = dict(tensors)
        self._left_out = frozenset(known) - frozenset(tensors)
        self._sizes = {name: math.prod(shape) for name, shape in selection.shapes().items() if name in tensors}

    @property
    def narrow(self) -> int:
        """Numbers of 32 bits."""
        return sum(self._sizes[n] for n, grid in self._tensors.items() if grid.step is not None)

    @property
    def wide(self) -> int:
        """Numbers of 64 bits, the weight among them."""
        return 1 + sum(self._sizes[n] * grid.span.limbs for n, grid in self._tensors.items() if grid.step is None)

    def encode(
        self,
        trained: Mapping[str, Float32s],
        sent: Mapping[str, Float32s],
        weight: int,
        residual: Mapping[str, Float32s] | None = None,
    ) -> tuple[Vector, Tensors]:
        """A board's update as a vector, and what the codes leave out of coded tensors.

        Raises `ProtocolError` if a tensor is missing, not the selection's, not finite or out of range, or the weight is
        too large.

        Args:
            trained: The tensors after training, of the selection's shapes.
            sent: The tensors as they were sent.
            weight: n, the board's number of samples; 1 where all boards weigh the same.
            residual: By name what earlier updates left out.
        """
        whole("weight of an update in a secure sum", weight, 1, self.most_weight, error=ProtocolError)
        bounds = {name: grid.span.bound for name, grid in self._tensors.items()}
        own = {name: value for name, value in trained.items() if name in self._tensors}
        check_submodel(self.selection.architecture, self.selection, own, bounds, self._left_out)
        narrow: list[npt.NDArray[np.int32]] = []
        wide: list[npt.NDArray[np.int64]] = [np.array([weight], np.int64)]
        left: Tensors = {}
        for spec in self._specs:
            value, grid = own[spec.name], self._tensors[spec.name]
            if grid.step is None:
                added = FixedSum(value.shape, grid.span)
                added.add(value, weight)
                wide += [limb.reshape(-1) for limb in added.limbs]
                continue
            difference = value.astype(np.float64) - sent[spec.name]
            if residual is not None and spec.name in residual:
                difference += residual[spec.name]
            codes = np.clip(np.rint(np.ldexp(difference, -grid.step)), -CODES, CODES)
            left[spec.name] = (difference - np.ldexp(codes, grid.step)).astype(np.float32)
            narrow.append((codes.astype(np.int32) * np.int32(weight)).reshape(-1))
        return Vector(_joined(narrow, np.int32).view(np.uint32), _joined(wide, np.int64).view(np.uint64)), left

    def sums(self, total: Vector, boards: int, sent: Mapping[str, Float32s]) -> PartialSums:
        """The sum of a cohort's updates for `Fold.take`.

        Raises `ProtocolError` if it can't be the sum of so many updates, as when a board has broken the rules.

        Args:
            total: The unmasked sum of the boards' vectors.
            boards: How many boards are in it.
            sent: The tensors as all of these boards were sent them.
        """
        if (total.narrow.size, total.wide.size) != (self.narrow, self.wide) or not 1 <= boards <= self._boards:
            raise ProtocolError(
                "sum of a cohort",
                expected=f"{self.narrow} and {self.wide} numbers of up to {self._boards} boards",
                got=f"{total.narrow.size} and {total.wide.size} of {boards}",
            )
        narrow, wide = total.narrow.view(np.int32), total.wide.view(np.int64)
        weight = whole("weight of a cohort", int(wide[0]), boards, boards * self.most_weight, error=ProtocolError)
        layout = self.selection.narrowed(self.selection.architecture.sizes)
        arrays: dict[Key, npt.NDArray[np.int64]] = {}
        at_narrow, at_wide = 0, 1
        for spec in self._specs:
            grid, size, shape = self._tensors[spec.name], self._sizes[spec.name], self.selection.shapes()[spec.name]
            if grid.step is not None:
                codes = narrow[at_narrow : at_narrow + size].reshape(shape).astype(np.int64)
                at_narrow += size
                _check_sums(spec.name, codes, CODES * weight)
                start = FixedSum(shape, grid.span)
                start.add(np.asarray(sent[spec.name]), weight)
                limbs = [start.limbs[0] + codes * grid.units]
            else:
                limbs = []
                for i in range(grid.span.limbs):
                    limbs.append(wide[at_wide : at_wide + size].reshape(shape))
                    at_wide += size
                    _check_sums(spec.name, limbs[i], weight << VALUE_BITS if not i else boards << (VALUE_BITS - 1))
            for i, limb in enumerate(limbs):
                whole_tensor = np.zeros(spec.shape, np.int64)
                for into, part in places(layout, spec, self.selection):
                    whole_tensor[into] = limb[part]
                arrays["value", spec.name, i] = whole_tensor
        names = frozenset(self._tensors)
        return PartialSums(names, layout, ((self.selection, weight),), boards, arrays)


def step_exponent(largest: float) -> int:
    """The least m for which codes of steps 2^m reach a difference."""
    mantissa, exponent = math.frexp(largest / CODES)
    return exponent - 1 if mantissa == 0.5 else exponent


def _joined(parts: Sequence[npt.NDArray[Any]], kind: type[np.integer[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def _check_sums(name: str, sums: npt.NDArray[np.int64], most: int) -> None:
    """Make sure that sums are those of values within their bounds. Raises `ProtocolError`, which names the tensor."""
    if sums.size and not -most <= int(sums.min()) <= int(sums.max()) <= most:
        raise ProtocolError(
            f"sums of {name}",
            expected=f"at most {most} in magnitude",
            got="more",
            hint="A board's vector was out of range. No single update can be blamed.",
        )
