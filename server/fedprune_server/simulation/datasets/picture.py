"""The partition of a data set among devices, as a heat map and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedprune.core.text import quantity
from fedprune.output.chart import scale, tiles
from fedprune.output.page import Bar, bars, document, paragraph
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.datasets.federation import Federation

DEVICES = 300
"""Devices that a heat map shows; larger fleets are sampled evenly."""


@dataclass(frozen=True)
class Partition:
    """The data of a fleet.

    Attributes:
        data: The data set's name; empty if devices have their own samples.
        classes: Names of its classes; empty if they are numbers.
        counts: Samples per class of each device; empty if labels are not classes, or unknown.
    """

    data: str = ""
    classes: tuple[str, ...] = ()
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_federation(cls, federation: Federation, data: str = "") -> Partition:
        """The partition of a data set."""
        rows = zip(federation.names, federation.counts(), strict=True)
        return cls(data, federation.samples.class_names, {name: tuple(map(int, row)) for name, row in rows})

    @classmethod
    def of_devices(cls, devices: Mapping[str, LocalData], data: str = "") -> Partition:
        """The partition of loaded samples; without counts if labels are not classes."""
        labels = {n: np.concatenate([d.y_train, d.y_val, d.y_test]) for n, d in devices.items() if d.y_train.ndim == 1}
        if len(labels) < len(devices) or any(y.dtype.kind != "i" for y in labels.values()):
            return cls(data)
        most = max((int(y.max()) + 1 for y in labels.values()), default=0)
        return cls(data, (), {name: tuple(map(int, np.bincount(y, minlength=most))) for name, y in labels.items()})

    def named(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    def heat_map(self) -> str:
        """HTML with a row per device and a tile per class; empty without counts."""
        if not self.counts:
            return ""
        most = max(max(counts, default=0) for counts in self.counts.values()) or 1
        names = list(self.counts)
        if len(names) > DEVICES:
            names = [names[i * (len(names) - 1) // (DEVICES - 1)] for i in range(DEVICES)]
        rows = []
        for name in names:
            counts = self.counts[name]
            classes_of = ", ".join(f"{self.named(i)}: {n:,}" for i, n in enumerate(counts) if n)
            strip = tiles(name, [n / most for n in counts])
            rows.append(Bar(name, (strip,), quantity(sum(counts), "sample", form=","), f"{name}: {classes_of}"))
        classes = ", ".join(self.named(i) for i in range(max(map(len, self.counts.values()))))
        return (
            paragraph(
                f"A row per device, a tile per class, all splits together. Classes, from left to right: {classes}."
            )
            + scale("0", quantity(most, "sample", form=","))
            + bars(rows, "Samples per device and class")
        )


def draw_partition(federation: Federation, path: Path, title: str = "Data of the devices") -> Path:
    """Write the heat map of a partition as a self-contained page.

    Args:
        federation: The data set and its split.
        path: An `.html` file.
        title: The page's heading.

    Returns:
        The file.
    """
    partition = Partition.of_federation(federation)
    total = sum(map(sum, partition.counts.values()))
    facts = {"Devices": f"{len(partition.counts):,}", "Samples": f"{total:,}"}
    path.write_text(document(title, [partition.heat_map()], facts), encoding="utf-8")
    return path
