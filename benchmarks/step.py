"""A training step compared with eager torch's: time, peak memory, installed size: `python -m benchmarks.step`.

Steps run in turn in one process, so that neighbours on the machine hit them alike; the ratio is the median of the
ratios within a turn. Ours is the graph that serves every width. Peak memory is that of fresh processes, of which ours
imports no torch.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import in_fresh_process, parser, peak_bytes, save, setting
from benchmarks.measured_steps import Step, batch, our_step, torch_step

DENSITIES = (1.0, 0.5, 0.25)
THREADS = (1, 2)
TURNS, WARM_UP = 15, 3
REST = 0.05
"""Seconds before a step: threads of another's step that spin for more work have gone to sleep."""

CONTENDED = 2.0
"""From this ratio of CPU time to that of one thread on, a row with more threads compares nothing."""


def compare(steps: Mapping[str, Step], turns: int = TURNS) -> dict[str, dict[str, float]]:
    """Wall time and CPU time of steps in turn, and their ratios to the last one's."""
    losses = [run() for run in steps.values()]
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"the first losses differ: {losses}")
    rows: list[list[tuple[float, float]]] = []
    for _ in range(WARM_UP + turns):
        row = []
        for run in steps.values():
            time.sleep(REST)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            row.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        rows.append(row)
    kept = rows[WARM_UP:]
    return {
        name: {
            "ms": statistics.median(row[i][0] for row in kept),
            "cpu_ms": statistics.median(row[i][1] for row in kept),
            "ratio": statistics.median(row[i][0] / row[-1][0] for row in kept),
            "cpu_ratio": statistics.median(row[i][1] / row[-1][1] for row in kept),
        }
        for i, name in enumerate(steps)
    }


def peak_of(engine: str, name: str, graph: Path, weights: Path, shape: tuple[int, ...]) -> float:
    """Peak resident memory of this process after five steps, in MB of 1,000 KiB."""
    with np.load(weights) as stored:
        tensors = dict(stored)
    x, y = batch(shape)
    run = torch_step(name, tensors, x, y, 1) if engine == "torch" else our_step(graph, tensors, x, y, 1)
    del tensors  # both have copies
    for _ in range(5):
        run()
    if engine != "torch" and "torch" in sys.modules:
        raise SystemExit("torch was imported")
    return peak_bytes() / 1.024e6


def installed(*names: str) -> dict[str, float]:
    """Megabytes of these distributions and all that they require, by name."""
    from packaging.requirements import Requirement

    waiting, sizes = list(names), {}
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in sizes:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        paths = {Path(str(package.locate_file(f))).resolve() for f in package.files or ()}
        sizes[name] = sum(p.stat().st_size for p in paths if p.is_file()) / 1e6
        wanted = [Requirement(r) for r in package.requires or ()]
        waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {n: round(s, 1) for n, s in sizes.items()}


def measure(name: str, density: float, folder: Path, turns: int) -> list[dict[str, Any]]:
    """The rows of a net at a width."""
    from benchmarks.step_nets import network
    from fedprune.model.architecture import widths_at
    from fedprune.model.features import Features
    from fedprune.model.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(network(name)), name)
    shape = model.architecture.input_shape
    tensors = Selection.of(model.architecture, widths_at(model.architecture, density)).gather(model.tensors)
    graph, weights = folder / "step.onnx", folder / "weights.npz"
    np.savez(weights, **tensors)  # type: ignore[arg-type]
    builds = []
    for _ in range(3):
        began = time.perf_counter()
        graph.write_bytes(training_graph(model, Features()).to_bytes())
        builds.append(1e3 * (time.perf_counter() - began))
    memory = {e: in_fresh_process(peak_of, e, name, graph, weights, shape) for e in ("ours", "torch")}
    rows: list[dict[str, Any]] = []
    for threads in THREADS:
        x, y = batch(shape)
        steps = {"ours": our_step(graph, tensors, x, y, threads), "torch": torch_step(name, tensors, x, y, threads)}
        times = compare(steps, turns)
        alone = rows[0]["times"] if rows else times
        contended = any(times[e]["cpu_ms"] > CONTENDED * alone[e]["cpu_ms"] for e in times)
        row = {"net": name, "density": density, "threads": threads, "contended": contended}
        rows.append({**row, "build_ms": min(builds), "peak_mb": memory, "times": times})
    return rows


def main() -> None:
    from benchmarks.step_nets import NETS

    options = parser(__doc__).parse_args()
    only, turns = dict(options.only), 3 if options.only else TURNS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for name in NETS:
            for density in DENSITIES:
                if only.get("net", name) == name and only.get("density", str(density)) == str(density):
                    rows += measure(name, density, Path(place), turns)
                    print(rows[-1], file=sys.stderr, flush=True)
    sizes = {"ours": installed("onnxruntime", "numpy"), "torch": installed("torch", "numpy")}
    body = {"setting": setting("onnxruntime", "torch"), "turns": turns, "rows": rows, "installed_mb": sizes}
    save(options.out or "step", body)


if __name__ == "__main__":
    main()
