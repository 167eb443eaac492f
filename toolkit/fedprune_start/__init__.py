"""Where the commands begin, before anything that takes long is imported: Ctrl-C ends them from their first moment on.

It needs the standard library alone; a package of fedprune imports numpy before its first line.
"""

from __future__ import annotations

import importlib
import sys

_INTERRUPTED = 4
"""The exit code of `fedprune.errors`, which isn't imported yet."""


def device() -> int:
    """`fedprune-device`."""
    return _run("fedprune_device.cli")


def export() -> int:
    """`fedprune-export`."""
    return _run("fedprune_export.cli")


def flash() -> int:
    """`fedprune-flash`."""
    return _run("fedprune_flash.cli")


def server() -> int:
    """`fedprune-server`."""
    return _run("fedprune_server.cli")


def simulate() -> int:
    """`fedprune-simulate`."""
    return _run("fedprune_server.commands.simulate")


def _run(module: str) -> int:
    """Import a command and run it; returns its exit code."""
    try:
        return int(importlib.import_module(module).main())
    except KeyboardInterrupt:  # while it was imported
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
