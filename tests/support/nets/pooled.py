"""A net whose input has any length between bounds, and which averages over its places."""

import torch
from torch import Tensor, nn


class Pooled(nn.Module):
    """A convolution over samples [2, 3 to 8], and the mean over their places: three classes."""

    input_shape = (2, "3:8")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.head((torch.relu(self.conv(x)) * mask.unsqueeze(1)).sum(2) / mask.sum(1, keepdim=True))
        return out
