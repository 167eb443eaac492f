"""What a rule makes of a round's sums: the mean of every tensor, some rows at a time, and the next model.

The rules are those of `fedprune.aggregation.fold`. Rows are few enough to stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.coverage import Coverage
from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Index
from fedprune.aggregation.layout import as_in_model, in_one_piece, into_model, row_blocks, to_global, to_layout
from fedprune.aggregation.server_optimizer import ServerStep
from fedprune.model.architecture import Architecture, TensorSpec

Float64s = npt.NDArray[np.float64]


class Rows(NamedTuple):
    """Some rows of a tensor's mean, in the fold's layout.

    Attributes:
        rows: Which.
        mean: Valid until the next rows are asked for.
        held: Where anyone holds a coordinate; None where that is everywhere.
        base: The base's rows, where they were asked for or needed.
    """

    rows: Index
    mean: Float64s
    held: npt.NDArray[np.bool_] | None
    base: npt.NDArray[np.float32] | None


class RoundMeans:
    """A round's means.

    Args:
        architecture: The model.
        base: The model that the round began with.
        rule: `coverage`, `fill` or `zero`.
        coverage: Who holds what; it isn't empty.
        sums: By tensor Σ n·w, in the coverage's layout.
        spread: By variance whose law of total variance is wanted, Σ n·(m − m_t)² of its mean m.
        paired: That mean, by the variance's name.
    """

    def __init__(
        self,
        architecture: Architecture,
        base: Mapping[str, npt.NDArray[np.float32]],
        rule: str,
        coverage: Coverage,
        sums: Mapping[str, FixedSum],
        spread: Mapping[str, FixedSum],
        paired: Mapping[str, str],
    ) -> None:
        self._architecture = architecture
        self._base = base
        self._rule = rule
        self._coverage = coverage
        self._sums = sums
        self._spread = spread
        self._paired = paired
        # What is handed out as it is made lies in one piece of memory.
        layout = coverage.layout
        every = (architecture.by_name[name] for name in sums)
        specs = [spec for spec in every if layout is not None and as_in_model(layout, spec)]
        self._rooms = in_one_piece(specs, np.empty(sum(math.prod(spec.shape) for spec in specs), np.float32))

    def following(self, spec: TensorSpec, step: ServerStep) -> npt.NDArray[np.float32]:
        """A tensor of the next model, without momentum."""
        layout = self._coverage.expect_layout
        out, share = self._rooms.pop(spec.name, None), 1.0 / self._coverage.weight
        out = np.empty(spec.shape, np.float32) if out is None else out
        mass = self._mass(spec)
        if step.rate == 1 and spec.name not in self._paired:
            if mass is None and self._sums[spec.name].round_to(out, share):
                return to_global(out, spec, layout)
            if mass is not None and self._close_to(out, spec, mass):
                return out
        for rows, mean, held, base in self._by_rows(spec, mass, follows=step.rate != 1):
            end = mean if base is None else step.towards(base, mean, measured=not spec.kind.trainable)
            if held is None or base is None:
                out[rows] = end
            else:
                out[rows] = base
                np.copyto(out[rows], end, where=held, casting="same_kind")
        return to_global(out, spec, layout)

    def moving(
        self, spec: TensorSpec, step: ServerStep, velocity: npt.NDArray[np.float32] | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A tensor of the next model, and its velocity.

        Args:
            spec: A tensor that is trained.
            step: The server's.
            velocity: Of the round before; None for zero.
        """
        layout = self._coverage.expect_layout
        base = to_layout(self._base[spec.name], spec, layout)
        start = np.zeros(spec.shape, np.float32) if velocity is None else velocity
        moving = np.array(to_layout(start, spec, layout), np.float32)
        out = np.empty(spec.shape, np.float32)
        for rows, mean, held, _ in self._by_rows(spec, self._mass(spec), follows=False):
            following, speed = step.moving(base[rows], mean, moving[rows])
            if held is None:
                out[rows], moving[rows] = following, speed
            else:
                out[rows] = np.where(held, following, base[rows])
                moving[rows] = np.where(held, speed, moving[rows])
        return to_global(out, spec, layout), to_global(moving, spec, layout)

    def _close_to(self, out: npt.NDArray[np.float32], spec: TensorSpec, mass: npt.NDArray[np.int64]) -> bool:
        """Put a tensor of which not all hold everything into `out`, in the model's order, where that goes quickly."""
        grid = into_model(self._coverage.expect_layout, spec) if compiled_kernels.in_use() and mass.size else None
        if grid is None or self._rule == "fill" or mass.size > mass.shape[0] * math.prod(mass.shape[1:2]):
            return False
        held = mass.reshape(mass.shape[0], -1)
        share = np.where(held > 0, 1.0 / np.maximum(held, 1), 0.0)
        whole = np.ascontiguousarray(np.broadcast_to(share, (grid.rows.size, grid.columns.size)))
        base = np.ascontiguousarray(self._base[spec.name])
        return self._sums[spec.name].close_to(out, base, whole, *grid)

    def _mass(self, spec: TensorSpec) -> npt.NDArray[np.int64] | None:
        """What a tensor's sums are divided by; None for all weight."""
        # Zero filling divides by all weight, whoever holds a coordinate.
        return None if self._rule == "zero" and spec.kind.trainable else self._coverage.mass(spec)

    def _by_rows(self, spec: TensorSpec, mass: npt.NDArray[np.int64] | None, *, follows: bool) -> Iterator[Rows]:
        """Means by runs of rows, in the fold's layout; with the base where it is asked for or needed."""
        sums, weight = self._sums[spec.name], self._coverage.weight
        fill = self._rule == "fill" and spec.kind.trainable and mass is not None
        everywhere = mass is None or int(mass.min(initial=MAX_WEIGHT)) > 0
        base = None
        if follows or fill or not everywhere:
            base = to_layout(self._base[spec.name], spec, self._coverage.expect_layout)
        share = None if mass is None or fill else np.broadcast_to(1.0 / np.maximum(mass, 1), spec.shape)
        mass = None if mass is None else np.broadcast_to(mass, spec.shape)
        spare: Float64s | None = None
        for rows in row_blocks(spec.shape):
            before = None if base is None else base[rows]
            held = None if everywhere or mass is None else mass[rows] > 0
            if fill and mass is not None and before is not None:
                # As if whoever lacks a coordinate had sent the base's value back.
                kept = np.rint(np.ldexp(before.astype(np.float64), VALUE_BITS - sums.span.exponent)).astype(np.int64)
                mean = (sums.limbs[0][rows] + kept * (weight - mass[rows])) * (sums.span.unit * (1.0 / weight))
            else:
                size = sums.limbs[0][rows].shape
                spare = np.empty(size) if spare is None else spare
                mean = sums.value(rows, 1.0 / weight if share is None else 1.0, spare[: size[0]] if size else spare)
                if share is not None:
                    mean *= share[rows]
            if spec.name in self._paired:
                mean = mean + self._variance_of_means(spec, rows, mass)
            yield Rows(rows, mean, held, before)

    def _variance_of_means(self, spec: TensorSpec, rows: Index, mass: npt.NDArray[np.int64] | None) -> Float64s:
        """Var[m] = E[(m − m_t)²] − (E[m] − m_t)², which is exact where all means are equal."""
        layout = self._coverage.expect_layout
        mean = self._architecture.by_name[self._paired[spec.name]]
        part = self._coverage.weight if mass is None else np.maximum(mass[rows], 1)
        off = self._sums[mean.name].value(rows) / part - to_layout(self._base[mean.name], mean, layout)[rows]
        spread: Float64s = self._spread[spec.name].value(rows) / part - off * off
        return np.maximum(spread, 0.0)
