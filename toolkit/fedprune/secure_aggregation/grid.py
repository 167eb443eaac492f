"""Turns the sum of a cohort's vectors (`fedprune.secure_aggregation.vector_form`) into sums of a fold.

A fold is the running sum of a round's updates. A cohort is the boards whose updates are summed under masks. All of them
share one grid: the ranges and steps by which their updates become whole numbers. The result is the same, bit for bit,
as if the fold had added each board's update:

- Without a step, a number is q = round(w·2^s). There are at most 2^24 boards and |q| ≤ 2^38, so a sum is at most 2^62
  in magnitude and fits in 64 bits; numbers of further limbs (parts of a wide number) are at most 2^37.
- With a step 2^m, it is the code c of a difference. The sum is at most 127·2^24 = 2,130,706,432 in magnitude and fits
  in 32 bits, which hold 2^31 = 2,147,483,648. 2^m is an even number of the fold's units, so that in w_sent + c·2^m the
  summand c·2^m is neither rounded nor turns a tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Range
from fedprune.aggregation.layout import index_pairs
from fedprune.aggregation.update_sums import ArrayKey, PartialSums
from fedprune.core.errors import ProtocolError
from fedprune.core.validation import check_whole
from fedprune.model.selection import Selection
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.vector_form import MAX_CODE, Float32s, TensorGrid, VectorForm


class CohortGrid:
    """Turns the sum of a cohort's vectors into sums of a fold.

    Args:
        selection: The channels that all boards of the cohort hold.
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
        """The sum of a cohort's updates, as `Fold.add_partial_sums` takes it: `total` is the unmasked sum of the
        vectors of that many boards, `sent` are the tensors that they have received. Raises `ProtocolError` if it can't
        be the sum of that number of updates, as when a board has broken the rules."""
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
        wide = wide[1:]
        layout = self.selection.with_widths(self.selection.architecture.sizes)
        arrays: dict[ArrayKey, npt.NDArray[np.int64]] = {}
        for spec in self._specs:
            size, shape = self._sizes[spec.name], self.selection.shapes()[spec.name]
            grid = self._grids.get(spec.name)
            if grid is None:
                limbs = _sum_of_copies(sent[spec.name], self._withheld_spans[spec.name], boards)
            elif grid.step is not None:
                codes, narrow = narrow[:size].reshape(shape).astype(np.int64), narrow[size:]
                _check_sums(spec.name, codes, MAX_CODE * boards)
                first, *others = _sum_of_copies(sent[spec.name], grid.span, boards)
                limbs = [first + codes * grid.units, *others]
            else:
                size *= grid.span.limbs
                limbs, wide = list(wide[:size].reshape(grid.span.limbs, *shape)), wide[size:]
                for i, limb in enumerate(limbs):
                    _check_sums(spec.name, limb, boards << (VALUE_BITS if not i else VALUE_BITS - 1))
            for i, limb in enumerate(limbs):
                full_limb = np.zeros(spec.shape, np.int64)
                for sum_index, limb_index in index_pairs(layout, spec, self.selection):
                    full_limb[sum_index] = limb[limb_index]
                arrays["value", spec.name, i] = full_limb
        names = frozenset(spec.name for spec in self._specs)
        return PartialSums(names, layout, ((self.selection, boards),), boards, arrays)


def step_exponent(largest: float) -> int:
    """The least m for which codes of steps 2^m reach a difference."""
    mantissa, exponent = math.frexp(largest / MAX_CODE)
    return exponent - 1 if mantissa == 0.5 else exponent


def _sum_of_copies(value: Float32s, span: Range, boards: int) -> list[npt.NDArray[np.int64]]:
    """The limbs of a tensor that is added once per board."""
    copies = FixedSum(value.shape, span)
    copies.add(np.asarray(value), boards)
    return list(copies.limbs)


def _check_sums(name: str, sums: npt.NDArray[np.int64], bound: int) -> None:
    """Make sure that sums are those of values within their bounds. Raises `ProtocolError`, which names the tensor."""
    if sums.size and not -bound <= int(sums.min()) <= int(sums.max()) <= bound:
        raise ProtocolError(
            f"sums of {name}",
            expected=f"at most {bound} in magnitude",
            got="more",
            hint="A board's vector was out of range. No single update can be blamed.",
        )
