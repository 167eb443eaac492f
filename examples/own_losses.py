"""Losses of your own, in torch: of masks, of embeddings, of sequences (docs/export.md#a-loss-of-your-own).

Copy what you need next to your network and name it where the network is named: `--loss own_losses:dice`, `[model] loss`
or `fx.load(..., loss=dice)`. Each takes outputs and labels and returns one number per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.1
NEVER = -1e30
"""In place of the logarithm of 0: sums of it stay finite."""


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    """(p − y)² times the cross-entropy of labels from 0 to 1, from logits (Lin et al., "Focal loss for dense object
    detection", ICCV 2017, eq. 4, with γ = 2; Li et al., "Generalized focal loss", NeurIPS 2020, eq. 6)."""
    far = torch.sigmoid(outputs) - labels
    # −log of a sigmoid is a softplus, which keeps its digits where the sigmoid is 1.
    each = labels * functional.softplus(-outputs) + (1 - labels) * functional.softplus(outputs)
    return (far * far * each).flatten(1).mean(1)


def dice(outputs: Tensor, labels: Tensor) -> Tensor:
    """1 − the overlap of masks [n, classes, ...], from logits (Milletari et al., "V-Net", 3DV 2016, with sums in place
    of squares). The 1 on both sides is for classes without any place, which have none to lose."""
    share, mask = torch.sigmoid(outputs).flatten(2), labels.flatten(2)
    return 1 - ((2 * (share * mask).sum(2) + 1) / (share.sum(2) + mask.sum(2) + 1)).mean(1)


def infonce(outputs: Tensor, labels: Tensor) -> Tensor:
    """−log of the softmax by which a row [n, D] of a batch picks the rows with its label among all others, by their
    cosines: supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2). 0 for a row that is alone."""
    unit = functional.normalize(outputs, dim=1)
    same, itself = _pairs(labels)
    # The lowest likelihood instead of −∞: times 0 that would not be a number.
    likely = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -1e30).log_softmax(1)
    return -likely.masked_fill(~same, 0.0).sum(1) / same.float().sum(1).clamp(min=1)


infonce.target_shape, infonce.target_dtype = (), "int64"  # type: ignore[attr-defined]


def infonce_of_views(outputs: Tensor, labels: Tensor) -> Tensor:
    """The same of several views of every sample [n, views, D], which belong together, too; with another label for every
    sample it is NT-Xent (Chen et al., "SimCLR", ICML 2020, eq. 1)."""
    views = outputs.shape[1]
    repeated = labels[:, None].expand(-1, views).reshape(-1)
    return infonce(outputs.flatten(0, 1), repeated).reshape(-1, views).mean(1)


infonce_of_views.target_shape, infonce_of_views.target_dtype = (), "int64"  # type: ignore[attr-defined]


def triplet(outputs: Tensor, labels: Tensor) -> Tensor:
    """log(1 + e^(p − n)) with Euclidean distances p to the farthest row [n, D] of the batch with the same label, and n
    to the nearest with another: batch hard with a soft margin (Hermans et al., arXiv:1703.07737, eq. 5). A row that
    lacks either has a loss of 0."""
    same, itself = _pairs(labels)
    other = ~same & ~itself
    # Which are the hardest is found from products; their distances are computed from differences, which are exact.
    centred = (outputs - outputs.mean(0)).detach()
    far = (centred * centred).sum(1) - 2 * (centred @ centred.T)
    farthest = far.masked_fill(~same, -1e30).argmax(1)
    nearest = far.masked_fill(~other, 1e30).argmin(1)
    p, n = ((outputs - outputs[rows]).norm(dim=1) for rows in (farthest, nearest))
    both = (same.float().amax(1) * other.float().amax(1)) > 0
    return torch.where(both, functional.softplus(p - n), 0.0)


triplet.target_shape, triplet.target_dtype = (), "int64"  # type: ignore[attr-defined]


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of rows are two with the same label, and which are one row twice."""
    number = torch.arange(labels.shape[0])
    itself = number[:, None] == number
    return (labels[:, None] == labels) & ~itself, itself


class Ctc:
    """−log of the probability of a sequence of labels, over all its alignments to the steps of outputs [n, classes,
    steps] (Graves et al., "Connectionist temporal classification", ICML 2006, eq. 6 to 8); the blank is class 0.

    Labels are as many as there are steps: the sequence, then zeros; those of steps after a sample's end are negative. A
    sequence that has no alignment, because it is too long, has a loss of 0 (torch's `zero_infinity`). Write
    `ctc = Ctc(steps)` and name that: a training graph has some 30 operators for each step.
    """

    target_dtype = "int64"

    def __init__(self, steps: int) -> None:
        self.target_shape = (steps,)

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        steps, states = outputs.shape[2], 2 * outputs.shape[2] + 1  # a blank, the first label, a blank, the second, ...
        sequence, after = labels.clamp(min=0), (labels < 0)[:, None]
        chances = outputs.log_softmax(1)
        blank = torch.tensor([0.0, *[NEVER] * (outputs.shape[1] - 1)])[None, :, None]
        chances = torch.where(after, blank, chances)
        order = torch.tensor([0 if s % 2 == 0 else s // 2 + 1 for s in range(states)])
        label = functional.pad(sequence, (1, 0)).index_select(1, order)
        # A label that isn't the one before is reached from there, without the blank between.
        direct = torch.where(label[:, 2:] == label[:, :-2], NEVER, 0.0)
        direct = functional.pad(direct, (2, 0), value=NEVER)
        at = chances.gather(1, label[:, :, None].expand(-1, -1, steps)).unbind(2)
        reached = at[0] + torch.tensor([0.0, 0.0, *[NEVER] * (states - 2)])
        for now in at[1:]:
            earlier = functional.pad(reached, (2, 0), value=NEVER)
            sources = torch.stack([reached, earlier[:, 1:-1], earlier[:, :-2] + direct], 2)
            reached = sources.logsumexp(2) + now
        beyond = torch.arange(states) - 2 * (sequence > 0).sum(1, keepdim=True)
        last = (beyond < 0.5) & (beyond > -1.5)
        lost = -reached.masked_fill(~last, NEVER).logsumexp(1)
        return torch.where(lost < -NEVER / 10, lost, 0.0)
