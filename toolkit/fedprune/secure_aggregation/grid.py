"""Updates as vectors of whole numbers on a grid that all boards of a cohort share, and their sum as a fold takes it.

A tensor with a `Range` alone travels as the fold itself would add it (`fedprune.aggregation.fixed_point`):
q = round(w·2^s) in 64 bits, in as many limbs. The sum of these numbers is the plain fold's, bit for bit. It fits: there
are at most 2^24 boards and |q| ≤ 2^38, so a sum is at most 2^62 in magnitude, below 2^63; numbers of further limbs are
at most 2^37.

A tensor with a step 2^m, too, travels in 32 bits: as the code c = round(Δ/2^m) of the difference to the weights that
were sent, from −127 to 127 as in the codec `int8`, but with one step for all boards. It fits: the sum is at most
127·2^24 = 2,130,706,432 in magnitude, below 2^31 = 2,147,483,648. What is left over is given back for the next update
(error feedback). The sum is that of a plain fold of w_sent + c·2^m, bit for bit: 2^m is an even number of the fold's
units, so that c·2^m neither is rounded nor turns a tie.

All boards count alike, because a weighted sum would reveal single updates: a sum of whole numbers with the weights
1000, 1000 and 1 is, modulo 1000, the third board's number. So neither the server nor a board chooses a weight, and the
number of updates is a masked number of the vector, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Range, check_range
from fedprune.aggregation.layout import index_pairs
from fedprune.aggregation.update_sums import ArrayKey, PartialSums
from fedprune.core import validation
from fedprune.core.errors import ProtocolError, value_text
from fedprune.core.validation import check_whole
from fedprune.model.selection import Selection, Tensors
from fedprune.secure_aggregation.masks import Vector

# The field of an offer that says how the update becomes a vector to be masked (`MaskedForm`).
SECURE_FIELD = "secure"

# The largest code of a difference.
MAX_CODE = 127

# An offer of more tensors than any model has is refused before it is read.
_MAX_TENSORS = 65_536
# A step is at least twice the fold's unit, as a power of two of the bound.
_MIN_STEP_EXPONENT = 1 - VALUE_BITS
# With larger steps, codes could leave the range.
_MAX_STEP_EXPONENT = -8

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
        low, high = self.step_range(self.span)
        if not low <= self.step <= high:
            raise ProtocolError("exponent of a tensor's step", expected=f"from {low} to {high}", got=self.step)

    @staticmethod
    def step_range(span: Range) -> tuple[int, int]:
        """The least and the largest exponent of a step."""
        return span.exponent + _MIN_STEP_EXPONENT, span.exponent + _MAX_STEP_EXPONENT

    @property
    def units(self) -> int:
        """A step in units of the fold, an even number."""
        return 0 if self.step is None else 1 << (self.step + VALUE_BITS - self.span.exponent)


@dataclass(frozen=True)
class VectorForm:
    """The tensors of a cohort's vectors, in their order: all that a board needs to know of a `CohortGrid`."""

    tensors: Mapping[str, TensorGrid]

    @classmethod
    def from_json(cls, rows: object) -> VectorForm:
        """Read what `to_json` gives. Raises `ProtocolError`."""
        grids: dict[str, TensorGrid] = {}
        for row in validation.check_items(
            "tensors of a vector", rows, _MAX_TENSORS, "rows", min_items=1, error=ProtocolError
        ):
            if not isinstance(row, (list, tuple)) or len(row) != 4 or not isinstance(row[0], str) or row[0] in grids:
                raise ProtocolError("tensor of a vector", expected="name, exponent, limbs, step", got=value_text(row))
            exponent = check_whole("exponent of a tensor's range", row[1], -1100, 1100, error=ProtocolError)
            limbs = check_whole("limbs of a tensor's range", row[2], 1, 4, error=ProtocolError)
            step = None if row[3] is None else check_whole("step of a tensor", row[3], -1100, 1100, error=ProtocolError)
            grids[row[0]] = TensorGrid(Range(exponent, limbs), step)
        return cls(grids)

    def to_json(self) -> list[list[Any]]:
        return [[name, grid.span.exponent, grid.span.limbs, grid.step] for name, grid in self.tensors.items()]

    def encode(
        self,
        trained: Mapping[str, Float32s],
        sent: Mapping[str, Float32s],
        residual: Mapping[str, Float32s] | None = None,
    ) -> tuple[Vector, Tensors]:
        """A board's update as a vector, and by coded tensor what the codes leave out.

        Raises `ProtocolError` if a tensor is missing, of another shape than it was sent, not finite or out of range.

        Args:
            trained: The tensors after training.
            sent: The tensors as they were sent.
            residual: By name what earlier updates left out.
        """
        narrow: list[npt.NDArray[np.int32]] = []
        # The number of updates is the first number: masked like all others, it tells the server how many are in a sum.
        wide: list[npt.NDArray[np.int64]] = [np.array([1], np.int64)]
        residuals: Tensors = {}
        for name, grid in self.tensors.items():
            if name not in trained or name not in sent:
                raise ProtocolError(f"update lacks tensor {name}")
            value, sent_value = trained[name], sent[name]
            if value.dtype != np.float32:
                raise ProtocolError(f"type of {name} in an update", expected="float32", got=value.dtype)
            if value.shape != sent_value.shape:
                raise ProtocolError(f"shape of {name} in an update", expected=sent_value.shape, got=value.shape)
            # The server never sees the vector and can't check it: honest boards make sure that theirs fits.
            check_range(name, value, grid.span.bound)
            if grid.step is None:
                fixed_sum = FixedSum(value.shape, grid.span)
                fixed_sum.add(value, 1)
                wide += [limb.reshape(-1) for limb in fixed_sum.limbs]
                continue
            difference = value.astype(np.float64) - sent_value
            if residual is not None and name in residual:
                difference += residual[name]
            codes = np.clip(np.rint(np.ldexp(difference, -grid.step)), -MAX_CODE, MAX_CODE)
            residuals[name] = (difference - np.ldexp(codes, grid.step)).astype(np.float32)
            narrow.append(codes.astype(np.int32).reshape(-1))
        return Vector(
            _concatenated(narrow, np.int32).view(np.uint32), _concatenated(wide, np.int64).view(np.uint64)
        ), residuals


