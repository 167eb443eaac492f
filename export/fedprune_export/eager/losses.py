"""Losses of a training step, sample by sample: torch's functions of the same names, differentiated by torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from fedprune.training import step_contract
from fedprune_export.eager.context import Tensor


@dataclass
class Judged:
    """What a batch's outputs are worth.

    Attributes:
        rows: Loss of every sample [N], times its class weight; 0 for padding.
        divisor: What their sum is divided by.
        hits: How many classes, with `bce` labels, are right; None where numbers are predicted.
    """

    rows: Tensor
    divisor: Tensor
    hits: Tensor | None


def judge(loss: str, logits: Tensor, y: Tensor, feeds: Mapping[str, Tensor], present: Tensor | None) -> Judged:
    """Compare a batch's outputs with its labels.

    Args:
        loss: `cross_entropy`, `bce`, `mse` or `huber`.
        logits: [N, K].
        y: Labels, as the training graph takes them.
        feeds: Vectors over classes and numbers of the loss, by input name of the training graph.
        present: 1 for samples, 0 for padding [N]; None where there is no padding.
    """
    if step_contract.LOGIT_OFFSET in feeds:
        logits = logits + feeds[step_contract.LOGIT_OFFSET]
    if step_contract.CLASS_MASK in feeds:
        logits = torch.where(feeds[step_contract.CLASS_MASK] > 0, logits, torch.zeros_like(logits))
    there = torch.ones(y.shape[0], device=y.device) if present is None else present
    right: Tensor | None
    if loss == "cross_entropy":
        rows, weights, right = _cross_entropy(logits, y, feeds)
        divisor = (weights * there).sum()
    else:
        each, hit = _LOSSES[loss](logits, y, feeds)
        rows, divisor = each.mean(1), there.sum()
        right = None if hit is None else hit.sum(1)
    hits = None if right is None else (right * there.to(torch.int64)).sum()
    return Judged(rows * there, feeds.get(step_contract.DIVISOR, divisor), hits)


def _cross_entropy(logits: Tensor, y: Tensor, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows −Σ a_c · log p_c with a_c = (1 − ε)·w_y·[c = y] + ε/K·w_c; the weights w_y; and which are right.

    With mixup, w_y·[c = y] is λ·w_y·[c = y] + (1 − λ)·w_y'·[c = y'].
    """
    log_p = torch.log_softmax(logits, 1)
    classes = logits.shape[1]
    weight = feeds.get(step_contract.CLASS_WEIGHT)
    own = log_p.gather(1, y[:, None])[:, 0]
    of_class = torch.ones_like(own) if weight is None else weight[y]
    rows, label = -of_class * own, y
    if step_contract.Y_PARTNER in feeds:
        partner, first = feeds[step_contract.Y_PARTNER], feeds[step_contract.Y_SHARE]
        other = log_p.gather(1, partner[:, None])[:, 0]
        rows = first * rows - (1 - first) * (other if weight is None else weight[partner] * other)
        label = torch.where(first < 0.5, partner, y)
    if step_contract.LABEL_SMOOTHING in feeds:
        share = feeds[step_contract.LABEL_SMOOTHING]
        spread = log_p if weight is None else log_p * weight
        rows = (1 - share) * rows - share / classes * spread.sum(1)
    return rows, of_class, (logits.argmax(1) == label).to(torch.int64)


def _bce(logits: Tensor, y: Tensor, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    weight = feeds.get(step_contract.CLASS_WEIGHT)
    positive = y if weight is None else y * weight
    each = (1 - y) * _softplus(logits) + positive * _softplus(-logits)
    return each, ((logits > 0) == (y > 0.5)).to(torch.int64)


def _softplus(x: Tensor) -> Tensor:
    return functional.relu(x) + torch.log1p(torch.exp(-x.abs()))


def _mse(logits: Tensor, y: Tensor, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return (logits - y).square(), None


def _huber(logits: Tensor, y: Tensor, feeds: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    size = (logits - y).abs()
    c = torch.minimum(size, feeds[step_contract.HUBER_DELTA])
    return c * (size - c / 2), None


_LOSSES = {"bce": _bce, "mse": _mse, "huber": _huber}
