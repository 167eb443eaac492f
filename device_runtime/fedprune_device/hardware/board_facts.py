"""What this board says of itself: device tree, L4T release, memory, clock."""

from __future__ import annotations

from pathlib import Path

from fedprune.planning.identification import Facts
from fedprune.planning.jetpack import l4t_release
from fedprune_device.hardware.readings import board, clock_hz, memory

_LONGEST = 200
_MOST = 20

TEGRA = Path("/etc/nv_tegra_release")
"""On a Jetson: the release of its software."""


def facts(root: Path = Path("/")) -> Facts:
    """Read what identifies this board; what can't be read stays empty.

    Args:
        root: Where /proc, /sys and /etc are found.
    """
    total, _ = memory(root)
    entries = _text(root / "proc/device-tree/compatible").split("\0")
    return Facts(
        model=board(root),
        compatible=tuple(e.strip()[:_LONGEST] for e in entries if e.strip())[:_MOST],
        l4t=l4t_release(_text(root / TEGRA.relative_to("/"))),
        memory_total=total,
        clock_hz=clock_hz(root),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
