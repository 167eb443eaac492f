"""A training step against torch eager: time, peak memory, installed size: `python benchmarks/step.py`.

Steps of both run in turn in one process, so that neighbours on the machine hit them alike; the ratio is the median of
the ratios within a pair. One graph file per net serves both widths. Peak memory is that of fresh processes, of which
ours imports no torch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from fedprune import step
from fedprune.selection import Tensors
from fedprune.session import Session

NETS = ("lenet", "vgg11_bn", "resnet20_bn")
DENSITIES = (1.0, 0.5)
THREADS = (1, 2)
BATCH = 32
PAIRS = 21
WARM_UP = 3
LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4

CONTENDED = 2.0
"""From this ratio of CPU time to that of one thread on, a row with more threads compares nothing."""

Step = Callable[[], float]


def network(name: str) -> Any:
    """LeNet with 1.7 M weights, VGG11-BN with 2.3 M, ResNet20-BN with 0.27 M, each for ten classes."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.shortcut = nn.Sequential()
            if stride != 1:
                self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + self.shortcut(x)).relu()

    layers: list[nn.Module] = []
    if name == "lenet":
        shape, layers = (
            (1, 28, 28),
            [
                *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(64 * 49, 512), nn.ReLU(), nn.Linear(512, 10)),
            ],
        )
    elif name == "vgg11_bn":
        shape, before = (3, 32, 32), 3
        for after in (32, 0, 64, 0, 128, 128, 0, 256, 256, 0, 256, 256, 0):
            if after:
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            else:
                layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(before, 10)]
    else:
        shape = (3, 32, 32)
        layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for before, after in ((16, 16), (16, 32), (32, 64)):
            layers += [Block(before, after, after // before), Block(after, after, 1), Block(after, after, 1)]
        layers += [nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)]
    net = nn.Sequential(*layers)
    net.input_shape = shape  # type: ignore[assignment]
    return net


def batch(shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((BATCH, *shape)).astype(np.float32), rng.integers(0, 10, BATCH)


def our_step(graph: Path, tensors: Tensors, x: Any, y: Any, threads: int) -> Step:
    session = Session(graph, threads=threads, training=True)
    scalars = {step.LR: LR, step.MOMENTUM: MOMENTUM, step.WEIGHT_DECAY: DECAY}
    feeds: dict[str, Any] = {**tensors, step.X: x, step.Y: y}
    feeds |= {n: np.array(v, np.float32) for n, v in scalars.items()}
    feeds |= {n: np.zeros_like(tensors[n.split("::")[0]]) for n in session.inputs if "::" in n}

    def run() -> float:
        out = session.run(feeds)
        feeds.update((n, out[step.following(n)]) for n in feeds if step.following(n) in out)
        return float(out[step.LOSS])

    return run


def torch_step(net: Any, tensors: Tensors, x: Any, y: Any, threads: int) -> Step:
    """Eager torch; the module takes the width of the tensors that are put in."""
    import torch

    torch.set_num_threads(threads)
    net.train()
    for name, value in tensors.items():
        owner, _, field = name.rpartition(".")
        part = net.get_submodule(owner)
        tensor = torch.tensor(value)
        setattr(part, field, torch.nn.Parameter(tensor) if field in part._parameters else tensor)
    optimiser = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    images, labels = torch.tensor(x), torch.tensor(y)

    def run() -> float:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return run


def compare(ours: Step, theirs: Step) -> dict[str, float]:
    """Wall time and CPU time of both in turn."""
    rows = []
    for _ in range(WARM_UP + PAIRS):
        row: list[float] = []
        for run in (ours, theirs):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            row += [1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)]
        rows.append(row)
    kept = rows[WARM_UP:]
    wall, cpu, torch_wall, torch_cpu = (statistics.median(r[i] for r in kept) for i in range(4))
    return {
        "ms": wall,
        "torch_ms": torch_wall,
        "ratio": statistics.median(r[0] / r[2] for r in kept),
        "cpu_ms": cpu,
        "torch_cpu_ms": torch_cpu,
        "cpu_ratio": statistics.median(r[1] / r[3] for r in kept),
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
    if engine == "ours":
        run = our_step(folder / f"{name}.onnx", tensors, x, y, 1)
        assert "torch" not in sys.modules
    else:
        run = torch_step(network(name), tensors, x, y, 1)
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
    from synthetic_nets import setting, write

    from fedprune.architecture import widths_at
    from fedprune.recipe import Features
    from fedprune.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training import training_graph

    about = setting("onnxruntime", "torch")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in NETS:
            model = import_onnx(export_torch(network(name)), name)
            arch = model.architecture
            start = time.perf_counter()
            graph = training_graph(model, Features())
            build = 1e3 * (time.perf_counter() - start)
            (folder / f"{name}.onnx").write_bytes(graph.to_bytes())
            (folder / f"{name}.json").write_text(json.dumps(arch.input_shape))
            x, y = batch(arch.input_shape)
            for density in DENSITIES:
                tensors = Selection.of(arch, widths_at(arch, density)).gather(model.tensors)
                np.savez(folder / f"{name}-{density}.npz", **tensors)  # type: ignore[arg-type]
                memory = {f"{e}_peak_mb": peak(e, name, folder, density) for e in ("ours", "torch")}
                alone: dict[str, float] = {}
                for threads in THREADS:
                    ours = our_step(folder / f"{name}.onnx", tensors, x, y, threads)
                    theirs = torch_step(network(name), tensors, x, y, threads)
                    times = compare(ours, theirs)
                    alone = times if threads == 1 else alone
                    what: dict[str, Any] = {"net": name, "density": density, "threads": threads, "build_ms": build}
                    what["contended"] = any(times[k] > CONTENDED * alone[k] for k in ("cpu_ms", "torch_cpu_ms"))
                    rows.append({**what, **times, **memory})
                    print(rows[-1], flush=True)
    sizes = {"ours": installed("onnxruntime", "numpy"), "torch": installed("torch", "numpy")}
    body = {"setting": about, "batch": BATCH, "pairs": PAIRS, "rows": rows, "installed_mb": sizes}
    write("step", body, page(about, rows, sizes))


def mark(row: dict[str, Any], ratio: str) -> str:
    return "–" if row["contended"] else f"{row[ratio]:.2f}"


def page(about: dict[str, Any], rows: list[dict[str, Any]], sizes: dict[str, dict[str, float]]) -> str:
    total = {k: sum(v.values()) for k, v in sizes.items()}
    builds = {r["net"]: r["build_ms"] for r in rows}
    table = "\n".join(
        f"| {r['net']} | {r['density']:g} | {r['threads']} | {r['ms']:.1f} | {r['torch_ms']:.1f} | {mark(r, 'ratio')} "
        f"| {r['cpu_ms']:.1f} | {r['torch_cpu_ms']:.1f} | {mark(r, 'cpu_ratio')} "
        f"| {r['ours_peak_mb']:.0f} | {r['torch_peak_mb']:.0f} |"
        for r in rows
    )
    return f"""# A training step

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (load {about["load"]} from neighbours),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}, torch {about["torch"]}. `python benchmarks/step.py`

SGD with momentum and weight decay, batch {BATCH}; medians of {PAIRS} pairs of steps in turn; *ratio* is the median
ratio within a pair, below 1 where ours is faster. CPU time counts all threads. Peak memory: fresh processes, one
thread. The same graph file serves both widths.

| net | width | threads | ms | torch ms | ratio | CPU | torch CPU | ratio | peak MB | torch peak MB |
|---|---|---|---|---|---|---|---|---|---|---|
{table}

–: no comparison. Neighbours were on the cores, and one of the two burned over {CONTENDED:g} times the CPU time that it
takes with one thread: its threads spun while they waited for each other.

Installed, with all that they require (numpy in both): onnxruntime {total["ours"]:.0f} MB, torch for CPUs
{total["torch"]:.0f} MB.

Differentiating a model: {", ".join(f"{n} {ms:.0f} ms" for n, ms in builds.items())}.
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        measure_peak(sys.argv[2], sys.argv[3], Path(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
