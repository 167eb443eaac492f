"""How far the planner's memory and time are off: predicted beside measured, every case in a fresh process.

    python benchmarks/planner.py [--raw measured.json]

Memory is the high-water mark of a process that holds what a device's agent holds (trainer, MQTT client, local
data). Time is the median of the processor time of a training step on one thread, so that neighbours on the machine
disturb it little. Rate and bandwidth, from which time is predicted, are the best of a few measurements: the rate by
the device's own probe, the bandwidth by a large copy, both by processor time, too. The constants of `fedprune.costs`
were fitted to earlier runs of all nets but ConcatNet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 512
STEPS = 14
BANDWIDTH_BYTES = 2**28
UNSEEN = "ConcatNet"
"""The net that took no part in the fit."""


def nets() -> dict[str, Any]:
    """Torch modules by name: those that the tests share, some of them wider."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from torch import nn

    import nets as shared

    class WideLeNet(nn.Module):
        """The LeNet of federated learning's papers: 32 and 64 channels, 512 hidden units."""

        input_shape = (1, 28, 28)

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
            self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
            self.fc1 = nn.Linear(64 * 49, 512)
            self.fc2 = nn.Linear(512, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
            x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
            x = torch.relu(self.fc1(torch.flatten(x, 1)))
            return self.fc2(x)

    return {
        "LeNet": WideLeNet(),
        "LeNet-5": shared.lenet(),
        "VGG11-BN": shared.VGG11(width=1.0),
        "ResNet20-BN": shared.resnet20_bn(),
        "ConcatNet": shared.concat_net(),
    }


def child(folder: Path, batch: int) -> None:
    """Train a few steps as a device does and print the peak memory and the median step."""
    import paho.mqtt.client  # noqa: F401 - an agent holds it, too

    from fedprune import tensorfile
    from fedprune.recipe import Recipe
    from fedprune_device.data import LocalData
    from fedprune_device.trainer import Trainer

    spec = json.loads((folder / "spec.json").read_text())
    tensors = tensorfile.load(folder / "weights.safetensors")
    trainer = Trainer(folder / "training.onnx", threads=1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, *spec["input_shape"]), dtype=np.float32)
    y = rng.integers(0, spec["classes"], SAMPLES)
    data = LocalData(x, y, x[:1], y[:1])
    recipe = Recipe(epochs=STEPS, batch_size=batch, lr=0.001, max_steps=STEPS)
    ticks = [time.process_time()]
    trainer.train(
        tensors,
        data,
        recipe,
        seed=0,
        device="d",
        round=1,
        classes=spec["classes"],
        progress=lambda *_: ticks.append(time.process_time()),
    )
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_bytes": peak, "step_s": float(np.median(np.diff(ticks)))}))


def rate() -> float:
    """FLOP/s of the probe's training step, by the processor's time."""
    from fedprune_device import probe

    with patch.object(probe.time, "perf_counter", time.process_time):
        return max(probe.probe(threads=1, seconds=1.0).train_rate or 0.0 for _ in range(5))


