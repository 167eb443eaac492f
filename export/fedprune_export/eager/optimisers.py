"""From gradients to the next weights, as training graphs do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedprune.training import step_contract
from fedprune_export.eager.context import Tensor

_CLIP_EPSILON = 1e-6
_TINY = float(torch.finfo(torch.float32).tiny)

Feeds = Mapping[str, Tensor]
"""What a training graph is fed, by input name."""


def used(name: str, feeds: Feeds) -> Tensor:
    """What the forward pass reads of a trained tensor: w · mask, and with a threshold w · 1[|w| ≥ θ]."""
    value = feeds[name]
    if step_contract.mask(name) in feeds:
        value = value * feeds[step_contract.mask(name)]
    if step_contract.threshold(name) in feeds:
        value = torch.where(feeds[name].abs() >= feeds[step_contract.threshold(name)], value, torch.zeros_like(value))
    return value


def _passed(name: str, gradient: Tensor, feeds: Feeds) -> Tensor:
    """From what was read to the tensor: g, with a threshold g · 1[|w| ≥ θ] · (1 + 2θ|w|/(|w| + θ)²)."""
    theta = feeds.get(step_contract.threshold(name))
    if theta is None:
        return gradient
    size = feeds[name].abs()
    whole = (size + theta).clamp(min=_TINY)
    slope = 1 + size / whole * (2 * theta / whole)
    return torch.where(size >= theta, gradient * slope, torch.zeros_like(gradient))


def updated(
    names: Sequence[str], gradients: Feeds, feeds: Feeds, outputs: set[str], optimizer: str
) -> dict[str, Tensor]:
    """Every tensor's next value and state, and what else of gradients is asked for, by output name.

    Args:
        names: The trained tensors.
        gradients: Gradients of the data loss by what the forward pass read of them.
        feeds: What the step was fed.
        outputs: Names of the training graph's outputs.
        optimizer: `sgd`, `adam` or `adamw`.
    """
    out: dict[str, Tensor] = {}
    found = {name: _objective(name, gradients[name], feeds, outputs, out) for name in names}
    if step_contract.CLIP_NORM in feeds:
        norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
        share = (feeds[step_contract.CLIP_NORM] / (norm + _CLIP_EPSILON)).clamp(max=1.0)
        found = {name: g * share for name, g in found.items()}
    pace = None if optimizer == "sgd" else _Pace(feeds)
    for name, gradient in found.items():
        w, mask = feeds[name], feeds.get(step_contract.mask(name))
        if pace is None:
            change = _sgd(name, _decayed(w, gradient, mask, feeds), feeds, out)
        elif optimizer == "adam":
            change = _adam(name, _decayed(w, gradient, mask, feeds), feeds, pace, out)
        else:
            change = (
                _adam(name, gradient, feeds, pace, out)
                + feeds[step_contract.LR] * feeds[step_contract.WEIGHT_DECAY] * w
            )
        after = w - change
        out[step_contract.following(name)] = after if mask is None else torch.where(mask > 0, after, w)
    return out


def _objective(name: str, gradient: Tensor, feeds: Feeds, outputs: set[str], out: dict[str, Tensor]) -> Tensor:
    """The gradient of the whole objective; sums and squares are those of the data loss alone."""
    mask = feeds.get(step_contract.mask(name))
    gradient = _passed(name, gradient, feeds)
    if step_contract.total(name) in feeds:
        gradient = out[step_contract.following(step_contract.total(name))] = feeds[step_contract.total(name)] + gradient
    if step_contract.squares(name) in feeds:
        seen = gradient if mask is None else gradient * mask
        out[step_contract.following(step_contract.squares(name))] = feeds[step_contract.squares(name)] + seen.square()
    if step_contract.anchor(name) in feeds:
        gradient = gradient + (feeds[name] - feeds[step_contract.anchor(name)]) * feeds[step_contract.strength(name)]
    if mask is not None:
        gradient = gradient * mask
    if step_contract.gradient(name) in outputs:
        out[step_contract.gradient(name)] = gradient
    return gradient


def _decayed(w: Tensor, gradient: Tensor, mask: Tensor | None, feeds: Feeds) -> Tensor:
    """g + wd · w, where the mask lets it."""
    out = gradient + w * feeds[step_contract.WEIGHT_DECAY]
    return out if mask is None else out * mask


def _sgd(name: str, gradient: Tensor, feeds: Feeds, out: dict[str, Tensor]) -> Tensor:
    """Buf = m · buf + g; w loses lr · buf."""
    buffer = step_contract.buffer(name)
    moved = out[step_contract.following(buffer)] = feeds[buffer] * feeds[step_contract.MOMENTUM] + gradient
    return moved * feeds[step_contract.LR]


class _Pace:
    """What Adam's step number makes of its numbers, in float64 where they are near 1."""

    def __init__(self, feeds: Feeds) -> None:
        beta1, beta2, number = (
            feeds[step_contract.BETA1],
            feeds[step_contract.BETA2],
            feeds[step_contract.STEP_NUMBER].to(torch.float64),
        )
        self.keep1, self.keep2 = beta1.to(torch.float32), beta2.to(torch.float32)
        self.take1, self.take2 = (1 - beta1).to(torch.float32), (1 - beta2).to(torch.float32)
        self.rate = (feeds[step_contract.LR].to(torch.float64) / (1 - beta1**number)).to(torch.float32)
        self.root = (1 - beta2**number).sqrt().to(torch.float32)


def _adam(name: str, gradient: Tensor, feeds: Feeds, pace: _Pace, out: dict[str, Tensor]) -> Tensor:
    """M = β1·m + (1 − β1)·g; v = β2·v + (1 − β2)·g²; w loses lr/(1 − β1^t) · m / (√v/√(1 − β2^t) + ε)."""
    first, second = step_contract.buffer(name), step_contract.second(name)
    mean = out[step_contract.following(first)] = feeds[first] * pace.keep1 + gradient * pace.take1
    square = out[step_contract.following(second)] = feeds[second] * pace.keep2 + gradient.square() * pace.take2
    return mean / (square.sqrt() / pace.root + feeds[step_contract.EPSILON]) * pace.rate
