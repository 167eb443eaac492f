"""A small network without kinks: its gradients have no signs that rounding could flip, so that trainers can be compared
over many steps."""

import torch
from torch import nn

from support.nets.small_nets import BasicBlock, randomise_norms


class SmoothResNet(nn.Module):
    """Two stages of residual blocks."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8, momentum=0.3)
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1, torch.tanh), BasicBlock(8, 16, 2, torch.tanh))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.tanh(self.bn(self.stem(x)))).mean((2, 3)))


def make() -> nn.Module:
    """The network, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(len(SmoothResNet.__name__))
        return randomise_norms(SmoothResNet())
