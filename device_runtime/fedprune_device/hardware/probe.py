"""Probes a board: measures its memory, clock and speed on the board itself.

Boards differ from their profile: a slower edition of the processor, less memory, a bad cooler. The probe runs what a
round would run: graphs made by the compiler, two seconds of a reference net and some more of other kinds of nets.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fedprune import __version__
from fedprune.core import tensorfile
from fedprune.core.rng import keyed_generator
from fedprune.model.selection import Tensors
from fedprune.planning.latency_model import LatencyTable, fit_latency_table, typical_gpu_table, typical_table
from fedprune.planning.probe_report import CPU, CUDA, MAX_REASON_LENGTH, ProbeReport
from fedprune.runtime.session import OnnxSession, onnxruntime_version
from fedprune_device.hardware import layer_timing, readings
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor

_ASSETS = resources.files("fedprune_device") / "assets"


def probe(
    threads: int = 1,
    seconds: float = 2.0,
    root: Path = Path("/"),
    *,
    layer_seconds: float = 10.0,
    memory_file: Path | None = None,
    runtime: str = "",
    cuda: bool = False,
    begin: Callable[[str, float], None] = lambda what, seconds: None,
) -> ProbeReport:
    """Measure this board: a reference net for `seconds`, half of them training, then layers for `layer_seconds`.

    `root` is where /proc and /sys are found. `memory_file` keeps the layers' times for the next start. `runtime` is
    onnxruntime's version; by default that which is loaded. With `cuda` the GPU is measured if it works, else the
    processor; the report's `unit` is what was measured. `begin` is called before each measurement with its name and
    its approximate duration in seconds.

    Raises `MissingExtraError` or `RuntimeUnavailableError` if onnxruntime is missing or can't be loaded.
    """
    began = time.monotonic()
    runtime = runtime or onnxruntime_version()
    total, available = readings.memory(root)
    begin("training and predicting", seconds)
    train, infer, unit, cpu_reason = _measure_rates(threads, seconds, cuda)
    conditions = f"fedprune {__version__}, onnxruntime {runtime}, {threads} threads, {readings.board_model(root)}"
    if unit == CUDA:
        conditions += ", on its GPU"

    def measure_table() -> LatencyTable:
        begin("layers", layer_seconds)
        measured = layer_timing.measure_layers(threads, layer_seconds, cuda=unit == CUDA)
        return fit_latency_table(measured, typical_gpu_table() if unit == CUDA else typical_table(train))

    latency = None
    if layer_seconds and memory_file is None:
        latency = measure_table()
    elif layer_seconds and memory_file is not None:
        latency = layer_timing.load_or_measure_table(memory_file, conditions, measure_table)
    return ProbeReport(
        cores=len(os.sched_getaffinity(0)),
        memory_total=total,
        memory_available=min(available, total),
        seconds=time.monotonic() - began,
        onnxruntime=runtime,
        board=readings.board_model(root),
        clock_hz=readings.clock_hz(root),
        train_rate=train,
        infer_rate=infer,
        temperature_c=readings.temperature_c(root),
        throttled=readings.is_throttled(root),
        latency=latency,
        unit=unit,
        cpu_reason="".join(c if c.isprintable() else " " for c in cpu_reason)[:MAX_REASON_LENGTH],
    )


def process_memory() -> int | None:
    """Bytes of memory of this process, onnxruntime with a loaded graph included; None where the kernel doesn't say.

    Much of a library is only paged in once it is used, so a small training graph is loaded first.
    """
    OnnxSession((_ASSETS / f"probe_training-{CPU}.onnx").read_bytes(), training=True)
    return readings.resident_memory()


def table_summaries(report: ProbeReport) -> dict[str, str]:
    """A summary of the table of layers' times, for logs and terminals."""
    latency = report.latency
    if latency is None:
        return {"latency": ""}
    error = f"{latency.error:.1%}" if latency.points else "unknown"
    steps = "channel by channel" if latency.block == 1 else f"in steps of {latency.block} channels"
    return {"latency": f"{latency.points} measurements of layers, median error {error}, times grow {steps}"}


def reference_net() -> dict[str, Any]:
    """The reference net: shapes of its tensors, classes, operations."""
    net: dict[str, Any] = json.loads((_ASSETS / "probe.json").read_text())
    return net


@contextmanager
def reference_predictor(tensors: Tensors, threads: int = 1, *, cuda: bool = False) -> Iterator[Predictor]:
    """The reference net with these weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / GRAPH).write_bytes((_ASSETS / "probe_inference.onnx").read_bytes())
        (folder / WEIGHTS).write_bytes(tensorfile.encode(tensors))
        yield Predictor(folder, threads=threads, cuda=cuda)


def _measure_rates(threads: int, seconds: float, cuda: bool) -> tuple[float, float, str, str]:
    """FLOP/s of the reference net's training step and forward pass, the unit that trained it, and why this is the CPU
    although CUDA was asked for."""
    reference = reference_net()
    rng = keyed_generator(0, "probe")
    tensors = {n: (0.1 * rng.standard_normal(shape)).astype(np.float32) for n, shape in reference["tensors"].items()}
    batch = reference["batch"]
    x = rng.standard_normal((batch, *reference["input_shape"])).astype(np.float32)
    feeds = layer_timing.timed_step_feeds(x, rng.integers(0, reference["classes"], batch), tensors, tensors)
    graph = (_ASSETS / f"probe_training-{CUDA if cuda else CPU}.onnx").read_bytes()
    # As for layers: plans count operators that are launched one by one.
    session = OnnxSession(graph, threads=threads, training=True, cuda=cuda, records=False)
    run_step = layer_timing.step_runner(session, feeds)
    train = layer_timing.median_seconds(run_step, total_s=seconds / 2, max_runs=math.inf)
    if cuda and session.provider == CPU:
        # Again with the graph that the processor gets.
        return (*_measure_rates(threads, seconds, cuda=False)[:3], session.cpu_reason)
    with reference_predictor(tensors, threads, cuda=cuda) as predictor:
        infer = layer_timing.median_seconds(lambda: predictor.predict(x), total_s=seconds / 2, max_runs=math.inf)
    rates = (2 * batch * reference[macs] / s for macs, s in (("training_macs", train), ("forward_macs", infer)))
    return (*rates, session.provider, "")
