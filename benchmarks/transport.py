"""What leading models onto each other's channels costs (SubFLOT): `OMP_NUM_THREADS=1 python -m benchmarks.transport`.

OTP, which makes a device's submodel, and OTA, which leads its update back, on the paper's three networks with ten
classes. Times are CPU time of one thread. The second part makes submodels for a thousand devices in two processes.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from benchmarks.harness import in_turns, parser, save, setting
from fedprune.model.architecture import Architecture, TensorKind, widths_at
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.optimal_transport import Transport

RATES = (0.25, 0.5, 0.75)
REPEATS = 3
PAPER = {"VGG11": 0.12, "ResNet18": 0.20, "MobileNetV2": 1.15}
"""Seconds per device for OTP on an RTX 4090 (arXiv 2604.06631, Sec. 5.8); OTA has no number."""

HISTORIES = ("trained slice", "unrelated")
MANY = "MobileNetV2"
"""The network of the second part."""

PROCESSES = 2


def networks(names: Collection[str]) -> dict[str, tuple[Architecture, Tensors]]:
    """Some of the networks, freshly made by torch and imported."""
    import torch
    from torch import nn

    from benchmarks.step_nets import Block, network
    from fedprune_export.importing import export_torch, import_onnx
    from support.nets import small_nets as nets

    torch.manual_seed(0)
    blocks = [
        Block(before, after, 1 if before == after else 2)
        for before, after in ((64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    resnet = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    resnet.input_shape = (3, 32, 32)  # type: ignore[assignment]
    made = {"VGG11": nets.VGG11(width=1.0), "ResNet18": resnet, "MobileNetV2": network("mobilenet_v2")}
    out = {}
    for name in names:
        model = import_onnx(export_torch(nets.seeded(made[name]), name=name), name)
        out[name] = model.architecture, {n: np.array(v) for n, v in model.tensors.items()}
    return out


def history(kind: str, at: Selection, model: Tensors, noise: np.random.Generator) -> Tensors:
    """A device's last model: the first channels, moved by three tenths of each tensor's spread; or other numbers."""
    out = {}
    for name, value in at.gather(model).items():
        spread = max(float(value.std()), 1e-3)
        other = noise.standard_normal(value.shape, np.float32) * np.float32(spread)
        moved = other + np.float32(value.mean()) if kind == "unrelated" else value + np.float32(0.3) * other
        positive = at.architecture.by_name[name].kind is TensorKind.STAT_VAR
        out[name] = np.abs(moved) if positive else moved
    return out


def clock(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(name: str, architecture: Architecture, model: Tensors, kind: str, rate: float) -> dict[str, Any]:
    """Medians of runs in turn."""
    at = Selection.of(architecture, widths_at(architecture, 1 - rate))
    own = history(kind, at, model, np.random.default_rng(0))
    how = Transport()
    actions = {"otp": lambda: how.prune(model, own, at), "ota": lambda: how.aggregate(own, at, model)}
    times = {f"{k}_ms": 1e3 * statistics.median(v) for k, v in in_turns(actions, REPEATS).items()}
    kept = sum(value.size for value in own.values())
    return {"net": name, "history": kind, "rate": rate, "kept": kept, **times}


_work: tuple[Tensors, list[Selection], np.ndarray[Any, Any]] | None = None


def _begin(architecture: Architecture, model: Tensors) -> None:
    global _work
    cuts = [Selection.of(architecture, widths_at(architecture, 1 - rate)) for rate in (0.0, *RATES)]
    _work = model, cuts, np.random.default_rng(0).standard_normal(1 << 22, np.float32)


def _one(device: int) -> float:
    """OTP for one of many devices, whose history is its own: seconds of CPU time."""
    assert _work is not None
    model, cuts, noise = _work
    at = cuts[device % len(cuts)]
    own = {}
    for i, (name, value) in enumerate(at.gather(model).items()):
        start = (device * 7919 + i * 104729) % (noise.size // 2)
        own[name] = value + np.resize(noise[start:], value.shape) * np.float32(0.3 * max(float(value.std()), 1e-3))
    return clock(lambda: Transport().prune(model, own, at))


def fleet(architecture: Architecture, model: Tensors, devices: int) -> dict[str, Any]:
    """Submodels for many devices, a quarter of them at each rate, in worker processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, _begin, (architecture, model)) as pool:
        list(pool.map(_one, range(8)))  # both are up
        start = time.perf_counter()
        seconds = list(pool.map(_one, range(devices), chunksize=4))
        wall = time.perf_counter() - start
    return {
        "devices": devices,
        "processes": PROCESSES,
        "wall_s": wall,
        "devices_per_s": devices / wall,
        "cpu_s_in_otp": sum(seconds),
        "devices_per_cpu_s": devices / sum(seconds),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the rates."""
    out = []
    for kind in HISTORIES:
        for name in dict.fromkeys(r["net"] for r in rows):
            own = [r for r in rows if (r["net"], r["history"]) == (name, kind) and r["rate"]]
            row: dict[str, Any] = {"net": name, "history": kind, "paper_ms": PAPER[name] * 1e3}
            for key in ("otp_ms", "ota_ms"):
                row[key] = statistics.mean(r[key] for r in own)
                if key.startswith("otp"):  # the paper's times are OTP's
                    row[key.replace("_ms", "_to_paper")] = row[key] / row["paper_ms"]
            out.append(row)
    return out


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--devices", type=int, default=1000, help="how many devices the second part has")
    options = command.parse_args()
    wanted = dict(options.only).get("net")
    made = networks([name for name in PAPER if wanted in (None, name)])
    rows = []
    for name, (architecture, model) in made.items():
        for kind in HISTORIES:
            rows += [measure(name, architecture, model, kind, rate) for rate in (0.0, *RATES)]
            print(rows[-1], file=sys.stderr, flush=True)
    means = summary(rows)
    overall = {
        f"{kind}, otp": math.prod(m["otp_to_paper"] for m in means if m["history"] == kind) ** (1 / len(made))
        for kind in HISTORIES
    }
    many = fleet(*made[MANY], options.devices) if MANY in made else None
    body = {"setting": setting("POT", "scipy", "torch"), "rows": rows, "means": means, "geometric_means": overall}
    save(options.out or "transport", {**body, "fleet": many})


if __name__ == "__main__":
    main()
