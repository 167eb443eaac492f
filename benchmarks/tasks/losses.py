"""Losses and metrics of the tasks, in torch, as a user gives them with a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BINS = 50


def detection(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of a grid [n, 15, 8, 8]: where objects are, their boxes and classes where there is one (Redmon et al., "You only
    look once", CVPR 2016, eq. 3, with likelihoods in place of squares where something is decided)."""
    there = labels[:, 0]
    found = functional.binary_cross_entropy_with_logits(outputs[:, 0], there, reduction="none")
    box = (torch.sigmoid(outputs[:, 1:5]) - labels[:, 1:5]).abs().sum(1)
    kind = -(outputs[:, 5:].log_softmax(1) * labels[:, 5:]).sum(1)
    return (found + there * (4 * box + kind)).flatten(1).sum(1)


class AveragePrecision(nn.Module):
    """AP50 over all classes: a cell's box counts as found where its own object is of the same class and overlaps by
    half; every other box of a cell is a false one. By bins of confidence."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        sure = torch.sigmoid(outputs[:, 0]) * outputs[:, 5:].softmax(1).amax(1)
        same = outputs[:, 5:].argmax(1) == labels[:, 5:].argmax(1)
        guess, box = torch.sigmoid(outputs[:, 1:5]), labels[:, 1:5]
        scale = torch.tensor([8.0, 8.0, 32.0, 32.0]).reshape(1, 4, 1, 1)
        (gx, gy, gw, gh), (bx, by, bw, bh) = (guess * scale).unbind(1), (box * scale).unbind(1)
        wide = (torch.minimum(gx + gw / 2, bx + bw / 2) - torch.maximum(gx - gw / 2, bx - bw / 2)).clamp(min=0)
        high = (torch.minimum(gy + gh / 2, by + bh / 2) - torch.maximum(gy - gh / 2, by - bh / 2)).clamp(min=0)
        both = wide * high
        overlap = both / (gw * gh + bw * bh - both + 1e-6)
        right = (labels[:, 0] > 0.5) & same & (overlap >= 0.5)
        places = (sure * BINS).floor().clamp(max=BINS - 1)
        bins = places.flatten(1).unsqueeze(2) == torch.arange(BINS, dtype=torch.float32)
        true = (bins & right.flatten(1).unsqueeze(2)).float().sum(1)
        return torch.cat([true, bins.float().sum(1), labels[:, 0].flatten(1).sum(1, keepdim=True)], 1)

    def value(self, sums: Tensor) -> Tensor:
        true, boxes, objects = sums[:BINS], sums[BINS : 2 * BINS], sums[2 * BINS]
        above = torch.triu(torch.ones(BINS, BINS))
        precision = (above @ true) / (above @ boxes).clamp(min=1)
        return (true * precision).sum() / objects.clamp(min=1)


def retrieval(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the nearest other picture of the batch is of the same kind."""
    direction = functional.normalize(outputs, dim=1)
    number = torch.arange(outputs.shape[0])
    near = direction @ direction.T - 4 * (number[:, None] == number).float()
    return (labels[near.argmax(1)] == labels).float()


retrieval.target_shape, retrieval.target_dtype = (), "int64"  # type: ignore[attr-defined]
