"""A simulated fleet on the card, `fedprune-simulate --cuda`, and the same FedAvg as a loop in torch on it."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.board import SERVER_MODULES
from benchmarks.gpu.machine import Machine
from benchmarks.step_nets import loss, network
from fedprune_export.importing import export_torch

DEVICES, SAMPLES, BATCH = 50, 64, 32
LR, MOMENTUM = 0.01, 0.9
ROUNDS = (1, 3)
"""Of two runs: their difference is rounds without the start."""

CONFIG = """
[job]
strategy = "fedavg"
rounds = {rounds}
deadline_s = 100000

[job.recipe]
lr = {lr}
momentum = {momentum}
batch_size = {batch}
evaluate_every = {every}

[model]
path = "model.onnx"
"""
NEVER = 1_000_000


def measure_fleet(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row without the boards' measurements of their models, and one with them."""
    if not machine.has_modules("a simulated fleet", *SERVER_MODULES):
        return
    net, devices = ("lenet", 2) if machine.dry else ("resnet20_bn", DEVICES)
    cases = {"training alone": NEVER} if machine.dry else {"training alone": NEVER, "with evaluations": 1}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "model.onnx").write_bytes(export_torch(network(net)))
        data = [_write_data(folder, number, net) for number in range(devices)]
        for case in machine.in_time(cases, 0.0 if machine.dry else 60.0):
            seconds, moves = _simulated_round_s(machine, folder, devices, cases[case])
            yield {
                "case": case,
                "net": net,
                "devices": devices,
                "samples": SAMPLES,
                "ours_s": seconds,
                "torch_s": _torch_round_s(machine.device, net, data, evaluates=cases[case] == 1),
                "fell_back": moves,
                "ok": not moves,
            }


def _write_data(folder: Path, number: int, net: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(number)
    shape = network(net).input_shape
    x, x_test = (rng.standard_normal((SAMPLES, *shape)).astype(np.float32) for _ in range(2))
    y, y_test = (rng.integers(0, 10, SAMPLES) for _ in range(2))
    np.savez(folder / f"board-{number}.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return x, y, x_test, y_test


def _simulated_round_s(machine: Machine, folder: Path, devices: int, every: int) -> tuple[float, list[str]]:
    """Seconds of a round, and where the log says that the processor computed."""
    seconds, moves = [], list[str]()
    for rounds in ROUNDS:
        text = CONFIG.format(rounds=rounds, lr=LR, momentum=MOMENTUM, batch=BATCH, every=every)
        for number in range(devices):
            name = f"board-{number}"
            text += f'\n[[devices]]\nname = "{name}"\nprofile = "jetson-orin-nano"\ndata = "{name}.npz"\n'
        (folder / "fleet.toml").write_text(text)
        options = ["--config", "fleet.toml", "--out", f"run-{every}-{rounds}"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "fedprune_server.cli.simulate", *options, *([] if machine.dry else ["--cuda"])],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240 if machine.dry else max(30.0, machine.seconds_left()),
        )
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            raise RuntimeError(f"fedprune-simulate ended with {done.returncode}: {done.stderr[-2000:]}")
        moves += [line for line in done.stderr.splitlines() if "instead of CUDA" in line]
    return (seconds[1] - seconds[0]) / (ROUNDS[1] - ROUNDS[0]), moves


def _torch_round_s(device: str, net: str, data: list[tuple[Any, ...]], *, evaluates: bool) -> float:
    """Seconds of a round of FedAvg, the fastest of three: samples are on the card, and weights stay there."""
    model = network(net).to(device)
    samples = [tuple(torch.tensor(a, device=device) for a in arrays) for arrays in data]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        state = copy.deepcopy(model.state_dict())
        total = {n: torch.zeros_like(v, dtype=torch.float32) for n, v in state.items()}
        for x, y, x_test, y_test in samples:
            model.load_state_dict(state)
            if evaluates:
                _torch_evaluate(model, x_test, y_test)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
            for rows in torch.split(torch.randperm(len(x), device=device), BATCH):
                optimizer.zero_grad()
                loss(model, x[rows], y[rows]).backward()
                optimizer.step()
            if evaluates:
                _torch_evaluate(model, x_test, y_test)
            for name, value in model.state_dict().items():
                total[name] += value / len(samples)
        model.load_state_dict({n: v.to(state[n].dtype) for n, v in total.items()})
        float(next(model.parameters()).detach().sum())  # waits for the card
        times.append(time.perf_counter() - began)
    return min(times)


def _torch_evaluate(model: Any, x: Any, y: Any) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        outputs = model(x)
        value = torch.nn.functional.cross_entropy(outputs, y)
        return float(value), float((outputs.argmax(1) == y).float().mean())
