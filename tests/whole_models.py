"""Whole networks that the compiler is held against."""

from __future__ import annotations

import torch
from torch import nn


def scattered(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with random numbers in every parameter that is uniform.

    Fresh networks have scales of one, biases of nought and gains of 1e-6: with these, an error behind a scale would
    not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.parameters():
            first = part.reshape(-1)[0]
            if not part.is_floating_point() or not bool((part == first).all()):
                continue
            if abs(float(first)) < 1e-8:
                part.copy_(0.1 * torch.randn(part.shape, generator=generator))
            elif abs(float(first)) < 0.05:
                part.copy_(0.1 + 0.4 * torch.rand(part.shape, generator=generator))
            else:
                part.copy_(first * (0.5 + torch.rand(part.shape, generator=generator)))
    return module