@dataclass(frozen=True)
class MaskedForm:
    """An offer's field `secure`: how the update becomes the vector that the board masks.

    Attributes:
        vector: Its tensors.
        narrow: How many of its numbers have 32 bits.
        wide: How many have 64 bits.
    """

    vector: VectorForm
    narrow: int
    wide: int

    @classmethod
    def from_json(cls, body: object) -> MaskedForm:
        """Read what `to_json` gives. Raises `ProtocolError`, also for a weight: see the module."""
        if not isinstance(body, Mapping):
            raise ProtocolError("secure of an offer", expected="an object", got=value_text(body))
        if body.get("weight", 1) != 1:
            raise ProtocolError(
                "weight of an update in a secure sum",
                expected="none: all boards count alike",
                got=value_text(body["weight"]),
                hint="With weights of its choice a server could read single updates out of the sum.",
            )
        narrow, wide = (
            check_whole(f"{key} of a vector", body.get(key), 0, 2**40, error=ProtocolError)
            for key in ("narrow", "wide")
        )
        return cls(VectorForm.from_json(body.get("tensors")), narrow, wide)

    def to_json(self) -> dict[str, Any]:
        return {"tensors": self.vector.to_json(), "narrow": self.narrow, "wide": self.wide}

    @property
    def has_codes(self) -> bool:
        """Whether some tensors travel as codes, which leave something out."""
        return any(grid.step is not None for grid in self.vector.tensors.values())


