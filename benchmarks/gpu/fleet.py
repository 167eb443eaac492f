"""A simulated fleet on the card, `fedprune-simulate --cuda`, and the same FedAvg as a loop in torch on it."""

from __future__ import annotations

import copy
import json
import statistics
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
from benchmarks.harness import ratio
from benchmarks.step_nets import loss, network
from fedprune_export.importing import export_torch

DEVICES, SAMPLES, BATCH = 50, 64, 32
LR, MOMENTUM = 0.01, 0.9
ROUNDS = (1, 3)  # of two runs: their difference is rounds without the start
TURNS = 3

# How far the last round's loss may be from torch's, as a share of how far that has fallen: batches are drawn otherwise.
LOSS_SLACK = 0.5

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
SIMULATE = [sys.executable, "-m", "fedprune_server.cli.simulate"]


def measure_fleet(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row without the boards' measurements of their models, and one with them."""
    if not machine.has_modules("a simulated fleet", *SERVER_MODULES):
        return
    net, devices = ("lenet", 2) if machine.dry else ("resnet20_bn", DEVICES)
    cases = {"training alone": NEVER} if machine.dry else {"training alone": NEVER, "with evaluations": 1}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "model.onnx").write_bytes(export_torch(_network(net)))
        data = [_write_data(folder, number, net) for number in range(devices)]
        for case in machine.in_time(cases, 0.0 if machine.dry else 60.0):
            ours, theirs, moves = list[float](), list[float](), list[str]()
            for turn in range(1 if machine.dry else TURNS):
                out = folder / f"{cases[case]}-{turn}"
                seconds, loss_last, said = _simulated_round_s(machine, out, devices, cases[case])
                torch_s, losses = _torch_rounds(machine.device, net, data, evaluates=cases[case] == 1)
                ours, theirs, moves = [*ours, seconds], [*theirs, torch_s], [*moves, *said]
            apart = abs(loss_last - losses[-1]) / (losses[0] - losses[-1])
            yield {
                "case": case,
                "net": net,
                "devices": devices,
                "samples": SAMPLES,
                "ours_s": statistics.median(ours),
                "torch_s": statistics.median(theirs),
                "ratio": ratio(ours, theirs),
                "losses": {"ours": loss_last, "torch": losses},
                "fell_back": moves,
                "ok": not moves and min(ours) > 0 and 0 <= apart <= LOSS_SLACK,
            }


def _write_data(folder: Path, number: int, net: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(number)
    shape = network(net).input_shape
    y, y_test = (rng.integers(0, 10, SAMPLES) for _ in range(2))
    classes = np.random.default_rng(0).standard_normal((10, *shape))  # what all devices learn
    x, x_test = ((classes[k] + rng.standard_normal((SAMPLES, *shape))).astype(np.float32) for k in (y, y_test))
    np.savez(folder / f"board-{number}.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return x, y, x_test, y_test


def _network(net: str) -> Any:
    torch.manual_seed(0)
    return network(net)


def _simulated_round_s(machine: Machine, out: Path, devices: int, every: int) -> tuple[float, float, list[str]]:
    """Seconds of a round, the last round's mean loss, and where the log says that the processor computed."""
    folder = out.parent
    seconds, moves = [], list[str]()
    for rounds in ROUNDS:
        text = CONFIG.format(rounds=rounds, lr=LR, momentum=MOMENTUM, batch=BATCH, every=every)
        for number in range(devices):
            name = f"board-{number}"
            text += f'\n[[devices]]\nname = "{name}"\nprofile = "jetson-orin-nano"\ndata = "{name}.npz"\n'
        (folder / "fleet.toml").write_text(text)
        options = ["--config", "fleet.toml", "--out", f"{out}-{rounds}"]
        began = time.perf_counter()
        done = subprocess.run(
            [*SIMULATE, *options, *([] if machine.dry else ["--cuda"])],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240 if machine.dry else max(30.0, machine.seconds_left()),
        )
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            raise RuntimeError(f"fedprune-simulate ended with {done.returncode}: {done.stderr[-2000:]}")
        moves += [line for line in done.stderr.splitlines() if "instead of CUDA" in line]
    last = json.loads(Path(f"{out}-{ROUNDS[1]}", "metrics.json").read_text())["rounds"][-1]
    loss_last = statistics.fmean(last["device_metrics"]["loss_last"].values())
    return (seconds[1] - seconds[0]) / (ROUNDS[1] - ROUNDS[0]), loss_last, moves


def _torch_rounds(device: str, net: str, data: list[tuple[Any, ...]], *, evaluates: bool) -> tuple[float, list[float]]:
    """Median seconds of a round of FedAvg, and each round's mean loss of the devices' last batches: samples are on the
    card, and weights stay there."""
    model = _network(net).to(device)
    samples = [tuple(torch.tensor(a, device=device) for a in arrays) for arrays in data]
    times, losses = [], []
    for _ in range(ROUNDS[1]):
        began = time.perf_counter()
        state = copy.deepcopy(model.state_dict())
        total = {n: torch.zeros_like(v, dtype=torch.float32) for n, v in state.items()}
        mean = torch.zeros((), device=device)
        for x, y, x_test, y_test in samples:
            model.load_state_dict(state)
            if evaluates:
                _torch_evaluate(model, x_test, y_test)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
            for rows in torch.split(torch.randperm(len(x), device=device), BATCH):
                optimizer.zero_grad()
                value = loss(model, x[rows], y[rows])
                value.backward()
                optimizer.step()
            mean += value.detach() / len(samples)
            if evaluates:
                _torch_evaluate(model, x_test, y_test)
            for name, value in model.state_dict().items():
                total[name] += value / len(samples)
        model.load_state_dict({n: v.to(state[n].dtype) for n, v in total.items()})
        losses.append(float(mean))
        float(next(model.parameters()).detach().sum())  # waits for the card
        times.append(time.perf_counter() - began)
    return statistics.median(times), losses


def _torch_evaluate(model: Any, x: Any, y: Any) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        outputs = model(x)
        value = torch.nn.functional.cross_entropy(outputs, y)
        return float(value), float((outputs.argmax(1) == y).float().mean())
