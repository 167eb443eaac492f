"""Rounds of the real programs on this machine: `fedprune-server run` and `fedprune-device run` with a tier."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.machine import Machine
from benchmarks.step_nets import network
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.planning.profile import TIERS
from fedprune_export.importing import export_torch

SAMPLES = 256
CPU_TIER, CUDA_TIER, *_ = TIERS

# What the server's programs import beyond what steps and predictions need.
SERVER_MODULES = ("cryptography", "paho", "sqlalchemy")

CONFIG = """
[job]
rounds = {rounds}
devices = 1
deadline_s = 100

[job.recipe]
lr = 0.01

[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"
"""


def measure_board(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row for the board that trains on the card."""
    if can_run_programs(machine, "a board's rounds"):
        yield board_row(machine, CPU_TIER if machine.dry else CUDA_TIER)


def can_run_programs(machine: Machine, name: str) -> bool:
    """Whether server, broker and board can run here; if not, what has this name is skipped."""
    if not machine.has_modules(name, *SERVER_MODULES):
        return False
    from fedprune_server.messaging.broker.programs import find_mosquitto

    if find_mosquitto() is None and not machine.has_modules(f"{name}, without Mosquitto", "amqtt"):
        return False
    return bool(list(machine.in_time([name], 0.0 if machine.dry else 40.0)))


def board_row(machine: Machine, tier: str) -> dict[str, Any]:
    """What a server knows of a board with a tier after its rounds, and what the board says of its GPU. It may not use
    its processor where the tier is that of CUDA; other tiers may train on either."""
    from fedprune_server.storage.storage import Storage

    net, rounds = ("lenet", 1) if machine.dry else ("resnet20_bn", 3)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write_material(folder, net, rounds)
        began = time.monotonic()
        log = _run_programs(folder, tier, 240.0 if machine.dry else max(30.0, machine.seconds_left()), dry=machine.dry)
        seconds = time.monotonic() - began
        with Storage.open_existing(folder / "server") as storage:
            state = storage.load()
        devices = [summary["devices"]["board"] for summary in (state.history if state else ())]
        table = folder / "board" / "layer_times.json"
        unit = json.loads(table.read_text()).get("unit", CPU) if table.exists() else ""
    moves = [line for line in log.splitlines() if "instead of CUDA" in line]
    trained = len(devices) == rounds and all(d["progress"] == "folded" for d in devices)
    return {
        "tier": tier,
        "net": net,
        "rounds": len(devices),
        "measured_unit": unit,
        "fell_back": moves,
        "seconds": seconds,
        "step_ms": [1e3 * d["metrics"]["step_seconds"] for d in devices if "step_seconds" in d.get("metrics", {})],
        "losses": [d["metrics"]["loss_last"] for d in devices if "loss_last" in d.get("metrics", {})],
        "ok": trained and (tier != CUDA_TIER or (unit == CUDA and not moves)),
    }


def _write_material(folder: Path, net: str, rounds: int) -> None:
    module = network(net)
    (folder / "model.onnx").write_bytes(export_torch(module))
    (folder / "fleet.toml").write_text(CONFIG.format(rounds=rounds))
    rng = np.random.default_rng(0)
    for name, count in (("board", SAMPLES), ("evaluation", 64)):
        x = rng.standard_normal((count, *module.input_shape)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=rng.integers(0, 10, count))


def _run_programs(folder: Path, tier: str, limit_s: float, *, dry: bool) -> str:
    """Run server and board to the job's end; what the board wrote. Raises `RuntimeError` with both logs if one of them
    fails or takes longer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ["run", "--config", "fleet.toml", "--state", "server", "--port", str(port), "--insecure"]
    board = ["run", "--broker", f"mqtt://127.0.0.1:{port}", "--device", "board", "--data", "board.npz", "--insecure"]
    board += ["--state", "board", "--profile", "jetson-orin-nano", "--tier", tier, "--patient"]
    commands = {
        "server": ["fedprune_server.cli.main", *server],
        # A measurement takes ten seconds, and asks the server for a training graph for the unit that it measured.
        "board": ["fedprune_device.cli.main", *board, *(["--no-probe"] if dry else [])],
    }
    logs = {name: folder / f"{name}.log" for name in commands}
    programs: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with logs[name].open("wb") as log:
                programs[name] = subprocess.Popen(
                    [sys.executable, "-m", *command, "--until-finished"], stdout=log, stderr=log, cwd=folder
                )
        end = time.monotonic() + limit_s
        for program in programs.values():
            with suppress(subprocess.TimeoutExpired):
                program.wait(max(0.0, end - time.monotonic()))
        codes = {name: program.poll() for name, program in programs.items()}
    finally:
        for program in programs.values():
            program.terminate()
            with suppress(subprocess.TimeoutExpired):
                program.wait(10)
            program.kill()
    texts = {name: log.read_text(errors="replace") for name, log in logs.items()}
    if set(codes.values()) != {0}:
        said = "\n".join(f"--- {name} ({codes[name]})\n{text[-2000:]}" for name, text in texts.items())
        raise RuntimeError(f"the programs didn't end well:\n{said}")
    return texts["board"]
