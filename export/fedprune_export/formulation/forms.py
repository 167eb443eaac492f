"""Which form each layer of a training graph takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedprune.errors import ConfigError
from fedprune.workload import BLOCKS
from fedprune_export.gradients.dense import KernelForm
from fedprune_export.gradients.windows import Window

_LARGE_FILTER, _SMALL_MAP = 1024, 64
"""Places of a map up to which a gradient as large as the batch's maps is a good kernel; places up to which one product
per tap is better than one per tap and sample. Measured with VGG11 and ResNet20 at three widths on x86
(`benchmarks/step.py`), as the default of `Forms.full` was."""


@dataclass(frozen=True)
class Forms:
    """How layers are computed on a board.

    Attributes:
        block: Channels that its convolutions compute at once (`fedprune.blocks` finds it), 0 for standard
            operators alone.
        batch: Samples of every batch, where there are blocks; any number where there are none.
        full: Channels from which on what a convolution makes fills blocks well enough.

    Raises:
        ConfigError: No processor has such blocks, or they come without a batch.
    """

    block: int = 0
    batch: int = 0
    full: int = 16

    def __post_init__(self) -> None:
        if self.block not in (0, *BLOCKS[1:]):
            known = ", ".join(map(str, BLOCKS[1:]))
            raise ConfigError("block of channels", expected=f"one of 0, {known}", got=self.block)
        if (self.batch > 0) != (self.block > 0):
            wanted = "a positive number" if self.block else "0, since standard operators take any"
            raise ConfigError("samples of a batch in blocks", expected=wanted, got=self.batch)

    def in_blocks(self, outputs: int) -> bool:
        """Whether a convolution that makes so many channels is computed with channels in blocks."""
        return bool(self.block) and outputs >= self.full

    def kernel_gradient(self, w: Window) -> KernelForm | Literal["blocked"]:
        """How the gradient of a kernel is computed, given the layer's window."""
        area, taps = math.prod(w.output), math.prod(w.kernel)
        # Strides would be gaps in the kernel, which are slow; samples of few don't fill blocks.
        dense = 2 * self.batch >= self.block and all(s == 1 for s in w.strides)
        if self.block and dense and taps > 1 and area <= _LARGE_FILTER:
            return "blocked"
        return "taps" if area > _SMALL_MAP else "products"
