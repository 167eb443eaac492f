"""What a board says of the release that it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedprune_device.launcher.slot_store import Home
from fedprune_device.launcher.state import DamagedError


def running(environment: Mapping[str, str] = os.environ) -> str:
    """The slot that the launcher started and the number of the release in it; empty without a launcher.

    Args:
        environment: Where the launcher says which slot it is, and which folder is its.
    """
    root, slot = environment.get("FEDPRUNE_ROOT", ""), environment.get("FEDPRUNE_SLOT", "")
    if not root or slot not in ("a", "b"):
        return ""
    try:
        return f"slot {slot} with release {Home(Path(root)).record(slot).version}"
    except (DamagedError, OSError):
        return f"slot {slot}"