class CohortGrid:
    """Turns the sum of a cohort's vectors into sums of a fold.

    Args:
        selection: What all boards of the cohort hold.
        tensors: By name, how the shared tensors travel.
        boards: The most boards that the cohort may have.
        withheld: By name, the ranges of tensors that don't travel, since boards don't train or share them: they enter
            the sums as they were sent.
    """

    def __init__(
        self,
        selection: Selection,
        tensors: Mapping[str, TensorGrid],
        boards: int,
        withheld: Mapping[str, Range] | None = None,
    ) -> None:
        spec_of_name = selection.architecture.by_name
        unknown = sorted(set(tensors) - set(spec_of_name))
        if unknown or not tensors:
            raise ProtocolError("tensors of a grid", expected="some of the model's", got=", ".join(unknown) or "none")
        for name, grid in tensors.items():
            if grid.step is not None and not spec_of_name[name].kind.is_trainable:
                raise ProtocolError(f"step of {name}", expected="none for statistics", got=grid.step)
        check_whole("boards of a cohort", boards, 1, MAX_WEIGHT, error=ProtocolError)
        self.selection = selection
        self._boards = boards
        self._withheld_spans = dict(withheld or {})
        self._specs = [t for t in selection.architecture.tensors if t.name in tensors or t.name in self._withheld_spans]
        self._grids = {spec.name: tensors[spec.name] for spec in self._specs if spec.name in tensors}
        self._sizes = {name: math.prod(shape) for name, shape in selection.shapes().items()}

    @property
    def form(self) -> VectorForm:
        return VectorForm(self._grids)

    @property
    def narrow(self) -> int:
        """Numbers of 32 bits."""
        return sum(self._sizes[n] for n, grid in self._grids.items() if grid.step is not None)

    @property
    def wide(self) -> int:
        """Numbers of 64 bits, the number of updates among them."""
        return 1 + sum(self._sizes[n] * grid.span.limbs for n, grid in self._grids.items() if grid.step is None)

    def partial_sums(self, total: Vector, boards: int, sent: Mapping[str, Float32s]) -> PartialSums:
        """The sum of a cohort's updates, as `Fold.add_partial_sums` takes it.

        Raises `ProtocolError` if it can't be the sum of that number of updates, as when a board has broken the rules.

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
        # A board that masked more or less than one update, or none, shows here, before its numbers count.
        if int(wide[0]) != boards:
            raise ProtocolError("updates in the sum of a cohort", expected=boards, got=int(wide[0]))
        layout = self.selection.with_widths(self.selection.architecture.sizes)
        arrays: dict[ArrayKey, npt.NDArray[np.int64]] = {}
        narrow_start, wide_start = 0, 1
        for spec in self._specs:
            size, shape = self._sizes[spec.name], self.selection.shapes()[spec.name]
            grid = self._grids.get(spec.name)
            if grid is None or grid.step is not None:
                sent_sum = FixedSum(shape, self._withheld_spans[spec.name] if grid is None else grid.span)
                sent_sum.add(np.asarray(sent[spec.name]), boards)
                limbs = list(sent_sum.limbs)
            if grid is not None and grid.step is not None:
                codes = narrow[narrow_start : narrow_start + size].reshape(shape).astype(np.int64)
                narrow_start += size
                _check_sums(spec.name, codes, MAX_CODE * boards)
                limbs[0] = limbs[0] + codes * grid.units
            elif grid is not None:
                limbs = []
                for i in range(grid.span.limbs):
                    limbs.append(wide[wide_start : wide_start + size].reshape(shape))
                    wide_start += size
                    _check_sums(spec.name, limbs[i], boards << (VALUE_BITS if not i else VALUE_BITS - 1))
            for i, limb in enumerate(limbs):
                whole_tensor = np.zeros(spec.shape, np.int64)
                for sum_index, limb_index in index_pairs(layout, spec, self.selection):
                    whole_tensor[sum_index] = limb[limb_index]
                arrays["value", spec.name, i] = whole_tensor
        names = frozenset(spec.name for spec in self._specs)
        return PartialSums(names, layout, ((self.selection, boards),), boards, arrays)


def step_exponent(largest: float) -> int:
    """The least m for which codes of steps 2^m reach a difference."""
    mantissa, exponent = math.frexp(largest / MAX_CODE)
    return exponent - 1 if mantissa == 0.5 else exponent


def _concatenated(arrays: Sequence[npt.NDArray[Any]], kind: type[np.integer[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, kind)


def _check_sums(name: str, sums: npt.NDArray[np.int64], bound: int) -> None:
    """Make sure that sums are those of values within their bounds. Raises `ProtocolError`, which names the tensor."""
    if sums.size and not -bound <= int(sums.min()) <= int(sums.max()) <= bound:
        raise ProtocolError(
            f"sums of {name}",
            expected=f"at most {bound} in magnitude",
            got="more",
            hint="A board's vector was out of range. No single update can be blamed.",
        )
