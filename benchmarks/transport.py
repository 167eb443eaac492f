"""What leading models onto each other's channels costs (SubFLOT): `OMP_NUM_THREADS=1 python benchmarks/transport.py`.

OTP, which makes a device's submodel, and OTA, which leads its update back, on the paper's three networks with ten
classes. Times are CPU time of one thread. The second part makes submodels for a thousand devices in two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from synthetic_nets import RESULTS, parameters, setting, write

from fedprune.model.architecture import Architecture, TensorKind, widths_at
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.optimal_transport import Transport, alignment, solver

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
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import torch
    from torch import nn

    from fedprune_export.importing import export_torch, import_onnx
    from support.nets import small_nets as nets

    def norm(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(after)]

    class ResNet18(nn.Module):
        input_shape = (3, 32, 32)

        def __init__(self) -> None:
            super().__init__()
            layers = [*norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
            before = 64
            for after in (64, 128, 256, 512):
                layers += [nets.BasicBlock(before, after, 1 if after == 64 else 2), nets.BasicBlock(after, after, 1)]
                before = after
            self.layers, self.head = nn.Sequential(*layers), nn.Linear(512, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(x).mean((2, 3)))

    class Inverted(nn.Module):
        def __init__(self, before: int, after: int, stride: int, factor: int) -> None:
            super().__init__()
            inner = before * factor
            first = [*norm(before, inner, 1), nn.ReLU6()] if factor > 1 else []
            self.body = nn.Sequential(*first, *norm(inner, inner, 3, stride, inner), nn.ReLU6(), *norm(inner, after, 1))
            self.joined = stride == 1 and before == after

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x) if self.joined else self.body(x)

    class MobileNetV2(nn.Module):
        input_shape = (3, 32, 32)

        def __init__(self) -> None:
            super().__init__()
            layers, before = [*norm(3, 32, 3, 2), nn.ReLU6()], 32
            table = (
                (1, 16, 1, 1),
                (6, 24, 2, 2),
                (6, 32, 3, 2),
                (6, 64, 4, 2),
                (6, 96, 3, 1),
                (6, 160, 3, 2),
                (6, 320, 1, 1),
            )
            for factor, after, count, stride in table:
                for i in range(count):
                    layers.append(Inverted(before, after, 1 if i else stride, factor))
                    before = after
            self.layers = nn.Sequential(*layers, *norm(320, 1280, 1), nn.ReLU6())
            self.head = nn.Linear(1280, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(x).mean((2, 3)))

    torch.manual_seed(0)
    made = {"VGG11": nets.VGG11(width=1.0), "ResNet18": ResNet18(), "MobileNetV2": MobileNetV2()}
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
    """Medians of interleaved runs: ours, and the same with POT's solver on all pairs."""
    at = Selection.of(architecture, widths_at(architecture, 1 - rate))
    own = history(kind, at, model, np.random.default_rng(0))
    how = Transport()
    actions = {"otp": lambda: how.prune(model, own, at), "ota": lambda: how.aggregate(own, at, model)}
    times: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):
        for key, action in actions.items():
            taken = [(key, clock(action))]
            if repeat < 2:
                with mock.patch.object(alignment, "exact_plan", solver._dense):
                    taken.append((f"{key}_pot", clock(action)))
            for which, seconds in taken if repeat else ():
                times.setdefault(which, []).append(seconds)
    row = {"net": name, "history": kind, "rate": rate, "kept": parameters(own)}
    return row | {f"{k}_ms": statistics.median(v) * 1e3 for k, v in times.items()}


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
        for name in PAPER:
            own = [r for r in rows if (r["net"], r["history"]) == (name, kind) and r["rate"]]
            row: dict[str, Any] = {"net": name, "history": kind, "paper_ms": PAPER[name] * 1e3}
            for key in ("otp_ms", "ota_ms", "otp_pot_ms", "ota_pot_ms"):
                row[key] = statistics.mean(r[key] for r in own)
                if key.startswith("otp"):  # the paper's times are OTP's
                    row[key.replace("_ms", "_to_paper")] = row[key] / row["paper_ms"]
            out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1000, help="how many devices the second part has")
    parser.add_argument(
        "--part", choices=("all", "times", "devices"), default="all", help="the other is kept as it was"
    )
    arguments = parser.parse_args()
    kept = json.loads((RESULTS / "transport.json").read_text()) if arguments.part != "all" else {}
    made = networks(PAPER if arguments.part != "devices" else (MANY,))
    rows, many = kept.get("rows"), kept.get("fleet")
    if arguments.part != "devices":
        rows = [
            measure(name, architecture, model, kind, rate)
            for name, (architecture, model) in made.items()
            for kind in HISTORIES
            for rate in (0.0, *RATES)
        ]
    if arguments.part != "times":
        many = fleet(*made[MANY], arguments.devices)
    report(rows, many)


