"""Architectures of known nets, written down without a model file, and what a benchmark notes about its machine."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fedprune import __version__
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Layer, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Tensors

RESULTS = Path(__file__).parent / "results"


class _Writer:
    def __init__(self) -> None:
        self.groups: list[ChannelGroup] = []
        self.tensors: list[TensorSpec] = []
        self.layers: list[Layer] = []

    def group(self, size: int) -> Axis:
        self.groups.append(ChannelGroup(f"group{len(self.groups)}", size))
        return Axis((Segment(len(self.groups) - 1, 0, size),))

    def conv(self, name: str, out: Axis, into: Axis, kernel: int) -> None:
        place = Axis.fixed(kernel)
        self.tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, (out, into, place, place)))
        for kind in list(TensorKind)[2:]:
            self.tensors.append(TensorSpec(f"{name}.{kind.value}", kind, (out,)))
        self.layers.append(Layer(name, "Conv", f"{name}.weight", 1))

    def linear(self, name: str, out: Axis, into: Axis) -> None:
        self.tensors.append(TensorSpec(f"{name}.weight", TensorKind.WEIGHT, (out, into)))
        self.tensors.append(TensorSpec(f"{name}.bias", TensorKind.BIAS, (out,)))
        self.layers.append(Layer(name, "Gemm", f"{name}.weight", 1))

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


def vgg11(classes: int = 10) -> Architecture:
    """VGG-11 with batch norm for 32×32 images; 2×2 places per channel are flattened before two linear layers."""
    net = _Writer()
    before = Axis.fixed(3)
    for i, width in enumerate((64, 128, 256, 256, 512, 512, 512, 512)):
        after = net.group(width)
        net.conv(f"conv{i}", after, before, 3)
        before = after
    last = before.segments[0]
    hidden = net.group(512)
    net.linear("fc1", hidden, Axis((Segment(last.group, 0, last.count, 4),)))
    net.linear("fc2", Axis.fixed(classes), hidden)
    return net.architecture("vgg11", classes)


def weights(architecture: Architecture, seed: int = 0) -> Tensors:
    """Small normal numbers, as trained weights are."""
    random = np.random.default_rng(seed)
    return {
        t.name: np.abs(random.standard_normal(t.shape, np.float32) * np.float32(0.05)) for t in architecture.tensors
    }


def parameters(tensors: Tensors) -> int:
    """Numbers in a model."""
    return sum(v.size for v in tensors.values())


def processor() -> str:
    """The processor's name, as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def setting(*packages: str) -> dict[str, Any]:
    """Machine, versions and date of a run; versions of further packages where they are installed."""
    return {
        "date": dt.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fedprune": __version__,
        **{name: _version(name) for name in packages},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def write(where: str | Path, body: dict[str, Any], table: str) -> None:
    """Write a result as JSON and as a page.

    Args:
        where: A name among the results, or the path of the JSON file.
        body: What was found.
        table: The page, as Markdown.
    """
    path = where if isinstance(where, Path) else RESULTS / f"{where}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
    path.with_suffix(".md").write_text(table)
    print(table)
