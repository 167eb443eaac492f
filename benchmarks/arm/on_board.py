"""Runs on the emulated board: `python on_board.py FOLDER ENGINE ROW...` marks where each row's work begins and ends."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4


def mark(number: int) -> None:
    """Have the emulator print its counts: a seek in a file that can't be."""
    with contextlib.suppress(OSError):
        os.lseek(-1, number, os.SEEK_SET)


def our_step(folder: Path, x: Any, y: Any) -> Callable[[], float]:
    """The training graph that serves every width, fed as a board's trainer feeds it."""
    from fedprune.model import step_contract
    from fedprune.runtime.session import Session

    session = Session(folder / "training.onnx", threads=1, training=True)
    with np.load(folder / "weights.npz") as held:
        tensors = {n: held[n] for n in held.files}
    scalars = {step_contract.LR: LR, step_contract.MOMENTUM: MOMENTUM, step_contract.WEIGHT_DECAY: DECAY}
    feeds: dict[str, Any] = {**tensors, step_contract.X: x, step_contract.Y: y}
    feeds |= {n: np.array(v, np.float32) for n, v in scalars.items()}
    feeds |= {n: np.zeros_like(tensors[n.split("::")[0]]) for n in session.inputs if "::" in n}

    moving = [n for n in feeds if step_contract.following(n) in session.outputs]
    spare = {n: np.empty_like(feeds[n]) for n in moving}

    def run() -> float:
        out = session.run(feeds, into={step_contract.following(n): spare[n] for n in moving})
        for name in moving:  # as the board's trainer has it
            feeds[name], spare[name] = spare[name], feeds[name]
        return float(out[step_contract.LOSS])

    return run


def torch_step(folder: Path, net: str, x: Any, y: Any) -> Callable[[], float]:
    """Eager torch."""
    import torch
    from step_nets import loss, network

    torch.set_num_threads(1)
    module = network(net)
    module.train()
    with np.load(folder / "weights.npz") as held:
        module.take({n: torch.tensor(held[n]) for n in held.files})
    optimizer = torch.optim.SGD(module.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    images, labels = torch.tensor(x), torch.tensor(y)

    def run() -> float:
        optimizer.zero_grad()
        value = loss(module, images, labels)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run


def our_prediction(folder: Path, x: Any, precision: str) -> Callable[[], float]:
    """What a board serves, in float32 or int8."""
    from fedprune.model import step_contract
    from fedprune.runtime.session import Session

    session = Session(folder / ("inference.onnx" if precision == "float32" else f"{precision}.onnx"))
    feeds = {step_contract.X: x}
    return lambda: float(session.run(feeds)[step_contract.LOGITS].sum())


def plain_prediction(folder: Path, x: Any) -> Callable[[], float]:
    """Torch's export of the same module, weights as constants, with onnxruntime's own defaults."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "plain.onnx"), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: float(session.run(None, {name: x})[0].sum())


def work(engine: str, folder: Path, net: str, batch: int) -> Callable[[], float]:
    shape = json.loads((folder / "shape.json").read_text())
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((batch, *shape)).astype(np.float32), rng.integers(0, 10, batch)
    if engine == "ours":
        return our_step(folder, x, y)
    if engine == "torch":
        return torch_step(folder, net, x, y)
    return plain_prediction(folder, x[:1]) if engine == "plain" else our_prediction(folder, x[:1], engine)


def main(folder: Path, batch: int, engine: str, rows: list[str]) -> None:
    for number, row in enumerate(rows):
        run = work(engine, folder / row, row.partition("@")[0], batch)
        run()
        mark(2 * number)
        value = run()
        mark(2 * number + 1)
        print(row, value, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
