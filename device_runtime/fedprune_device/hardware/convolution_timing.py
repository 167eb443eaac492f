"""What each form of a convolution takes on this board: one small graph per form and shape, timed.

The graphs are assets that `examples/make_probe_graphs.py` writes, by the rules that write training graphs. Those of the
most telling shapes come first: where time ends, the others are left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.core.rng import keyed
from fedprune.planning.probe_report import FormTimes, Shape
from fedprune.runtime.blocks import block_size
from fedprune.runtime.session import Session
from fedprune_device.hardware.layer_timing import Clock, median_seconds, remembered

ARCHIVE = "probe_forms.tar.gz"  # the asset: `index.json` and a graph per shape, length of a block and form
_ENOUGH = 0.008  # seconds that one graph's runs take where they are short: there are two hundred of them


def measure_forms(
    threads: int = 1, seconds: float = 10.0, clock: Clock = time.perf_counter, block: int | None = None
) -> FormTimes:
    """Time the forms within `seconds`; the first shape is always measured, and a measurement that began is finished.

    `block` is the number of channels that convolutions compute at once here; found by default, 0 for standard
    operators.
    """
    files = _files()
    index: dict[str, Any] = json.loads(files["index.json"])
    blocks = (0, block_size() if block is None else block)
    rows: list[tuple[Shape, tuple[tuple[str, float], ...]]] = []
    end = clock() + seconds
    for number, row in enumerate(index["shapes"]):
        if rows and clock() > end:
            break
        kernel, stride, inputs, outputs, places, depthwise = row["shape"]
        times: list[tuple[str, float]] = []
        for length in dict.fromkeys(blocks):
            for name in row["graphs"].get(str(length), ()):
                graph = files[f"{number}/{length}/{name}.onnx"]
                with contextlib.suppress(*(ModelError,) if length else ()):
                    times.append((name, _seconds(graph, index["batch"], threads, clock)))
        rows.append((Shape(kernel, stride, inputs, outputs, places, bool(depthwise)), tuple(times)))
    return FormTimes(tuple(rows))


def remembered_forms(path: Path, about: str, make: Callable[[], FormTimes]) -> FormTimes:
    """The times of an earlier start, valid while `about` (board, versions, threads) stays the same."""
    return remembered(path, about, _archive(), "forms", FormTimes.from_dict, make)


def _seconds(graph: bytes, batch: int, threads: int, clock: Clock) -> float:
    """Seconds per sample, in as many digits as a measurement is worth."""
    session = Session(graph, threads=threads, training=True)
    random = keyed(0, "forms")
    feeds = {
        name: random.standard_normal([d if isinstance(d, int) else batch for d in shape]).astype(np.float32)
        for name, (_, shape) in session.inputs.items()
    }
    return float(f"{median_seconds(partial(session.run, feeds), clock, _ENOUGH) / batch:.3g}")


def _files() -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(_archive()), mode="r:gz") as archive:
        return {m.name: part.read() for m in archive if (part := archive.extractfile(m)) is not None}


def _archive() -> bytes:
    return (resources.files("fedprune_device") / "assets" / ARCHIVE).read_bytes()
