"""Memory of this process, as the kernel counts it."""

from __future__ import annotations

import contextlib
import resource
from importlib import resources
from pathlib import Path

from fedprune.runtime.session import Session

_STATUS = Path("/proc/self/status")


def peak_memory() -> float:
    """The most memory that this process has held, in bytes: ever, or since `restart_peak`.

    getrusage also counts what a process was before it became this program: the size of whatever started it.
    """
    found = _status("VmHWM")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found)


def restart_peak() -> None:
    """Let the peak begin with what is held now, so that a round's peak is its own and not an earlier round's.

    A kernel without `clear_refs` goes on counting from the process's start: then a peak may be too high.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def own_memory() -> int:
    """Bytes that this process holds and that the kernel can't take back, so that they are not available any more."""
    return _status("RssAnon") or 0


def process_memory() -> int | None:
    """Bytes that this process holds, onnxruntime with a loaded graph included; None where the kernel doesn't say.

    Much of a library is read only once it is used: a small training graph is loaded first.

    Raises:
        ModelError: The shipped graph can't be loaded.
    """
    graph = resources.files("fedprune_device") / "assets" / "probe_training.onnx"
    Session(graph.read_bytes(), training=True)
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """An entry of the process's status, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