def bandwidth() -> float:
    """Bytes per second of a large copy, read plus write."""
    source, target = np.ones(BANDWIDTH_BYTES // 8), np.zeros(BANDWIDTH_BYTES // 8)
    seconds = []
    for _ in range(10):
        began = time.process_time()
        np.copyto(target, source)
        seconds.append(time.process_time() - began)
    return 2 * BANDWIDTH_BYTES / min(seconds)


def measure() -> list[dict[str, Any]]:
    """Every net at two widths and several batches."""
    from fedprune import tensorfile, widths_at
    from fedprune.costs import costs_at
    from fedprune.recipe import Features
    from fedprune.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training import training_graph

    rows = []
    for name, module in nets().items():
        model = import_onnx(export_torch(module), name)
        architecture = model.architecture
        graph = training_graph(model, Features()).to_bytes()
        for density in (1.0, 0.5):
            widths = widths_at(architecture, density)
            costs = costs_at(architecture, widths)
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                (folder / "training.onnx").write_bytes(graph)
                weights = Selection.of(architecture, widths).gather(model.tensors)
                (folder / "weights.safetensors").write_bytes(tensorfile.encode(weights))
                spec = {"input_shape": architecture.input_shape, "classes": architecture.classes}
                (folder / "spec.json").write_text(json.dumps(spec))
                for batch in (8, 32, 64):
                    command = [sys.executable, __file__, "--child", made, "--batch", str(batch)]
                    runs = [
                        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                        for _ in range(2)
                    ]
                    rows.append(
                        {
                            "net": name,
                            "density": density,
                            "batch": batch,
                            "costs": vars(costs),
                            "peak_bytes": max(r["peak_bytes"] for r in runs),
                            "step_s": statistics.median(r["step_s"] for r in runs),
                        }
                    )
                    print(f"{name} at {density}, batch {batch}: {rows[-1]['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
    return rows


def compare(rows: list[dict[str, Any]], rate: float, bandwidth: float) -> list[dict[str, Any]]:
    """Predictions and their errors beside what was measured."""
    from fedprune.costs import Costs
    from fedprune.recipe import Features

    table = []
    for row in rows:
        costs = Costs(**row["costs"])
        memory = costs.training_bytes(row["batch"], Features(), SAMPLES)
        seconds = costs.step_seconds(row["batch"], rate, bandwidth)
        errors = {"memory_error": memory / row["peak_bytes"] - 1, "time_error": seconds / row["step_s"] - 1}
        table.append({**row, "predicted_bytes": memory, "predicted_s": seconds, **errors})
    return table


def spread(errors: list[float]) -> str:
    """Least, greatest and median error."""
    return f"{min(errors):+.0%} to {max(errors):+.0%}, median {statistics.median(errors):+.0%}"


def page(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The results as a page."""
    rows = result["rows"]
    low = [r for r in rows if r["memory_error"] < 0]
    safe = "never too low" if not low else f"TOO LOW in {len(low)} cases"
    times = {
        "the nets of the fit": [r["time_error"] for r in rows if r["net"] != UNSEEN],
        UNSEEN: [r["time_error"] for r in rows if r["net"] == UNSEEN],
    }
    lines = []
    for r in rows:
        cells = [r["net"], r["density"], r["batch"]]
        cells += [f"{r['peak_bytes'] / 1e6:.0f}", f"{r['predicted_bytes'] / 1e6:.0f}", f"{r['memory_error']:+.0%}"]
        cells += [f"{r['step_s'] * 1e3:.1f}", f"{r['predicted_s'] * 1e3:.1f}", f"{r['time_error']:+.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    table = "\n".join(lines)
    return f"""# How far the planner is off

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (one used; load {about["load"]} at the start),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}. `python benchmarks/planner.py`

Predicted beside measured, every case in fresh processes: peak resident memory of what a board's agent holds (the higher
of two runs), median processor time of a training step on one thread. {UNSEEN} took no part in the fit of the constants.
The probe's step reached {result["rate"] / 1e9:.1f} GFLOP/s, a large copy {result["bandwidth"] / 1e9:.1f} GB/s.

- Memory: {spread([r["memory_error"] for r in rows])}; {safe}.
- Time: {"; ".join(f"{n}: {spread(e)}" for n, e in times.items())}.

| net | density | batch | peak MB | predicted | error | step ms | predicted | error |
|---|---|---|---|---|---|---|---|---|
{table}
"""


def main() -> None:
    """Measure, compare, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help="where to keep, or from where to take, what was measured")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batch)
        return
    from synthetic_nets import setting, write

    if arguments.raw and arguments.raw.exists():
        raw = json.loads(arguments.raw.read_text())
    else:
        about = setting("onnxruntime")
        raw = {"setting": about, "rate": rate(), "bandwidth": bandwidth(), "rows": measure()}
        if arguments.raw:
            arguments.raw.write_text(json.dumps(raw))
    result = {**raw, "rows": compare(raw["rows"], raw["rate"], raw["bandwidth"])}
    write("planner", result, page(raw["setting"], result))


if __name__ == "__main__":
    main()
