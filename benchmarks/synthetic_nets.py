"""The architecture of ResNet-18, written down without a model file."""

from __future__ import annotations

import numpy as np

from fedprune.model.architecture import Architecture, Axis, ChannelGroup, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Tensors


class _Writer:
    def __init__(self) -> None:
        self.groups: list[ChannelGroup] = []
        self.tensors: list[TensorSpec] = []
        self.layers: list[LayerRow] = []

    def group(self, size: int) -> Axis:
        self.groups.append(ChannelGroup(f"group{len(self.groups)}", size))
        return Axis((Segment(len(self.groups) - 1, 0, size),))

    def conv(self, name: str, out: Axis, into: Axis, kernel: int) -> None:
        place = Axis.fixed(kernel)
        self.tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, (out, into, place, place)))
        for kind in list(TensorKind)[2:]:
            self.tensors.append(TensorSpec(f"{name}.{kind.value}", kind, (out,)))
        self.layers.append(LayerRow(name, "Conv", f"{name}.weight", 1))

    def linear(self, name: str, out: Axis, into: Axis) -> None:
        self.tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, (out, into)))
        self.tensors.append(TensorSpec(f"{name}.bias", TensorKind.BIAS, (out,)))
        self.layers.append(LayerRow(name, "Gemm", f"{name}.weight", 1))

    def architecture(self, name: str, classes: int) -> Architecture:
        made = Architecture(
            name, tuple(self.groups), tuple(self.tensors), tuple(self.layers), (), (3, 32, 32), (classes,)
        )
        made.validate()
        return made


def resnet18(classes: int = 1000) -> Architecture:
    """ResNet-18: one group per residual stream, one inside every block."""
    net = _Writer()
    stream = net.group(64)
    net.conv("stem", stream, Axis.fixed(3), 7)
    for stage, width in enumerate((64, 128, 256, 512)):
        before, stream = stream, net.group(width) if stage else stream
        for block in range(2):
            name, inner = f"stage{stage}.{block}", net.group(width)
            net.conv(f"{name}.conv1", inner, before, 3)
            net.conv(f"{name}.conv2", stream, inner, 3)
            if before is not stream:
                net.conv(f"{name}.shortcut", stream, before, 1)
            before = stream
    net.linear("fc", Axis.fixed(classes), stream)
    return net.architecture("resnet18", classes)


def weights(architecture: Architecture, seed: int = 0) -> Tensors:
    """Small normal numbers, as trained weights are."""
    random = np.random.default_rng(seed)
    return {
        t.name: np.abs(random.standard_normal(t.shape, np.float32) * np.float32(0.05)) for t in architecture.tensors
    }
