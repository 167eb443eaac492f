"""Peak memory of training with activations computed again, and what that costs: `python benchmarks/memory.py`.

Peaks are those of fresh processes, of which ours import no torch; times are those of steps in turn in one process.
`python benchmarks/memory.py NET ...` measures these nets alone and keeps the others' last results.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from step import BATCH, DENSITIES, batch, mean, our_step, peak

MOST_WORK = 0.3
"""Estimated work that may be added, as a share of the step's."""

TURNS, WARM_UP = 9, 2
RESULTS = Path(__file__).parent / "results" / "memory.json"


def measure_peak(graph: Path, folder: Path, name: str, density: float) -> None:
    with np.load(folder / f"{name}-{density}.npz") as held:
        tensors = {n: held[n] for n in held.files}
    run = our_step(graph, tensors, *batch(tuple(json.loads((folder / f"{name}.json").read_text()))), 1)
    del tensors
    for _ in range(5):
        run()
    if "torch" in sys.modules:
        raise SystemExit("torch was imported")
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(1024 * float(line.split()[1]) / 1e6 for line in status if line.startswith("VmHWM")))


def our_peak(graph: Path, folder: Path, name: str, density: float) -> float:
    """Peak resident memory of a fresh process that takes five steps, in MB."""
    command = [sys.executable, __file__, "--peak", str(graph), str(folder), name, str(density)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ratio(plain: Any, again: Any) -> tuple[float, float]:
    """Milliseconds of a plain step, and the median ratio of the other's time to it within a turn."""
    turns: list[tuple[float, float]] = []
    for _ in range(WARM_UP + TURNS):
        times, losses = [], []
        for run in (plain, again):
            start = time.process_time()
            losses.append(run())
            times.append(1e3 * (time.process_time() - start))
        if losses[0] != losses[1]:
            raise SystemExit(f"the losses differ: {losses}")
        turns.append((times[0], times[1]))
    kept = turns[WARM_UP:]
    return statistics.median(a for a, _ in kept), statistics.median(b / a for a, b in kept)


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    from step_nets import network

    from fedprune.model.architecture import widths_at
    from fedprune.model.recipe import Features
    from fedprune.model.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.checkpointing import recomputed, value_sizes
    from fedprune_export.training.memory import GAPS_AGAIN, taken, training_memory
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(network(name)), name)
    arch = model.architecture
    (folder / f"{name}.json").write_text(json.dumps(arch.input_shape))
    rows = []
    for density in DENSITIES:
        widths = widths_at(arch, density)
        tensors = Selection.of(arch, widths).gather(model.tensors)
        np.savez(folder / f"{name}-{density}.npz", **tensors)  # type: ignore[arg-type]
        row: dict[str, Any] = {
            "net": name,
            "density": density,
            "torch_mb": 1.024 * peak("torch", name, folder, density),
        }
        graph = training_graph(model, Features())
        sizes = value_sizes(graph, arch, widths, BATCH)
        start = time.perf_counter()
        found = recomputed(graph, sizes, 0, most_work=MOST_WORK)
        seconds = time.perf_counter() - start
        said = training_memory(graph, sizes), taken(found.graph, sizes, found.live_bytes, GAPS_AGAIN)
        paths = folder / "plain.onnx", folder / "again.onnx"
        for path, one in zip(paths, (graph, found.graph), strict=True):
            path.write_bytes(one.to_bytes())
        peaks = [our_peak(path, folder, name, density) for path in paths]
        ms, slower = ratio(*(our_step(path, tensors, *batch(arch.input_shape), 1) for path in paths))
        row |= {
            "plain_mb": peaks[0],
            "again_mb": peaks[1],
            "plain_said_mb": said[0].peak / 1e6,
            "again_said_mb": said[1].peak / 1e6,
            "values": found.values,
            "work": found.work,
            "write_s": seconds,
            "ms": ms,
            "slower": slower,
        }
        rows.append(row)
        print(name, density, round(row["again_mb"]), round(row["slower"], 2), flush=True)
    return rows


def main(nets: list[str]) -> None:
    from step_nets import NETS
    from synthetic_nets import setting, write

    about = setting("onnxruntime", "torch")
    kept = json.loads(RESULTS.read_text())["rows"] if nets and RESULTS.exists() else []
    rows = [r for r in kept if r["net"] not in nets]
    with tempfile.TemporaryDirectory() as place:
        for name in nets or NETS:
            rows += measure(name, Path(place))
    rows.sort(key=lambda r: (NETS.index(r["net"]), -r["density"]))
    write("memory", {"setting": about, "batch": BATCH, "most_work": MOST_WORK, "rows": rows}, page(about, rows))


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {r['net']} | {r['density']:g} | {r['torch_mb']:.0f} | {r['plain_mb']:.0f} | {r['plain_said_mb']:.0f} "
        f"| {r['again_mb']:.0f} | {r['again_said_mb']:.0f} | {r['again_mb'] / r['torch_mb']:.2f} "
        f"| {r['slower']:.2f} | {r['values']} | {r['write_s']:.1f} |"
        for r in rows
    ]
    plain, again = ([r[f"{w}_mb"] / r["torch_mb"] for r in rows] for w in ("plain", "again"))
    errors = [abs(r[f"{w}_said_mb"] / r[f"{w}_mb"] - 1) for r in rows for w in ("plain", "again")]
    slower = [r["slower"] for r in rows]
    summary = (
        f"| {mean(plain):.2f} | {mean(again):.2f} | {mean(slower):.2f} | {max(slower):.2f} "
        f"| {statistics.mean(errors):.0%} | {max(errors):.0%} |"
    )
    newline = "\n"
    return f"""# Memory of training

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (load {about["load"]} from neighbours),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}, torch {about["torch"]}. `python benchmarks/memory.py`

SGD with momentum and weight decay, batch {BATCH}, one thread. *Again*: as many activations computed again as lower the
peak, for at most {MOST_WORK:.0%} more estimated work. Peaks in MB are those of fresh processes that take five steps;
*said* is what the compiler predicts. *Slower*: CPU time of such a step over that of a plain one, the median of
{TURNS} turns; both give the same losses, to the bit.

| plain over torch | again over torch | slower | slower at worst | error of what is said | at worst |
|---|---|---|---|---|---|
{summary}

(The first three: geometric means over nets and widths.)

| net | width | torch | plain | said | again | said | again over torch | slower | values | written in s |
|---|---|---|---|---|---|---|---|---|---|---|
{newline.join(lines)}
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        measure_peak(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
    else:
        main(sys.argv[1:])