def report(rows: list[dict[str, Any]], many: dict[str, Any]) -> None:
    """Write both parts."""
    means = summary(rows)
    ratios = {
        (kind, key): math.prod(m[f"{key}_to_paper"] for m in means if m["history"] == kind) ** (1 / len(PAPER))
        for kind in HISTORIES
        for key in ("otp", "otp_pot")
    }
    about = setting("POT", "scipy", "torch")
    lines = [
        "# Transport",
        "",
        (
            f"{about['date']}, {about['cpu']}, {about['cores']} cores (one used; load {about['load']}), "
            f"Python {about['python']}, numpy {about['numpy']}, scipy {about['scipy']}, POT {about['POT']}. "
            "`OMP_NUM_THREADS=1 python benchmarks/transport.py`"
        ),
        "",
        (
            "One device's submodel (*OTP*: the global model onto the device's history, mixed with it) and its update "
            "led back (*OTA*), milliseconds of CPU time, medians of "
            f"{REPEATS}; *by POT*: the same with `ot.emd` on all pairs, one run between them. Histories: a "
            "slice of the global model moved by 30% of each tensor's spread, as after local training; and unrelated "
            "numbers, which is as bad as it gets. Plans are exact everywhere. The paper's times are of "
            "OTP, on an RTX 4090; of OTA it has none."
        ),
        "",
        "## Means over pruning rates 1/4, 1/2 and 3/4",
        "",
        "| net | history | paper's OTP | OTP | ×paper | OTP by POT | ×paper | OTA | OTA by POT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {m['net']} | {m['history']} | {m['paper_ms']:.0f} | {m['otp_ms']:.0f} | {m['otp_to_paper']:.2f} "
        f"| {m['otp_pot_ms']:.0f} | {m['otp_pot_to_paper']:.2f} | {m['ota_ms']:.0f} | {m['ota_pot_ms']:.0f} |"
        for m in means
    ]
    lines += [
        f"| geometric mean | {kind} | | | {ratios[kind, 'otp']:.2f} | | {ratios[kind, 'otp_pot']:.2f} | | |"
        for kind in HISTORIES
    ]
    lines += [
        "",
        "## By pruning rate",
        "",
        "| net | history | rate | kept (M) | OTP | OTA | OTP by POT | OTA by POT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['net']} | {r['history']} | {r['rate']:g} | {r['kept'] / 1e6:.2f} | {r['otp_ms']:.0f} "
        f"| {r['ota_ms']:.0f} | {r['otp_pot_ms']:.0f} | {r['ota_pot_ms']:.0f} |"
        for r in rows
    ]
    if many:
        lines += [
            "",
            "## Many devices",
            "",
            (
                f"OTP of {MANY} for {many['devices']} devices, a quarter at each of the rates 0, 1/4, 1/2, 3/4, "
                f"in {many['processes']} processes of one thread each: {many['wall_s']:.0f} s, "
                f"{many['devices_per_s']:.1f} devices per second (histories are made in that time, too); "
                f"{many['devices_per_cpu_s']:.1f} per second of CPU time within OTP."
            ),
        ]
    body = {
        "setting": about,
        "rows": rows,
        "means": means,
        "geometric_means": {f"{kind}, {key}": v for (kind, key), v in ratios.items()},
        "fleet": many,
    }
    write("transport", body, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
