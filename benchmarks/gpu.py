"""Training and predictions on an NVIDIA GPU against eager torch on the same one: `python -m benchmarks.gpu`.

It needs onnxruntime-gpu and a torch with CUDA, no network, and at most eight minutes; what the machine lacks is
skipped, by name. Steps run in turn in one process. Weights and the optimiser's state stay on the card, and steps are
recorded as CUDA graphs, as the board's trainer has it. The losses of the first steps, the last of which are replayed,
are compared with those of the processor. `--dry` goes through all of it on the processor with one small net, and writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.harness import in_turns, save, setting
from benchmarks.measured_steps import Step, batch, session_step, step_feeds, torch_step
from benchmarks.step import DENSITIES
from benchmarks.step_nets import NETS, network
from fedprune.core import tensorfile
from fedprune.model.architecture import widths_at
from fedprune.model.features import Features
from fedprune.model.selection import Selection
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.runtime import session as sessions
from fedprune.runtime.session import OnnxSession
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph

TURNS, WARM_UP, STEPS = 20, 5, 12
SECONDS = 420.0
"""No net is begun after so long."""

PROVIDER = "CUDAExecutionProvider"


def timed(steps: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median milliseconds of steps that run in turn."""
    seconds = in_turns(steps, turns, WARM_UP, time.perf_counter)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def placement(graph: bytes, feeds: Mapping[str, Any], device: str) -> dict[str, Any]:
    """How many operators each provider ran in a step, which the processor's were, and the copies between the two."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    providers = [(PROVIDER, sessions.CUDA_OPTIONS)] if device == CUDA else []
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/step"
        session = onnxruntime.InferenceSession(graph, options, providers=[*providers, "CPUExecutionProvider"])
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    left = Counter(a["op_name"] for a in ran if a["provider"] != PROVIDER)
    copies = Counter(a["op_name"] for a in ran if a["op_name"].startswith("Memcpy"))
    return {
        "operators": dict(Counter(a["provider"] for a in ran)),
        "on_the_processor": dict(left) if device == CUDA else {},
        "copies": dict(copies),
    }


def predictions(model: Any, widths: tuple[int, ...], device: str, turns: int) -> dict[str, Any]:
    """Milliseconds of one prediction by provider, and how far the GPU's outputs are from the processor's."""
    shape = model.architecture.input_shape
    x = np.random.default_rng(1).standard_normal((1, *shape)).astype(np.float32)
    tensors = Selection.of(model.architecture, widths).gather(model.tensors)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / GRAPH).write_bytes(inference_model(model, widths))
        (folder / WEIGHTS).write_bytes(tensorfile.encode(tensors))
        both = {unit: Predictor(folder, cuda=unit == CUDA) for unit in dict.fromkeys((CPU, device))}
        outputs = {unit: one.predict(x) for unit, one in both.items()}
        away = float(np.abs(outputs[device] - outputs[CPU]).max())
        ms = timed({unit: lambda p=one: p.predict(x) for unit, one in both.items()}, turns)  # type: ignore[misc]
    return {"ms": ms, "away": away}


def measure(name: str, densities: tuple[float, ...], device: str, turns: int) -> list[dict[str, Any]]:
    """All of a net: steps and predictions at each width."""
    model = import_onnx(export_torch(network(name)), name)
    graphs = {unit: training_graph(model, Features(), unit).to_bytes() for unit in (CPU, CUDA)}
    x, y = batch(model.architecture.input_shape)
    rows = []
    for density in densities:
        widths = widths_at(model.architecture, density)
        tensors = Selection.of(model.architecture, widths).gather(model.tensors)
        reference = OnnxSession(graphs[CPU], threads=0, training=True)
        feeds = step_feeds(reference.inputs, tensors, x, y)
        session = OnnxSession(graphs[CUDA], training=True, cuda=device == CUDA)
        row: dict[str, Any] = {
            "net": name,
            "density": density,
            "provider": session.provider,
            "reason": session.cpu_reason,
        }
        own = {n: v.copy() for n, v in feeds.items()}  # steps of the processor write into theirs
        steps: dict[str, Step] = {"ours": session_step(session, own)}
        steps["torch"] = torch_step(name, tensors, x, y, torch.get_num_threads(), device)
        cpu = session_step(reference, feeds)
        wanted = [cpu() for _ in range(STEPS)]
        first = {n: [run() for _ in range(STEPS)] for n, run in steps.items()}
        row["away"] = {n: max(abs(a - b) for a, b in zip(got, wanted, strict=True)) for n, got in first.items()}
        row["ms"] = timed(steps, turns)
        if density == densities[0]:
            row["placement"] = placement(graphs[CUDA], feeds, device)
        row["prediction"] = predictions(model, widths, device, turns)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def card() -> dict[str, str]:
    """Name, driver and CUDA of the card."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    return {"card": name, "driver": driver, "cuda": str(torch.version.cuda)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the processor, one net, nothing written")
    options = parser.parse_args()
    if options.dry:
        measure("lenet", (0.25,), CPU, 2)
        return 0
    if PROVIDER not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
        lacks = "a CUDA build of torch" if not torch.cuda.is_available() else "onnxruntime-gpu"
        print(f"error: this machine lacks {lacks}; `--dry` needs neither", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began, rows, skipped = time.monotonic(), list[dict[str, Any]](), list[str]()
    for name in NETS:
        if time.monotonic() - began > SECONDS:
            skipped.append(f"{name} (no time left)")
            continue
        rows += measure(name, DENSITIES, CUDA, TURNS)
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        skipped.append("TensorRT (not installed; `examples/jetson_acceptance.py` tries it)")
    about = setting("torch") | {"onnxruntime": onnxruntime.__version__} | card()
    save("gpu", {"setting": about, "rows": rows, "skipped": skipped})
    return 0


if __name__ == "__main__":
    sys.exit(main())
