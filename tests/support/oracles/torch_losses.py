"""Losses of samples [n] in torch, in any precision: what built-in losses and the examples must compute."""

import torch
from torch.nn import functional


def focal(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    each = functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    return ((torch.sigmoid(outputs) - labels).abs() ** 2 * each).flatten(1).mean(1)


def dice(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    share, mask = (v.reshape(*outputs.shape[:2], -1) for v in (torch.sigmoid(outputs), labels))
    return 1 - ((2 * (share * mask).sum(2) + 1) / (share.sum(2) + mask.sum(2) + 1)).mean(1)


def ctc(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Steps of negative labels are after a sample's end."""
    steps, lengths = (y >= 0).sum(1), (y > 0).sum(1)
    return functional.ctc_loss(
        z.permute(2, 0, 1).log_softmax(2), y.clamp(min=0), steps, lengths, reduction="none", zero_infinity=True
    )


def infonce(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of every view the mean cross-entropy of picking each one that belongs to it among all but itself."""
    views = 1 if z.ndim == 2 else z.shape[1]
    rows, labels = functional.normalize(z.reshape(len(z) * views, -1), dim=1), y.repeat_interleave(views)
    each = []
    for i in range(len(rows)):
        negatives = [j for j in range(len(rows)) if j != i]
        aims = [k for k, j in enumerate(negatives) if labels[j] == labels[i]]
        scores = (rows[negatives] @ rows[i] / 0.1)[None]
        losses = [functional.cross_entropy(scores, torch.tensor([k])) for k in aims]
        each.append(torch.stack(losses).mean() if losses else 0 * rows[i].sum())
    return torch.stack(each).reshape(len(z), views).mean(1)


def triplet(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    each = []
    for i in range(len(z)):
        same = [(z[i] - z[j]).norm() for j in range(len(z)) if j != i and y[j] == y[i]]
        negative_distances = [(z[i] - z[j]).norm() for j in range(len(z)) if y[j] != y[i]]
        both = same and negative_distances
        each.append(functional.softplus(max(same) - min(negative_distances)) if both else 0 * z[i].sum())
    return torch.stack(each)


def distill(outputs: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student, aim = ((v / temperature).log_softmax(1) for v in (outputs, teacher))
    each = functional.kl_div(student, aim, reduction="none", log_target=True).sum(1)
    return temperature**2 * each.reshape(len(outputs), -1).mean(1)
