"""Timing one graph in a process of its own (`python -m fedprune_export.profiling.benchmark_child`), so that its peak
memory is its alone.

It reads a plan as JSON from stdin and writes what it measured as JSON to stdout. It imports what a board imports, and
no more, so that the memory is that of a board's process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from fedprune.core import tensorfile
from fedprune.runtime.session import Session

_WARM_UP = 3


def measure(graph: Path, feeds: Path, *, training: bool, threads: int, runs: int) -> dict[str, Any]:
    """Time a graph.

    Args:
        feeds: A tensor file with all its inputs.
        runs: How often it is timed, after some runs that don't count.

    Returns:
        `seconds` of every run, and `peak_bytes` of this process.

    Raises:
        ModelError: onnxruntime doesn't load or run the graph.
        BundleError: The tensor file is damaged.
    """
    session = Session(graph, threads=threads, training=training)
    values = {n: v for n, v in tensorfile.load(feeds).items() if n in session.inputs}
    seconds = []
    for run in range(_WARM_UP + runs):
        began = time.perf_counter()
        session.run(values)
        if run >= _WARM_UP:
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """Most memory that this process ever had."""
    try:
        # Not getrusage's figure, which counts what the parent had when it forked.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def main() -> int:
    body = json.load(sys.stdin)
    found = measure(
        Path(body["graph"]), Path(body["feeds"]), training=body["training"], threads=body["threads"], runs=body["runs"]
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
