"""The server's estimates of gradient and curvature, from the updates alone.

CA-HFP (arXiv 2603.12591, Sec. III-A) scores with g and h "approximated from local model variations" and gives no
formula. Ours, per coordinate i and over the devices k that trained it, with η_eff = lr / (1 − momentum) and the mean
gradient of a device's round ĝ_k = −Δ_k / (η_eff · f_k), where f_k are its steps less those that momentum takes to build
up (`fedprune.aggregation.update_sums.free_steps`):

- gradient: ĝ_i = Σ n_k ĝ_{k,i} / Σ n_k;
- curvature, `fisher` (default): ĥ_i = Σ n_k s_k ĝ_{k,i}² / Σ n_k, the diagonal of the empirical Fisher information.
  s_k is the number of different samples behind ĝ_k: of s_k samples the mean gradient scatters by 1/s_k of what single
  ones do, so that s_k · ĝ_k² is, near a minimum, the mean of the samples' own squared gradients, which the Hessian's
  diagonal approaches there. Without the factor it is hundreds of times too small;
- curvature, `secant`: ĥ_i = |ĝ_i(t) − ĝ_i(t−1)| / |w_i(t) − w_i(t−1)|, at most 2/η_eff, above which SGD would have
  diverged. Where weights move together or gradients are noisy, it mostly measures these.

Each estimate is an exponential moving average (0.9) that begins with its first observation. If no device trained a
coordinate, its estimates keep their values. So a pruned channel is not mistaken for one whose gradient is 0, and can
return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture

Estimator = Literal["fisher", "secant"]

DECAY = 0.9
_STILL = 1e-8
"""A weight that moved less than this says nothing about curvature."""


@dataclass
class Evidence:
    """Estimates for every trainable tensor, in global coordinates.

    Attributes:
        architecture: The model.
        estimator: How curvature is estimated.
        gradient: ĝ by tensor name.
        curvature: ĥ by tensor name.
        trained: Whether any device ever trained a coordinate, by tensor name.
        known: Whether ĥ has an observation; with `secant` that takes two rounds.
        last: With `secant`, gradient and weight when a coordinate was last trained, by tensor name.
    """

    architecture: Architecture
    estimator: Estimator = "fisher"
    gradient: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    curvature: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    trained: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    known: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    last: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = field(default_factory=dict)

    @classmethod
    def empty(cls, architecture: Architecture, estimator: Estimator = "fisher") -> Evidence:
        """No evidence yet: all estimates are zero. Raises `BundleError` if there is no such estimator."""
        if estimator not in ("fisher", "secant"):
            raise BundleError("curvature estimator", expected="fisher or secant", got=repr(estimator))
        out = cls(architecture, estimator)
        for spec in architecture.trainable:
            out.gradient[spec.name] = np.zeros(spec.shape, np.float32)
            out.curvature[spec.name] = np.zeros(spec.shape, np.float32)
            out.trained[spec.name] = np.zeros(spec.shape, np.bool_)
            out.known[spec.name] = np.zeros(spec.shape, np.bool_)
            if estimator == "secant":
                out.last[spec.name] = (np.zeros(spec.shape, np.float32), np.zeros(spec.shape, np.float32))
        return out

    def update(self, fold: Fold, lr: float, samples: float = 1.0, decay: float = DECAY) -> None:
        """Take in one round (the formulas are the module's).

        Raises `BundleError` if the fold is of another architecture or without evidence, or the rates are out of range.

        Args:
            fold: The round's fold, made with `evidence=True` and the devices' momentum; open or closed.
            lr: The devices' learning rate, in the middle of the round where it changes.
            samples: Different samples per step: the batch size, divided by the number of epochs.
            decay: Weight of the old estimate in the moving average, from 0 to below 1.
        """
        if fold.architecture.digest != self.architecture.digest:
            raise BundleError("evidence and fold belong to different architectures")
        if not 0 <= decay < 1 or not lr >= 0 or not samples > 0:
            raise BundleError(
                "rates of evidence",
                expected="lr from 0 up, decay below 1, samples above 0",
                got=(lr, decay, samples),
            )
        rate = lr / (1 - fold.momentum)
        if rate == 0:
            return  # nothing moved because of a gradient
        for spec in self.architecture.trainable:
            name = spec.name
            step, square, held = fold.movement(name)
            slope = (-step / rate).astype(np.float32)
            if self.estimator == "fisher":
                bend, seen = (samples * square / rate**2).astype(np.float32), held
            else:
                bend, seen = self._secant(name, slope, fold.base[name], held, 2 / rate)
            self.gradient[name] = _average(self.gradient[name], slope, self.trained[name], held, decay)
            self.curvature[name] = _average(self.curvature[name], bend, self.known[name], seen, decay)
            self.trained[name] = self.trained[name] | held
            self.known[name] = self.known[name] | seen

    def _secant(
        self,
        name: str,
        slope: npt.NDArray[np.float32],
        weight: npt.NDArray[np.float32],
        held: npt.NDArray[np.bool_],
        most: float,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        slope_before, weight_before = self.last[name]
        way = np.abs(weight.astype(np.float64) - weight_before)
        seen = held & self.trained[name] & (way > _STILL)
        bend = np.abs(slope.astype(np.float64) - slope_before) / np.maximum(way, _STILL)
        self.last[name] = (np.where(held, slope, slope_before), np.where(held, weight, weight_before))
        return np.minimum(bend, most).astype(np.float32), seen

    def trained_channels(self) -> tuple[npt.NDArray[np.bool_], ...]:
        """Per group and channel, whether any device ever trained a coordinate that makes the channel."""
        out = tuple(np.zeros(n, np.bool_) for n in self.architecture.sizes)
        for spec in self.architecture.trainable:
            flags = self.trained[spec.name]
            for a in self.architecture.output_axes(spec.name):
                row = np.asarray(flags.any(axis=tuple(i for i in range(flags.ndim) if i != a)))
                at = 0
                for s in spec.axes[a].segments:
                    if s.group != FIXED:
                        part = row[at : at + s.length].reshape(s.count, s.inner).any(axis=1)
                        out[s.group][s.start : s.start + s.count] |= part
                    at += s.length
        return out

    @property
    def complete(self) -> bool:
        """Whether every channel was trained at least once, so that warm-up may end."""
        return all(flags.all() for flags in self.trained_channels())

    def to_tensors(self) -> dict[str, npt.NDArray[Any]]:
        """For storage by `fedprune.core.tensorfile`."""
        out: dict[str, npt.NDArray[Any]] = {}
        for spec in self.architecture.trainable:
            name = spec.name
            out[f"{name}::gradient"] = self.gradient[name]
            out[f"{name}::curvature"] = self.curvature[name]
            out[f"{name}::trained"] = self.trained[name]
            out[f"{name}::known"] = self.known[name]
            if self.estimator == "secant":
                out[f"{name}::last_gradient"], out[f"{name}::last_weight"] = self.last[name]
        return out

    @classmethod
    def from_tensors(cls, architecture: Architecture, tensors: Mapping[str, npt.NDArray[Any]]) -> Evidence:
        """Read what `to_tensors` wrote; which tensors there are tells the estimator. Raises `BundleError` if a tensor
        is missing, unknown, or of another type or shape."""
        secant = any(n.endswith("::last_gradient") for n in tensors)
        out = cls.empty(architecture, "secant" if secant else "fisher")
        expected = out.to_tensors()
        unknown = sorted(set(tensors) ^ set(expected))
        if unknown:
            raise BundleError(
                "the evidence lacks a tensor of the architecture, or has an unknown one", got=repr(unknown[0])
            )
        for name, zero in expected.items():
            value = tensors[name]
            if value.dtype != zero.dtype or value.shape != zero.shape:
                raise BundleError(
                    f"evidence tensor {name}",
                    expected=f"{zero.dtype} {zero.shape}",
                    got=f"{value.dtype} {value.shape}",
                )
            if value.dtype == np.float32 and not np.isfinite(value).all():
                raise BundleError(f"evidence tensor {name}", expected="finite numbers")
        for spec in architecture.trainable:
            n = spec.name
            out.gradient[n], out.curvature[n] = tensors[f"{n}::gradient"], tensors[f"{n}::curvature"]
            out.trained[n], out.known[n] = tensors[f"{n}::trained"], tensors[f"{n}::known"]
            if secant:
                out.last[n] = (tensors[f"{n}::last_gradient"], tensors[f"{n}::last_weight"])
        return out


def _average(
    before: npt.NDArray[np.float32],
    now: npt.NDArray[np.float32],
    known: npt.NDArray[np.bool_],
    seen: npt.NDArray[np.bool_],
    decay: float,
) -> npt.NDArray[np.float32]:
    """before where nothing was seen, now where nothing was known, else decay·before + (1 − decay)·now."""
    mixed = np.float32(decay) * before + np.float32(1 - decay) * now
    out: npt.NDArray[np.float32] = np.where(seen, np.where(known, mixed, now), before)
    return out
