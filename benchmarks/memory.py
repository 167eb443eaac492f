"""Peak memory of training with activations computed again, and what that costs: `python -m benchmarks.memory`.

Peaks are those of fresh processes, of which ours import no torch; times are those of steps in turn in one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import in_fresh_process, in_turns, ratio, run_cases
from benchmarks.measured_steps import BATCH, batch, our_step
from benchmarks.step import DENSITIES, peak_of

MOST_WORK = 0.3
"""Estimated work that may be added, as a share of the step's."""

TURNS, WARM_UP = 9, 2


def measure(net: str, density: float) -> dict[str, Any]:
    from benchmarks.step_nets import network
    from fedprune.model.architecture import widths_at
    from fedprune.model.recipe import Features
    from fedprune.model.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.checkpointing import recomputed, value_sizes
    from fedprune_export.training.memory import GAPS_AGAIN, taken, training_memory
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(network(net)), net)
    architecture = model.architecture
    widths = widths_at(architecture, density)
    tensors = Selection.of(architecture, widths).gather(model.tensors)
    graph = training_graph(model, Features())
    sizes = value_sizes(graph, architecture, widths, BATCH)
    began = time.perf_counter()
    again = recomputed(graph, sizes, 0, most_work=MOST_WORK)
    write_s = time.perf_counter() - began
    predicted = training_memory(graph, sizes), taken(again.graph, sizes, again.live_bytes, GAPS_AGAIN)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weights, paths = folder / "weights.npz", {"plain": folder / "plain.onnx", "again": folder / "again.onnx"}
        np.savez(weights, **tensors)  # type: ignore[arg-type]
        for path, written in zip(paths.values(), (graph, again.graph), strict=True):
            path.write_bytes(written.to_bytes())
        shape = architecture.input_shape
        peaks = {n: 1.024 * in_fresh_process(peak_of, "ours", net, p, weights, shape) for n, p in paths.items()}
        torch_mb = 1.024 * in_fresh_process(peak_of, "torch", net, paths["plain"], weights, shape)
        steps = {n: our_step(p, tensors, *batch(shape), 1) for n, p in paths.items()}
        if len({step() for step in steps.values()}) > 1:
            raise SystemExit(f"{net} at {density:g}: the losses differ")
        seconds = in_turns(steps, TURNS, WARM_UP)
    return {
        "torch_mb": torch_mb,
        "plain_mb": peaks["plain"],
        "again_mb": peaks["again"],
        "plain_said_mb": predicted[0].peak / 1e6,
        "again_said_mb": predicted[1].peak / 1e6,
        "values": again.values,
        "work": again.work,
        "write_s": write_s,
        "ms": 1e3 * statistics.median(seconds["plain"]),
        "slower": ratio(seconds["again"], seconds["plain"]),
    }


def main() -> None:
    from benchmarks.step_nets import NETS

    cases = [{"net": net, "density": density} for net in NETS for density in DENSITIES]
    run_cases("memory", __doc__, cases, measure, "onnxruntime", "torch", batch=BATCH, most_work=MOST_WORK)


if __name__ == "__main__":
    main()
