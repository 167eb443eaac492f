"""The probe: what a board is and how fast it trains, measured on the board itself.

A profile is a promise; a board may have a slower edition of its processor, less memory, a bad cooler. The probe runs
what a round would run, graphs from the compiler: two seconds of a reference net, some more of nets of all kinds.
"""

from __future__ import annotations

import json
import os
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fedprune import __version__
from fedprune.core import tensorfile
from fedprune.core.errors import MissingExtraError, RuntimeUnavailableError
from fedprune.core.rng import keyed
from fedprune.planning.form_times import FormTimes
from fedprune.planning.latency_model import LatencyTable
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.blocks import block_size
from fedprune.runtime.session import Session
from fedprune.runtime.session import version as onnxruntime_version
from fedprune.training import step_contract
from fedprune_device.hardware.convolution_timing import measure_forms, remembered_forms
from fedprune_device.hardware.layer_timing import measure_table, remembered_table
from fedprune_device.hardware.readings import board, clock_hz, memory, resident_memory, temperature_c, throttled
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor

_IMPORT_TIMEOUT = 120
_PROBE_TIMEOUT = 1800
_MIN_RUNS = 3

FORM_FILE = "form_times.json"
"""The name of the file that keeps the times of convolutions' forms."""


def probe(
    threads: int = 1,
    seconds: float = 2.0,
    root: Path = Path("/"),
    *,
    layer_seconds: float = 10.0,
    form_seconds: float = 10.0,
    memory_file: Path | None = None,
    runtime: str = "",
    begin: Callable[[str, float], None] = lambda what, seconds: None,
) -> ProbeReport:
    """Measure this board.

    Args:
        threads: Threads inside an operator.
        seconds: Time for the measurements of speed; half of it trains, half of it predicts.
        root: Where /proc and /sys are found.
        layer_seconds: Time for the layers' measurements, see `hardware.layer_timing`; 0 leaves them out.
        form_seconds: Time for the measurements of convolutions' forms, see `hardware.convolution_timing`; 0 leaves them
            out.
        memory_file: Where the layers' times are kept, so that the next start need not measure them again; beside it
            those of forms.
        runtime: onnxruntime's version, where this process has loaded it; else another process tries that first.
        begin: Called before each measurement that is made, with its name and about how long it takes.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        RuntimeUnavailableError: onnxruntime is installed, but can't be loaded here.
        ModelError: The shipped graphs don't run.
    """
    began = time.monotonic()
    total, available = memory(root)
    version = runtime or check_runtime()
    begin("training and predicting", seconds)
    train, infer = _rates(threads, seconds)
    about = f"fedprune {__version__}, onnxruntime {version}, {threads} threads, {board(root)}"
    latency = forms = None

    def of_layers() -> LatencyTable:
        begin("layers", layer_seconds)
        return measure_table(threads, layer_seconds, train)

    def of_forms() -> FormTimes:
        begin("forms of convolutions", form_seconds)
        return measure_forms(threads, form_seconds)

    if layer_seconds:
        latency = of_layers() if memory_file is None else remembered_table(memory_file, about, of_layers)
    if form_seconds:
        file = None if memory_file is None else memory_file.with_name(FORM_FILE)
        forms = of_forms() if file is None else remembered_forms(file, about, of_forms)
    return ProbeReport(
        cores=len(os.sched_getaffinity(0)),
        memory_total=total,
        memory_available=min(available, total),
        seconds=time.monotonic() - began,
        onnxruntime=version,
        board=board(root),
        clock_hz=clock_hz(root),
        train_rate=train,
        infer_rate=infer,
        temperature_c=temperature_c(root),
        throttled=throttled(root),
        latency=latency,
        block=block_size(),
        forms=forms,
    )


