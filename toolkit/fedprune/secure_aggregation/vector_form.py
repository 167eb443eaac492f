"""How a board's update becomes a vector of whole numbers, which it masks so that the server sees only sums.

A tensor travels in one of two ways, by its `TensorGrid`:

- without a step: as the server's running sum would add it (`fedprune.aggregation.fixed_point`), q = round(w·2^s), in
  one or more limbs (parts of a wide number) of 64 bits;
- with a step 2^m: in 32 bits, as the code c = round(Δ/2^m) of the difference to the weights that were sent, from −127
  to 127 as in the codec `int8`, but with one step for all boards. The rounding error is added to the next update
  (error feedback).

All boards count alike, because a weighted sum would reveal single updates: a sum of whole numbers with the weights
1000, 1000 and 1 is, modulo 1000, the third board's number. So neither the server nor a board chooses a weight, and the
number of updates is a masked number of the vector, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import VALUE_BITS, FixedSum, Range, check_range
from fedprune.core import validation
from fedprune.core.errors import ProtocolError, value_text
from fedprune.core.validation import check_whole
from fedprune.model.selection import Tensors
from fedprune.secure_aggregation.masks import Vector

# The field of an offer that says how the update becomes a vector to be masked (`MaskedForm`).
SECURE_FIELD = "secure"

# The largest code of a difference.
MAX_CODE = 127

# An offer of more tensors than any model has is refused before it is read.
_MAX_TENSORS = 65_536

# A step is at least twice the unit of the server's sum, as a power of two of the bound.
_MIN_STEP_EXPONENT = 1 - VALUE_BITS

# With larger steps, codes could leave the range.
_MAX_STEP_EXPONENT = -8

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorGrid:
    """How a tensor travels: in the range `span` of values and, if it is coded in 32 bits, in steps of 2^`step`."""

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
        """A step in units of the server's running sum, an even number."""
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
        """A board's update as a vector, and the rounding errors by coded tensor. `trained` are the tensors after
        training, `sent` as the server sent them; `residual` are rounding errors of earlier updates. Raises
        `ProtocolError` if a tensor is missing, of another shape than it was sent, not finite or out of range."""
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
            _concatenate(narrow, np.int32).view(np.uint32), _concatenate(wide, np.int64).view(np.uint64)
        ), residuals


@dataclass(frozen=True)
class MaskedForm:
    """An offer's field `secure`: how the update becomes the vector that the board masks, with `narrow` numbers of 32
    bits and `wide` numbers of 64 bits."""

    vector: VectorForm
    narrow: int
    wide: int

    @classmethod
    def from_json(cls, body: object) -> MaskedForm:
        """Read what `to_json` gives. Raises `ProtocolError`, also for a weight: all boards count alike."""
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
        """Whether some tensors travel as codes, which have rounding errors."""
        return any(grid.step is not None for grid in self.vector.tensors.values())


def _concatenate(arrays: Sequence[npt.NDArray[Any]], kind: type[np.integer[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, kind)
