"""A board reads what it is from its device tree, its release file and the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprune.planning.identification import identify
from fedprune_device.hardware.readings import facts

pytestmark = pytest.mark.board


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_an_orin_on_a_foreign_carrier(tmp_path: Path) -> None:
    put(tmp_path, "proc/device-tree/model", "ACME Vision Box\0")
    put(tmp_path, "proc/device-tree/compatible", "acme,box\0nvidia,p3767-0000\0nvidia,tegra234\0")
    put(tmp_path, "proc/meminfo", "MemTotal: 15800000 kB\nMemAvailable: 14000000 kB\n")
    put(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "1984000\n")

    read = facts(tmp_path)

    assert (read.model, read.l4t, read.clock_hz) == ("ACME Vision Box", "36.4.3", 1_984_000_000)
    assert read.compatible == ("acme,box", "nvidia,p3767-0000", "nvidia,tegra234")
    assert read.memory_total == 15_800_000 * 1024


def test_a_machine_without_a_device_tree(tmp_path: Path) -> None:
    read = facts(tmp_path)

    assert (read.model, read.compatible, read.l4t, read.clock_hz) == ("", (), "", None)


def test_a_device_tree_of_nonsense_is_bounded(tmp_path: Path) -> None:
    put(tmp_path, "proc/device-tree/compatible", "\0".join(["x" * 10_000] * 1000))
    put(tmp_path, "etc/nv_tegra_release", "# R999999 (release), REVISION: x")

    read = facts(tmp_path)

    assert len(read.compatible) == 20
    assert max(map(len, read.compatible)) == 200
    assert read.l4t == ""


def test_this_machine_is_identified() -> None:
    assert identify(facts()).evidence
