"""A training step against torch eager: time, peak memory, installed size: `python benchmarks/step.py`.

Steps run in turn in one process, so that neighbours on the machine hit them alike; the ratio is the median of the
ratios within a turn. Ours is the graph that serves every width. Peak memory is that of fresh processes, of which ours
imports no torch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
from measured_steps import Step, our_step, torch_step

DENSITIES = (1.0, 0.5, 0.25)
THREADS = (1, 2)
BATCH = 32
TURNS = 15
WARM_UP = 3
REST = 0.05
"""Seconds before a step: threads of another's step that spin for more work have gone to sleep."""

HEAD = (
    "| net | width | threads | ours, ms | torch, ms | ratio | CPU: ratio | peak MB | torch's |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

CONTENDED = 2.0
"""From this ratio of CPU time to that of one thread on, a row with more threads compares nothing."""


def batch(shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((BATCH, *shape)).astype(np.float32), rng.integers(0, 10, BATCH)


def compare(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Wall time and CPU time of steps in turn, and their ratios to the last one's."""
    losses = [run() for run in steps.values()]
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"the first losses differ: {losses}")
    turns: list[list[tuple[float, float]]] = []
    for _ in range(WARM_UP + TURNS):
        turn = []
        for run in steps.values():
            time.sleep(REST)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            turn.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        turns.append(turn)
    kept = turns[WARM_UP:]
    return {
        name: {
            "ms": statistics.median(t[i][0] for t in kept),
            "cpu_ms": statistics.median(t[i][1] for t in kept),
            "ratio": statistics.median(t[i][0] / t[-1][0] for t in kept),
            "cpu_ratio": statistics.median(t[i][1] / t[-1][1] for t in kept),
        }
        for i, name in enumerate(steps)
    }


def peak(engine: str, name: str, folder: Path, density: float) -> float:
    """Peak resident memory of a fresh process that takes five steps, in MB."""
    command = [sys.executable, __file__, "--peak", engine, name, str(folder), str(density)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(engine: str, name: str, folder: Path, density: float) -> None:
    with np.load(folder / f"{name}-{density}.npz") as held:
        tensors = {n: held[n] for n in held.files}
    shape = json.loads((folder / f"{name}.json").read_text())
    x, y = batch(tuple(shape))
    if engine != "torch":
        run = our_step(folder / f"{name}-{density}-{engine}.onnx", tensors, x, y, 1)
        assert "torch" not in sys.modules
    else:
        run = torch_step(name, tensors, x, y, 1)
    del tensors  # both have copies
    for _ in range(5):
        run()
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(float(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM")))


def installed(*names: str) -> dict[str, float]:
    """Megabytes of these distributions and all that they require, by name."""
    from packaging.requirements import Requirement

    waiting, sizes = list(names), {}
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in sizes:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        paths = {Path(str(found.locate_file(f))).resolve() for f in found.files or ()}
        sizes[name] = sum(p.stat().st_size for p in paths if p.is_file()) / 1e6
        wanted = [Requirement(r) for r in found.requires or ()]
        waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {n: round(s, 1) for n, s in sizes.items()}


def main() -> None:
    from step_nets import NETS, network
    from synthetic_nets import setting, write

    from fedprune.model.architecture import widths_at
    from fedprune.model.recipe import Features
    from fedprune.model.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    about = setting("onnxruntime", "torch")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in NETS:
            model = import_onnx(export_torch(network(name)), name)
            arch = model.architecture
            (folder / f"{name}.json").write_text(json.dumps(arch.input_shape))
            x, y = batch(arch.input_shape)
            for density in DENSITIES:
                widths = widths_at(arch, density)
                tensors = Selection.of(arch, widths).gather(model.tensors)
                np.savez(folder / f"{name}-{density}.npz", **tensors)  # type: ignore[arg-type]
                builds = []
                for _ in range(3):
                    start = time.perf_counter()
                    raw = training_graph(model, Features()).to_bytes()
                    builds.append(1e3 * (time.perf_counter() - start))
                (folder / f"{name}-{density}-ours.onnx").write_bytes(raw)
                memory = {e: peak(e, name, folder, density) for e in ("ours", "torch")}
                alone: dict[str, dict[str, float]] = {}
                for threads in THREADS:
                    ours = our_step(folder / f"{name}-{density}-ours.onnx", tensors, x, y, threads)
                    found = compare({"ours": ours, "torch": torch_step(name, tensors, x, y, threads)})
                    alone = alone or found
                    contended = any(found[e]["cpu_ms"] > CONTENDED * alone[e]["cpu_ms"] for e in found)
                    what = {"net": name, "density": density, "threads": threads, "contended": contended}
                    rows.append({**what, "build_ms": min(builds), "peak_mb": memory, "times": found})
                    print(what, {e: round(t["ratio"], 2) for e, t in found.items()}, flush=True)
    sizes = {"ours": installed("onnxruntime", "numpy"), "torch": installed("torch", "numpy")}
    body = {"setting": about, "batch": BATCH, "turns": TURNS, "rows": rows, "installed_mb": sizes}
    write("step", body, page(about, rows, sizes))


def mark(row: dict[str, Any], value: str) -> str:
    return "–" if row["contended"] else f"{row['times']['ours'][value]:.2f}"


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return statistics.geometric_mean(values) if values else float("nan")


def summary(rows: list[dict[str, Any]]) -> str:
    """Geometric means over the rows that compare anything, and the worst of them."""
    lines = []
    for threads in THREADS:
        chosen = [r for r in rows if r["threads"] == threads and not r["contended"]]
        ratios = {f"{r['net']} at {r['density']:g}": r["times"]["ours"]["ratio"] for r in chosen}
        if ratios:
            worst = max(ratios, key=lambda n: ratios[n])
            line = f"| {threads} | {len(ratios)} | {mean(list(ratios.values())):.2f} |"
            lines.append(f"{line} {ratios[worst]:.2f} ({worst}) |")
    return "\n".join(lines)


def halves(rows: list[dict[str, Any]]) -> str:
    """How much faster a step is at half width."""
    out = []
    for name in dict.fromkeys(r["net"] for r in rows):
        ms = {r["density"]: r["times"]["ours"]["cpu_ms"] for r in rows if r["net"] == name and r["threads"] == 1}
        out.append(f"{name} {ms[1.0] / ms[0.5]:.1f}")
    return ", ".join(out)


def page(about: dict[str, Any], rows: list[dict[str, Any]], sizes: dict[str, dict[str, float]]) -> str:
    total = {k: sum(v.values()) for k, v in sizes.items()}
    table = "\n".join(
        f"| {r['net']} | {r['density']:g} | {r['threads']} "
        f"| {r['times']['ours']['ms']:.1f} | {r['times']['torch']['ms']:.1f} "
        f"| {mark(r, 'ratio')} | {mark(r, 'cpu_ratio')} "
        f"| {r['peak_mb']['ours']:.0f} | {r['peak_mb']['torch']:.0f} |"
        for r in rows
    )
    one = [r for r in rows if r["threads"] == 1]
    memory = mean([r["peak_mb"]["ours"] / r["peak_mb"]["torch"] for r in one])
    builds = {r["net"]: r["build_ms"] for r in one if r["density"] == 1}
    return f"""# A training step

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (load {about["load"]} from neighbours),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}, torch {about["torch"]}. `python benchmarks/step.py`

SGD with momentum and weight decay, batch {BATCH}; medians of {TURNS} turns; *ratio* is the median ratio to torch's
within a turn, below 1 where ours is faster. Ours is one graph for all widths. CPU time counts all threads. Peak memory:
fresh processes, one thread. No board was timed: [instructions on Arm](arm.md) are counted.

| threads | cases | geometric mean of the ratio | worst |
|---|---|---|---|
{summary(rows)}

{HEAD}
{table}

–: no comparison. Neighbours were on the cores, and one of the two burned over {CONTENDED:g} times the CPU time that
it takes with one thread: its threads spun while they waited for each other.

Peak memory as a ratio to torch's, geometric mean: {memory:.2f}.

Times faster at half width (CPU time, one thread): {halves(rows)}.

Installed, with all that they require (numpy in both): onnxruntime {total["ours"]:.0f} MB, torch for CPUs
{total["torch"]:.0f} MB.

Writing a graph, ms: {", ".join(f"{n} {ms:.0f}" for n, ms in builds.items())}.
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        measure_peak(sys.argv[2], sys.argv[3], Path(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
