"""Estimates a model's gradient and curvature from nothing but the devices' updates (class `Evidence`).

CA-HFP (arXiv 2603.12591, Sec. III-A) scores with g and h "approximated from local model variations" and gives no
formula. Ours, per coordinate i and over the devices k that trained it, with η_eff = lr / (1 − momentum) and the mean
gradient of a device's round ĝ_k = −Δ_k / (η_eff · f_k), where f_k are its steps less those that momentum takes to build
up (`fedprune.aggregation.update_sums.free_steps`):

- gradient: ĝ_i = Σ n_k ĝ_{k,i} / Σ n_k;
- curvature: ĥ_i = Σ n_k s_k ĝ_{k,i}² / Σ n_k, the diagonal of the empirical Fisher information.
  s_k is the number of different samples behind ĝ_k: of s_k samples the mean gradient scatters by 1/s_k of what single
  ones do, so that s_k · ĝ_k² is, near a minimum, the mean of the samples' own squared gradients, which the Hessian's
  diagonal approaches there. Without the factor it is hundreds of times too small.

Each estimate is an exponential moving average (0.9) that begins with its first observation. If no device trained a
coordinate, its estimates keep their values. So a pruned channel is not mistaken for one whose gradient is 0, and can
return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture, Axis

# Weight of the old estimates in the moving averages.
DECAY = 0.9

# The fields of `Evidence` that are stored.
_ESTIMATES = ("gradient", "curvature", "trained")

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]


@dataclass
class Evidence:
    """Estimates of gradient ĝ and curvature ĥ for every trainable tensor by name, in global coordinates; and by name,
    whether any device ever trained a coordinate."""

    architecture: Architecture
    gradient: dict[str, Floats] = field(default_factory=dict)
    curvature: dict[str, Floats] = field(default_factory=dict)
    trained: dict[str, Bits] = field(default_factory=dict)

    @classmethod
    def empty(cls, architecture: Architecture) -> Evidence:
        """Evidence of nothing: all estimates are zero."""
        evidence = cls(architecture)
        for spec in architecture.trainable:
            evidence.gradient[spec.name] = np.zeros(spec.shape, np.float32)
            evidence.curvature[spec.name] = np.zeros(spec.shape, np.float32)
            evidence.trained[spec.name] = np.zeros(spec.shape, np.bool_)
        return evidence

    def update(self, fold: Fold, lr: float, samples_per_step: float = 1.0) -> None:
        """Take in one round (the formulas are the module's) by its fold, made with `evidence=True` and the devices'
        momentum.

        `lr` is the devices' learning rate; if it changes within a round, that of the round's middle. `samples_per_step`
        is the batch size divided by the number of epochs: times a device's steps it is s_k. Raises `BundleError` if the
        fold is of another architecture or without evidence, or the rates are out of range.
        """
        if fold.architecture.digest != self.architecture.digest:
            raise BundleError("evidence and fold belong to different architectures")
        if not lr >= 0 or not samples_per_step > 0:
            raise BundleError("rates of evidence", expected="lr from 0 up, samples above 0", got=(lr, samples_per_step))
        rate = lr / (1 - fold.momentum)
        if rate == 0:
            return  # nothing moved because of a gradient
        for spec in self.architecture.trainable:
            name = spec.name
            mean_step, mean_square, trained_now = fold.movement(name)
            gradient = (-mean_step / rate).astype(np.float32)
            curvature = (samples_per_step * mean_square / rate**2).astype(np.float32)
            self.gradient[name] = _moving_average(self.gradient[name], gradient, self.trained[name], trained_now)
            self.curvature[name] = _moving_average(self.curvature[name], curvature, self.trained[name], trained_now)
            self.trained[name] = self.trained[name] | trained_now

    def trained_channels(self) -> tuple[Bits, ...]:
        """Per group and channel, whether any device ever trained a coordinate that makes the channel."""
        counts = tuple(np.zeros(n, np.int64) for n in self.architecture.sizes)
        for spec in self.architecture.trainable:
            flags = self.trained[spec.name]
            for axis in self.architecture.output_axes(spec.name):
                row = flags.sum(axis=tuple(i for i in range(flags.ndim) if i != axis), dtype=np.int64)
                add_to_channels(counts, spec.axes[axis], row)
        return tuple(count > 0 for count in counts)

    @property
    def is_complete(self) -> bool:
        """Whether every channel was trained at least once, so that warm-up may end."""
        return all(flags.all() for flags in self.trained_channels())

    def to_tensors(self) -> dict[str, npt.NDArray[Any]]:
        """All estimates by name and tensor, to be stored by `fedprune.core.tensorfile`."""
        return {
            f"{spec.name}::{estimate}": getattr(self, estimate)[spec.name]
            for spec in self.architecture.trainable
            for estimate in _ESTIMATES
        }

    @classmethod
    def from_tensors(cls, architecture: Architecture, tensors: Mapping[str, npt.NDArray[Any]]) -> Evidence:
        """Read what `to_tensors` wrote. Raises `BundleError` if a tensor is missing, unknown, or of another type or
        shape."""
        expected = cls.empty(architecture).to_tensors()
        for name in sorted(set(tensors) | set(expected)):
            value, template = tensors.get(name), expected.get(name)
            if value is None or template is None or (value.dtype, value.shape) != (template.dtype, template.shape):
                expected_text, got = ("nothing" if v is None else f"{v.dtype} {v.shape}" for v in (template, value))
                raise BundleError(f"evidence tensor {name}", expected=expected_text, got=got)
            # One NaN would stay in the moving averages for good.
            if not np.isfinite(value).all():
                raise BundleError(f"evidence tensor {name}", expected="finite numbers")
        names = [spec.name for spec in architecture.trainable]
        return cls(architecture, *({name: tensors[f"{name}::{estimate}"] for name in names} for estimate in _ESTIMATES))


def add_to_channels(sums: Sequence[npt.NDArray[Any]], axis: Axis, row: npt.NDArray[Any]) -> None:
    """Add numbers per index of an axis to those of its channels, one array per group."""
    offset = 0
    for segment in axis.segments:
        # Indices that no cut touches belong to no channel.
        if segment.group != FIXED:
            sums[segment.group][segment.start : segment.start + segment.count] += (
                row[offset : offset + segment.length].reshape(segment.count, segment.inner).sum(axis=1)
            )
        offset += segment.length


def _moving_average(estimate: Floats, observation: Floats, was_trained: Bits, is_observed: Bits) -> Floats:
    """Update moving averages: the old estimate where nothing was observed, the observation where there was none before,
    a mixture elsewhere."""
    average = np.float32(DECAY) * estimate + np.float32(1 - DECAY) * observation
    updated: Floats = np.where(is_observed, np.where(was_trained, average, observation), estimate)
    return updated
