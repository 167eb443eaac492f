"""Small networks that are hard to cut: one for each way in which channels meet that common pruners get wrong.

Every class is registered with the number of channel groups that must be found at least, so that a rule that silently
keeps everything fails; 0 where keeping everything is right. All are seeded, and take one tensor of `input_shape`.
"""

from __future__ import annotations

import torch
from torch import nn

from support.nets import (
    hard_attention,  # noqa: F401  importing the modules registers their networks
    hard_convolutions,  # noqa: F401
    hard_layouts,  # noqa: F401
    hard_norms,  # noqa: F401
    hard_sequences,  # noqa: F401
)
from support.nets.hard_register import NETS, Hard
from support.nets.small_nets import seeded

__all__ = ["NETS", "Hard", "make"]


def make(name: str) -> nn.Module:
    """A network by name, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return seeded(NETS[name].make())
