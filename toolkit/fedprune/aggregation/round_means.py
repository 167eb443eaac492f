"""The mean of every tensor by a rule of `fedprune.aggregation.fold`, some rows at a time, and the next model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Index
from fedprune.aggregation.layout import map_into_model, row_blocks, to_global, to_layout
from fedprune.aggregation.update_coverage import UpdateCoverage
from fedprune.core.errors import BundleError
from fedprune.model.architecture import TensorSpec

Float64s = npt.NDArray[np.float64]

# The largest step of the server, so that a round can be closed whatever the configuration and the devices.
MAX_RATE = 1000.0


@dataclass(frozen=True)
class ServerStep:
    """One step of the server's optimiser, SGD on the pseudo-gradient w_t − w̄.

    Attributes:
        rate: Share of the way, above 0; above 1 it goes beyond the mean.
        momentum: β, from 0 to below 1.
        damped: The velocity is a moving average, v ← β·v + (1 − β)·rate·(w̄ − w_t), instead of FedAvgM's sum,
            v ← β·v + rate·(w̄ − w_t).
    """

    rate: float = 1.0
    momentum: float = 0.0
    damped: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise BundleError("server momentum", expected="from 0 to below 1", got=self.momentum)
        if not 0 < self.rate <= MAX_RATE:
            raise BundleError("server rate", expected=f"above 0 and at most {MAX_RATE:g}", got=self.rate)

    def step_towards(self, base: npt.NDArray[Any], mean: Float64s, *, measured: bool) -> Float64s:
        """w_t + rate·(w̄ − w_t); w̄ itself at a rate of 1.

        Statistics (`measured`) never go beyond the mean: a variance could become negative.
        """
        rate = min(self.rate, 1.0) if measured else self.rate
        if rate == 1:
            return mean
        out: Float64s = base + rate * (mean - base)
        return out

    def step_with_momentum(
        self, base: npt.NDArray[Any], mean: Float64s, velocity: npt.NDArray[np.float32]
    ) -> tuple[Float64s, Float64s]:
        """w_t + v, and v.

        The rate scales the move that enters v, as FedBuff (Nguyen et al. 2022, Alg. 1) hands its sum of moves, each
        scaled by its own staleness, to the server's optimiser: v keeps what came before at the rate of its own round.
        """
        gain = 1.0 - self.momentum if self.damped else 1.0
        speed: Float64s = self.momentum * velocity.astype(np.float64) + gain * self.rate * (mean - base)
        following: Float64s = base + speed
        return following, speed


class MeanRows(NamedTuple):
    """Some rows of a tensor's mean, in the fold's layout, valid until the next rows are asked for.

    `covered` is which coordinates any update holds (None for all), `base` the base's rows, where they were asked for or
    needed.
    """

    rows: Index
    mean: Float64s
    covered: npt.NDArray[np.bool_] | None
    base: npt.NDArray[np.float32] | None


class RoundMeans:
    """A round's means, of sums (Σ n·w by tensor) in the layout of their coverage, which isn't empty."""

    def __init__(
        self,
        base: Mapping[str, npt.NDArray[np.float32]],
        rule: str,
        coverage: UpdateCoverage,
        sums: Mapping[str, FixedSum],
    ) -> None:
        self._base = base
        self._rule = rule
        self._coverage = coverage
        self._sums = sums

    def next_tensor(self, spec: TensorSpec, step: ServerStep) -> npt.NDArray[np.float32]:
        """A tensor of the next model, without momentum."""
        layout = self._coverage.required_layout
        out = np.empty(spec.shape, np.float32)
        mass = self._divisor(spec)
        # The mean itself needs no base, and compiled kernels can write it in one pass.
        if step.rate == 1:
            if mass is None and self._sums[spec.name].round_to(out, 1.0 / self._coverage.weight):
                return to_global(out, spec, layout)
            if mass is not None and self._close_compiled(out, spec, mass):
                return out
        for rows, mean, covered, base in self._by_rows(spec, mass, follows=step.rate != 1):
            next_rows = mean if base is None else step.step_towards(base, mean, measured=not spec.kind.is_trainable)
            if covered is None or base is None:
                out[rows] = next_rows
            else:
                out[rows] = base
                np.copyto(out[rows], next_rows, where=covered, casting="same_kind")
        return to_global(out, spec, layout)

    def next_tensor_and_velocity(
        self, spec: TensorSpec, step: ServerStep, velocity: npt.NDArray[np.float32] | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A trained tensor of the next model, and its velocity, from that of the round before (None for zero)."""
        layout = self._coverage.required_layout
        base = to_layout(self._base[spec.name], spec, layout)
        former_velocity = np.zeros(spec.shape, np.float32) if velocity is None else velocity
        moving = np.array(to_layout(former_velocity, spec, layout), np.float32)
        out = np.empty(spec.shape, np.float32)
        for rows, mean, covered, _ in self._by_rows(spec, self._divisor(spec), follows=False):
            following, speed = step.step_with_momentum(base[rows], mean, moving[rows])
            if covered is None:
                out[rows], moving[rows] = following, speed
            else:
                out[rows] = np.where(covered, following, base[rows])
                moving[rows] = np.where(covered, speed, moving[rows])
        return to_global(out, spec, layout), to_global(moving, spec, layout)

    def _close_compiled(self, out: npt.NDArray[np.float32], spec: TensorSpec, mass: npt.NDArray[np.int64]) -> bool:
        """Put a tensor that not all updates hold entirely into `out`, in the model's order, if that is compiled.

        Returns whether it was done: `fill` adds the base's own weight, and further cut axes have no kernel.
        """
        is_possible = compiled_kernels.has_kernels() and mass.size
        grid = map_into_model(self._coverage.required_layout, spec) if is_possible else None
        if grid is None or self._rule == "fill" or mass.size > mass.shape[0] * math.prod(mass.shape[1:2]):
            return False
        row_mass = mass.reshape(mass.shape[0], -1)
        share = np.where(row_mass > 0, 1.0 / np.maximum(row_mass, 1), 0.0)
        full_share = np.ascontiguousarray(np.broadcast_to(share, (grid.rows.size, grid.columns.size)))
        base = np.ascontiguousarray(self._base[spec.name])
        return self._sums[spec.name].close_to(out, base, full_share, *grid)

    def _divisor(self, spec: TensorSpec) -> npt.NDArray[np.int64] | None:
        """The divisor of a tensor's sums; None for all weight."""
        # Zero filling divides by all weight, whichever updates hold a coordinate.
        return None if self._rule == "zero" and spec.kind.is_trainable else self._coverage.mass(spec)

    def _by_rows(self, spec: TensorSpec, mass: npt.NDArray[np.int64] | None, *, follows: bool) -> Iterator[MeanRows]:
        """Means by runs of rows, in the fold's layout; with the base where it is asked for or needed.

        By runs, float64 temporaries stay in the cache and don't double the memory of a large tensor.
        """
        sums, weight = self._sums[spec.name], self._coverage.weight
        fill = self._rule == "fill" and spec.kind.is_trainable and mass is not None
        # Where each coordinate is held by some update, none keeps the base's value, and the base isn't read.
        everywhere = mass is None or int(mass.min(initial=MAX_WEIGHT)) > 0
        base = None
        if follows or fill or not everywhere:
            base = to_layout(self._base[spec.name], spec, self._coverage.required_layout)
        share = None if mass is None or fill else np.broadcast_to(1.0 / np.maximum(mass, 1), spec.shape)
        mass = None if mass is None else np.broadcast_to(mass, spec.shape)
        buffer: Float64s | None = None
        for rows in row_blocks(spec.shape):
            base_rows = None if base is None else base[rows]
            covered = None if everywhere or mass is None else mass[rows] > 0
            if fill and mass is not None and base_rows is not None:
                # As if every device without a coordinate had sent the base's value back.
                scaled = np.ldexp(base_rows.astype(np.float64), VALUE_BITS - sums.span.exponent)
                filled = np.rint(scaled).astype(np.int64)
                mean = (sums.limbs[0][rows] + filled * (weight - mass[rows])) * (sums.span.unit * (1.0 / weight))
            else:
                size = sums.limbs[0][rows].shape
                buffer = np.empty(size) if buffer is None else buffer
                mean = sums.value(rows, 1.0 / weight if share is None else 1.0, buffer[: size[0]] if size else buffer)
                if share is not None:
                    mean *= share[rows]
            yield MeanRows(rows, mean, covered, base_rows)