def probe_apart(
    threads: int = 1,
    seconds: float = 2.0,
    *,
    layer_seconds: float = 10.0,
    form_seconds: float = 10.0,
    memory_file: Path | None = None,
    python: str = sys.executable,
) -> ProbeReport:
    """`probe` in a process of its own, so that what it takes is neither kept by this one nor in its peak memory.

    The free memory is what this process sees: the other one's own is free again when it has ended.

    Args:
        threads: Threads inside an operator.
        seconds: Time for the measurements of speed.
        layer_seconds: Time for the layers' measurements; 0 leaves them out.
        form_seconds: Time for those of convolutions' forms; 0 leaves them out.
        memory_file: Where the layers' times are kept, and beside it those of forms.
        python: The interpreter.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        RuntimeUnavailableError: It can't be loaded here, or the measurements fail.
    """
    total, available = memory()
    settings: dict[str, Any] = {"threads": threads, "seconds": seconds, "layer_seconds": layer_seconds}
    settings["form_seconds"] = form_seconds
    settings["memory_file"] = None if memory_file is None else str(memory_file)
    hint = "Start without the probe (`--no-probe`): the profile's figures are believed then."
    command = [python, "-c", "from fedprune_device.hardware.probe import _answer; _answer()"]
    try:
        done = subprocess.run(  # noqa: S603  # nosec B603  # our own code, in this Python
            command, input=json.dumps(settings), capture_output=True, text=True, timeout=_PROBE_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(f"the probe isn't done within {_PROBE_TIMEOUT} s", hint=hint) from error
    except OSError as error:
        raise RuntimeUnavailableError(f"can't start {python}: {error.strerror}") from error
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no message"]
    if done.returncode:
        check_runtime(python)  # says it better, if it is the reason
        why = f"killed by signal {-done.returncode}" if done.returncode < 0 else lines[-1][:300]
        raise RuntimeUnavailableError(f"the probe failed ({why})", hint=hint)
    report = ProbeReport.from_dict(json.loads(lines[-1]))
    return replace(report, memory_total=total, memory_available=min(available, total))


def check_runtime(python: str = sys.executable) -> str:
    """Load onnxruntime in a process of its own, and return its version.

    Some wheels contain instructions that some boards don't have (1.21.0 on a Raspberry Pi 4:
    https://github.com/microsoft/onnxruntime/issues/23957). That kills the process which loads them, so it must not
    be this one.

    Args:
        python: The interpreter.

    Raises:
        MissingExtraError: It is not installed.
        RuntimeUnavailableError: It crashes, fails or hangs.
    """
    command = [python, "-c", "import onnxruntime; print(onnxruntime.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT, check=False)  # noqa: S603  # nosec B603  # our own code, in this Python
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(f"onnxruntime doesn't load within {_IMPORT_TIMEOUT} s") from error
    except OSError as error:
        raise RuntimeUnavailableError(f"can't start {python}: {error.strerror}") from error
    if done.returncode < 0:
        raise RuntimeUnavailableError(
            f"onnxruntime kills the process that loads it (signal {-done.returncode})",
            hint="This version uses instructions that this processor lacks. Install another one; on a Raspberry Pi 4 "
            "anything but 1.21: pip install 'onnxruntime!=1.21.*'.",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        if "No module named 'onnxruntime'" in reason:
            raise MissingExtraError(
                "onnxruntime is not installed",
                hint="On a Jetson it is JetPack's onnxruntime-gpu.",
                extra="board",
            )
        raise RuntimeUnavailableError(f"onnxruntime can't be loaded ({reason})")
    return (done.stdout.strip().splitlines() or [""])[-1][:200]


def process_memory() -> int | None:
    """Bytes that this process holds, onnxruntime with a loaded graph included; None where the kernel doesn't say.

    Much of a library is read only once it is used: a small training graph is loaded first.

    Raises:
        ModelError: The shipped graph can't be loaded.
    """
    graph = resources.files("fedprune_device") / "assets" / "probe_training.onnx"
    Session(graph.read_bytes(), training=True)
    return resident_memory()


def table_summaries(report: ProbeReport) -> dict[str, str]:
    """The tables of layers' and convolutions' times in a few words each, for logs and terminals."""
    latency, forms = report.latency, report.forms
    found = {"latency": "", "forms": ""}
    if latency is not None:
        error = f"{latency.error:.1%}" if latency.points else "unknown"
        steps = "channel by channel" if latency.block == 1 else f"in steps of {latency.block} channels"
        found["latency"] = f"{latency.points} measurements of layers, median error {error}, times grow {steps}"
    if forms is not None:
        measured = sum(len(times) for _, times in forms.rows)
        found["forms"] = f"{measured} measurements of {len(forms.rows)} shapes"
    return found


def _answer() -> None:
    """The other side of `probe_apart`: settings from stdin, the report to stdout."""
    asked = json.loads(sys.stdin.read())
    file = asked["memory_file"]
    report = probe(
        asked["threads"],
        asked["seconds"],
        layer_seconds=asked["layer_seconds"],
        form_seconds=asked["form_seconds"],
        memory_file=None if file is None else Path(file),
        runtime=onnxruntime_version(),
    )
    print(json.dumps(report.to_dict()))


def _rates(threads: int, seconds: float) -> tuple[float, float]:
    """FLOP/s of the reference net's training step and forward pass."""
    assets = resources.files("fedprune_device") / "assets"
    reference: dict[str, Any] = json.loads((assets / "probe.json").read_text())
    rng = keyed(0, "probe")
    tensors = {n: (0.1 * rng.standard_normal(shape)).astype(np.float32) for n, shape in reference["tensors"].items()}
    batch = reference["batch"]
    x = rng.standard_normal((batch, *reference["input_shape"])).astype(np.float32)
    feeds = {step_contract.X: x, step_contract.Y: rng.integers(0, reference["classes"], batch)}
    feeds |= {
        n: np.array(0, np.float32) for n in (step_contract.LR, step_contract.MOMENTUM, step_contract.WEIGHT_DECAY)
    }
    feeds |= tensors | {step_contract.buffer(n): np.zeros_like(v) for n, v in tensors.items()}
    session = Session((assets / "probe_training.onnx").read_bytes(), threads=threads, training=True)
    train = _median_seconds(lambda: session.run(feeds), seconds / 2)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GRAPH).write_bytes((assets / "probe_inference.onnx").read_bytes())
        (Path(folder) / WEIGHTS).write_bytes(tensorfile.encode(tensors))
        predictor = Predictor(Path(folder), threads=threads)
        infer = _median_seconds(lambda: predictor.predict(x), seconds / 2)
    return 2 * batch * reference["training_macs"] / train, 2 * batch * reference["forward_macs"] / infer


def _median_seconds(run: Callable[[], object], seconds: float) -> float:
    run()  # the first run allocates
    times: list[float] = []
    while len(times) < _MIN_RUNS or sum(times) < seconds:
        at = time.perf_counter()
        run()
        times.append(time.perf_counter() - at)
    return max(float(np.median(times)), 1e-9)
