"""Steps and predictions on an emulated board, counted by a plugin of the emulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from support.processes.arm_board import Board, copy_userland
from support.processes.arm_userland import BOOKWORM, CACHE, tool, userland

HERE = Path(__file__).resolve().parent

NETS = ("lenet", "vgg11_bn", "resnet20_bn", "resnet18_gn", "mobilenet_v2")
DENSITIES = (1.0, 0.5, 0.25)
BATCH = 8
TRAINING = ("ours", "torch")
PREDICTING = ("plain", "float32", "int8")
TORCH = "2.9.1"
"""The newest release whose wheel for Arm on the package index is for processors alone."""

TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")

SITE, TORCH_SITE, FILES = "/site", "/torch", "/files"


Count = Mapping[str, int]
"""`instructions`, and `bytes` that loads and stores move."""


def prepare(folder: Path, nets: Sequence[str], densities: Sequence[float]) -> None:
    """Write the files that a server sends and those that torch needs, a folder for each net and width."""
    from benchmarks.precision import make
    from benchmarks.step_nets import network
    from fedprune.model.architecture import widths_at
    from fedprune.model.features import Features
    from fedprune.model.selection import Selection
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    for name in nets:
        model = import_onnx(export_torch(network(name)), name)
        architecture = model.architecture
        step = training_graph(model, Features()).to_bytes()
        for density in densities:
            place = folder / row(name, density)
            place.mkdir()
            widths = widths_at(architecture, density)
            tensors = Selection.of(architecture, widths).gather(model.tensors)
            (place / "shape.json").write_text(json.dumps(architecture.input_shape))
            (place / "training.onnx").write_bytes(step)
            np.savez(place / "weights.npz", **tensors)  # type: ignore[arg-type]
            x = np.random.default_rng(1).standard_normal((64, *architecture.input_shape)).astype(np.float32)
            make(place, model, widths, x)
            (place / "plain.onnx").write_bytes(plain(network(name), tensors))


def plain(net: Any, tensors: Mapping[str, Any]) -> bytes:
    """Torch's own export of a submodel."""
    import torch

    from fedprune_export.importing import export_torch

    net.take({n: torch.tensor(v) for n, v in tensors.items()})
    return export_torch(net)


def counter(folder: Path) -> Path:
    """The compiled plugin."""
    made = folder / "counter.so"
    command = [tool("cc", "gcc"), "-O2", "-shared", "-fPIC", "-o", str(made), str(HERE / "counter.c")]
    subprocess.run(command, check=True)
    return made


def board(folder: Path, engines: Iterable[str]) -> Board:
    """A userland with a kit's wheels, torch's if it is needed, and what runs."""
    from fedprune_flash import BoardTarget
    from fedprune_flash.kit import wheelhouse

    made = copy_userland(userland(BOOKWORM), folder / "board")
    wheels = folder / "wheels"
    wheelhouse.fetch_wheels(wheelhouse.build_wheel(folder / "own"), BoardTarget(BOOKWORM.python), wheels)
    unpack(wheels, made.root / SITE[1:])
    if "torch" in engines:
        unpack(torch_wheels(), made.root / TORCH_SITE[1:])
    package = made.root / SITE[1:] / "benchmarks"
    (package / "arm").mkdir(parents=True)
    for file in ("arm/on_board.py", "measured_steps.py", "step_nets.py"):
        shutil.copy(HERE.parent / file, package / file)
    return replace(made, plugin=counter(folder))


def torch_wheels() -> Path:
    """Torch for Arm and what it requires, fetched once."""
    place = CACHE / f"torch-{TORCH}"
    if not place.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as new:
            platforms = ["manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
            command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "-d", f"{new}/wheels"]
            command += ["--python-version", BOOKWORM.python, *(w for p in platforms for w in ("--platform", p))]
            # pip asks for what torch requires on this machine, which is CUDA: its own wheel comes without.
            subprocess.run([*command, "--no-deps", f"torch=={TORCH}"], check=True)
            subprocess.run([*command, *TORCH_NEEDS], check=True)
            Path(new, "wheels").rename(place)
    return place


def unpack(wheels: Path, place: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)


def count(machine: Board, engine: str, rows: Sequence[str], batch: int, timeout: float) -> dict[str, Count]:
    """Counts of one step or prediction, by row."""
    path = f"{TORCH_SITE}:{SITE}" if engine == "torch" else SITE
    machine = replace(machine, environment={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
    found: dict[str, Count] = {}
    # qemu 7.2 ends with a fault where a process has translated too much: another one goes on with the next row.
    while waiting := [r for r in rows if r not in found]:
        words = ["/usr/bin/python3", "-m", "benchmarks.arm.on_board", FILES, str(batch), engine, *waiting]
        done = machine.run(*words, timeout=timeout)
        marks = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("counted ")]
        totals = {int(number): (int(instructions), int(moved)) for number, instructions, moved in marks}
        for i, name in enumerate(waiting):
            if 2 * i + 1 in totals:
                (a, b), (c, d) = totals[2 * i], totals[2 * i + 1]
                found[name] = {"instructions": c - a, "bytes": d - b}
        if waiting[0] not in found:
            raise SystemExit(f"{engine} {waiting[0]} on {machine.processor}: {done.stderr[-2000:]}")
    return found


@contextmanager
def counted_board(nets: Sequence[str], densities: Sequence[float], engines: Sequence[str]) -> Iterator[Board]:
    """A board with all that these engines need for these nets; it goes with the block."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".counts.") as place:
        machine = board(Path(place), engines)
        files = machine.root / FILES[1:]
        files.mkdir()
        prepare(files, nets, densities)
        yield machine


def row(net: str, density: float) -> str:
    """The name of a net at a width."""
    return f"{net}@{density:g}"


def versions() -> dict[str, str]:
    """Of the wheels that run."""
    from fedprune_flash import BoardTarget
    from fedprune_flash.kit.wheelhouse import locked_requirements

    pinned = dict(line.split("==") for line in locked_requirements(BoardTarget(BOOKWORM.python)) if "==" in line)
    return {n: pinned[n].split()[0] for n in ("onnxruntime", "numpy")} | {"torch": TORCH}
