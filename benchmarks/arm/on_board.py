"""Runs on the emulated board, and marks where each row's work begins and ends.

python -m benchmarks.arm.on_board FOLDER BATCH ENGINE ROW...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measured_steps import our_draws, our_step, torch_step


def mark(number: int) -> None:
    """Have the emulator print its counts: a seek in a file that can't be."""
    with contextlib.suppress(OSError):
        os.lseek(-1, number, os.SEEK_SET)


def our_prediction(folder: Path, x: Any, precision: str) -> Callable[[], float]:
    """The model that a board serves, in float32 or int8."""
    from fedprune.model import step_contract
    from fedprune.runtime.session import OnnxSession

    session = OnnxSession(folder / ("inference.onnx" if precision == "float32" else f"{precision}.onnx"))
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
    if engine in ("plain", "float32", "int8"):
        return plain_prediction(folder, x[:1]) if engine == "plain" else our_prediction(folder, x[:1], engine)
    with np.load(folder / "weights.npz") as held:
        tensors = dict(held)
    if engine == "torch":
        return torch_step(net, tensors, x, y, 1)
    if engine == "draws":
        return our_draws(folder / "training.onnx", tensors, x)
    return our_step(folder / "training.onnx", tensors, x, y, 1)


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
