"""What each device of a fleet has of every class, for reports: as a summary, a heat map or a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.text import quantity
from fedprune.output.chart import share_strip
from fedprune.output.chart_html import heat_scale
from fedprune.output.page import Bar, bars_html, page_html, paragraph_html
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.datasets.data_plan import SKEW_SETTINGS, DataPlan
from fedprune_server.simulation.datasets.federation import Federation

MAX_MAP_DEVICES = 300  # devices that a heat map shows; larger fleets are sampled evenly


@dataclass(frozen=True)
class FleetData:
    """The data of a fleet.

    Attributes:
        data: The data set's name; empty if devices have their own samples.
        classes: Names of its classes; empty if they are numbers.
        counts: Samples per class of each device; empty if labels are not classes, or unknown.
        settings: The table [data], as JSON types; empty if devices have their own samples.
    """

    data: str = ""
    classes: tuple[str, ...] = ()
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The data set's name, the partition with its own setting, and further settings that aren't defaults."""
        usual: dict[str, Any] = {f.name: f.default for f in fields(DataPlan)}
        always = ("partition", SKEW_SETTINGS.get(self.settings.get("partition", ""), ""))
        stated_settings = {
            k: v for k, v in self.settings.items() if k in always or (v and v != usual.get(k) and k != "source")
        }
        return ", ".join(filter(None, [self.data, *(f"{k} {v}" for k, v in stated_settings.items())]))

    @classmethod
    def of_federation(cls, federation: Federation, data: str = "") -> FleetData:
        """The partition of a data set."""
        rows = zip(federation.names, federation.counts(), strict=True)
        return cls(data, federation.samples.class_names, {name: tuple(map(int, row)) for name, row in rows})

    @classmethod
    def of_devices(cls, devices: Mapping[str, LocalData], data: str = "") -> FleetData:
        """The partition of loaded samples; without counts if labels are not classes."""
        labels = {n: np.concatenate([d.y_train, d.y_val, d.y_test]) for n, d in devices.items() if d.y_train.ndim == 1}
        if len(labels) < len(devices) or any(y.dtype.kind != "i" for y in labels.values()):
            return cls(data)
        classes = max((int(y.max()) + 1 for y in labels.values()), default=0)
        return cls(data, (), {name: tuple(map(int, np.bincount(y, minlength=classes))) for name, y in labels.items()})

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    def heat_map(self) -> str:
        """HTML with a row per device and a tile per class; empty without counts."""
        if not self.counts:
            return ""
        largest_count = max(max(counts, default=0) for counts in self.counts.values()) or 1
        names = list(self.counts)
        if len(names) > MAX_MAP_DEVICES:
            names = [names[i * (len(names) - 1) // (MAX_MAP_DEVICES - 1)] for i in range(MAX_MAP_DEVICES)]
        rows = []
        for name in names:
            counts = self.counts[name]
            classes_of = ", ".join(f"{self.class_name(i)}: {n:,}" for i, n in enumerate(counts) if n)
            strip = share_strip(name, [n / largest_count for n in counts])
            rows.append(Bar(name, (strip,), quantity(sum(counts), "sample", form=","), f"{name}: {classes_of}"))
        classes = ", ".join(self.class_name(i) for i in range(max(map(len, self.counts.values()))))
        text = f"A row per device, a tile per class, all splits together. Classes, from left to right: {classes}."
        scale = heat_scale("0", quantity(largest_count, "sample", form=","))
        return paragraph_html(text) + scale + bars_html(rows, "Samples per device and class")


def draw_partition(federation: Federation, path: Path, title: str = "Data of the devices") -> Path:
    """Write the heat map of a partition as a self-contained page."""
    data_partition = FleetData.of_federation(federation)
    total = sum(map(sum, data_partition.counts.values()))
    facts = {"Devices": f"{len(data_partition.counts):,}", "Samples": f"{total:,}"}
    path.write_text(page_html(title, [data_partition.heat_map()], facts), encoding="utf-8")
    return path
