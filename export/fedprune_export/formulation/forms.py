"""Which form each layer of a training graph takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedprune.core.errors import ConfigError
from fedprune.planning.kernel_workload import BLOCKS
from fedprune.planning.probe_report import FormTimes, Shape
from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.autodiff.rules.dense import Formulation, KernelForm, formulation

_LARGE_FILTER, _SMALL_MAP = 1024, 64
"""Places of a map up to which a gradient as large as the batch's maps is a good kernel; places up to which one product
per tap is better than one per tap and sample. Measured with VGG11 and ResNet20 at three widths on x86
(`benchmarks/step.py`), as the default of `Forms.full` was."""

_CLEARLY = 1.1
"""How many times faster than the usual form another one must have been to take its place: layers are not alone in a
step, and measurements waver."""


@dataclass(frozen=True)
class Forms:
    """How layers are computed on a board.

    Attributes:
        block: Channels that its convolutions compute at once (`fedprune.runtime.blocks` finds it), 0 for standard
            operators alone.
        batch: Samples of every batch, where there are blocks; any number where there are none.
        full: Channels from which on what a convolution makes fills blocks well enough.
        times: What forms took on the board; where they say nothing, or nothing clear, what was usual on x86 is taken.

    Raises:
        ConfigError: No processor has such blocks, or they come without a batch.
    """

    block: int = 0
    batch: int = 0
    full: int = 16
    times: FormTimes | None = None

    def __post_init__(self) -> None:
        if self.block not in (0, *BLOCKS[1:]):
            known = ", ".join(map(str, BLOCKS[1:]))
            raise ConfigError("block of channels", expected=f"one of 0, {known}", got=self.block)
        if (self.batch > 0) != (self.block > 0):
            wanted = "a positive number" if self.block else "0, since standard operators take any"
            raise ConfigError("samples of a batch in blocks", expected=wanted, got=self.batch)

    def in_blocks(self, w: Window, inputs: int, outputs: int, *, depthwise: bool = False) -> bool:
        """Whether a convolution is computed with channels in blocks, forward or as the gradient of another's input.

        Few channels never are, whatever the convolution alone took: what fills a block up would be carried through all
        that follows.

        Args:
            depthwise: Whether every channel has a filter of its own.
        """
        if not self.block or outputs < self.full:
            return False
        shape, part = _shape(w, inputs, outputs, depthwise), "depthwise" if depthwise else "forward"
        ways = 1 + (1 if depthwise else outputs / inputs)  # what surrounds it is in blocks
        return self._best(part, shape, "blocks", _LAYOUTS, ways) == "blocks"

    def dense(self, w: Window, inputs: int, outputs: int) -> Formulation:
        """How a layer in one group is computed by standard operators."""
        usual = formulation(w, inputs)
        if w.flips:  # else only the transposed one serves
            form = self._best("input", _shape(w, inputs, outputs), usual.input_gradient, ("flipped", "transposed"))
            return Formulation("flipped" if form == "flipped" else "transposed", usual.weight_gradient)
        return usual

    def kernel_gradient(self, w: Window, inputs: int, outputs: int) -> KernelForm | Literal["blocked"]:
        """How the gradient of a kernel is computed."""
        area, taps = math.prod(w.output), math.prod(w.kernel)
        shape = _shape(w, inputs, outputs)
        # Strides would be gaps in the kernel, which are slow; samples of few don't fill blocks.
        dense = 2 * self.batch >= self.block and all(s == 1 for s in w.strides)
        if self.block and dense and taps > 1 and area <= _LARGE_FILTER:
            both = min(inputs, outputs) >= self.full  # then other forms have x and dy to convert
            found = self._best("kernel", shape, "blocks", _KERNEL_FORMS, 1 + outputs / inputs if both else 0)
        else:
            found = self._best("kernel", shape, "taps" if area > _SMALL_MAP else "products", _KERNEL_FORMS[1:])
        return _KERNELS[found]

    def _best(self, part: str, shape: Shape | None, usual: str, forms: Sequence[str], converted: float = 0.0) -> str:
        """The form that was clearly the fastest, else the usual one.

        Args:
            shape: The layer, None if it is like none that is measured.
            usual: What is taken where the table is silent.
            converted: How many inputs of the layer all forms but the one in blocks convert first.
        """
        near = self.times.near(shape) if self.times is not None and shape is not None else {}
        way = converted * near.get("convert.plain", 0.0)
        times = {
            form: near[f"{part}.{form}"] + (way if form != "blocks" else 0.0)
            for form in forms
            if f"{part}.{form}" in near
        }
        best = min(times, key=lambda form: times[form], default=usual)
        return best if usual in times and times[best] * _CLEARLY < times[usual] else usual


_LAYOUTS = ("plain", "blocks")
_KERNELS: dict[str, KernelForm | Literal["blocked"]] = {
    "blocks": "blocked",
    "taps": "taps",
    "products": "products",
    "columns": "columns",
    "convolution": "convolution",
}
_KERNEL_FORMS = tuple(_KERNELS)


def _shape(w: Window, inputs: int, outputs: int, depthwise: bool = False) -> Shape | None:
    """A layer as tables know it: with square windows, and without gaps in them."""
    square = len(set(w.kernel)) == len(set(w.strides)) == 1 and all(d == 1 for d in w.dilations)
    if not square:
        return None
    return Shape(w.kernel[0], w.strides[0], 1 if depthwise else inputs, outputs, math.prod(w.output), depthwise)
