"""Dropout on boards next to torch's: `OMP_NUM_THREADS=1 python -m benchmarks.dropout`.

A small convolutional net with dropout and stochastic depth learns the demo's digits, by a board's trainer and by torch,
from the same first weights and with the same settings; orders of samples and masks are each engine's own. Losses are
compared in distribution, and with those of the net without dropout. `--arm` also counts on an emulated Arm processor
what drawing the masks adds to a step; it needs what `benchmarks.arm` needs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness import parser, run_cases
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.digits import deal_digits

ENGINES = ("ours", "torch", "torch without dropout")
SEEDS = (1, 2, 3, 4, 5, 6)
POINTS = (4, 8, 16, 32)
"""Epochs after which losses are compared."""

CLASSES, BATCH, RATE, MOMENTUM = 10, 32, 0.03, 0.9
SAMPLES = 512

# A difference of two means of six seeds in standard errors that chance exceeds once in a hundred: the 99.5th percentile
# of Student's t with ten degrees of freedom.
LIMIT = 3.169

ARM_PROCESSOR, ARM_BATCH = "cortex-a53", 32


class DropPath(nn.Module):
    """Stochastic depth: whole samples of a branch are dropped."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Any) -> Any:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


class Net(nn.Module):
    """Three convolutions, one of them in a branch, and two linear layers."""

    input_shape = (1, 8, 8)

    def __init__(self, *, has_dropout: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(1024, 64), nn.Linear(64, CLASSES)
        self.path = DropPath(0.2 * has_dropout)
        self.drop1, self.drop2 = nn.Dropout(0.25 * has_dropout), nn.Dropout(0.5 * has_dropout)

    def forward(self, x: Any) -> Any:
        """[N, 1, 8, 8] to [N, 10]."""
        x = functional.relu(self.conv1(x))
        x = x + self.path(functional.relu(self.conv2(x)))
        x = functional.relu(self.conv3(functional.max_pool2d(x, 2)))
        x = functional.relu(self.fc1(self.drop1(x.flatten(1))))
        return self.fc2(self.drop2(x))


@cache
def digits() -> tuple[Any, Any, Any, Any]:
    """Samples and labels of the demo's digits, to train with and to measure with."""
    data = deal_digits(["board"], seed=0)
    local = data.devices["board"]
    return local.x_train[:SAMPLES], local.y_train[:SAMPLES], data.x, data.y


def first_net(seed: int, *, has_dropout: bool = True) -> Net:
    torch.manual_seed(seed)
    return Net(has_dropout=has_dropout)


def losses(net: Net) -> dict[str, float]:
    """Mean losses in evaluation, of the samples that it learns from and of others."""
    x, y, test_x, test_y = (torch.tensor(v) for v in digits())
    with torch.no_grad():
        net.eval()
        return {
            "train": functional.cross_entropy(net(x), y.long()).item(),
            "test": functional.cross_entropy(net(test_x), test_y.long()).item(),
        }


def ours(seed: int) -> list[dict[str, float]]:
    """Losses at all points of a board's trainer, which begins a round at each."""
    x, y, *_ = digits()
    net = first_net(seed)
    model = import_onnx(export_torch(net), "net")
    data, tensors, curve = LocalData(x, y, x[:0], y[:0]), dict(model.tensors), []
    for number, (begin, end) in enumerate(pairwise((0, *POINTS)), 1):
        recipe = Recipe(epochs=end - begin, batch_size=BATCH, lr=RATE, momentum=MOMENTUM)
        trainer = Trainer(training_graph(model, recipe.features).to_bytes())
        result = trainer.train(tensors, data, TrainingTask(recipe, CLASSES, seed, "board", number))
        tensors = dict(result.tensors)
        net.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()})
        curve.append(losses(net))
    return curve


def theirs(seed: int, *, has_dropout: bool) -> list[dict[str, float]]:
    """Losses at all points of eager torch, whose momentum begins at 0 where a board's round begins."""
    x, y = (torch.tensor(v) for v in digits()[:2])
    net, curve = first_net(seed, has_dropout=has_dropout), []
    for begin, end in pairwise((0, *POINTS)):
        optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM)
        for _ in range(end - begin):
            net.train()
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(net(x[rows]), y[rows].long()).backward()
                optimizer.step()
        curve.append(losses(net))
    return curve


def run(engine: str, seed: int) -> dict[str, Any]:
    return {"losses": ours(seed) if engine == "ours" else theirs(seed, has_dropout=engine == "torch")}


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds at every point, and differences from torch's in standard errors."""
    out = []
    for kind in ("train", "test"):
        for i, epoch in enumerate(POINTS):
            values = {e: [row["losses"][i][kind] for row in rows if row["engine"] == e] for e in ENGINES}
            row: dict[str, Any] = {"loss": kind, "epoch": epoch}
            for engine in ENGINES:
                key = engine.replace(" ", "_")
                row[key] = statistics.fmean(values[engine])
                row[f"{key}_t"] = _standard_errors(values[engine], values["torch"])
            out.append(row)
    return out


def _standard_errors(values: Sequence[float], others: Sequence[float]) -> float:
    """Student's t of two samples of one size."""
    error = math.sqrt((statistics.variance(values) + statistics.variance(others)) / len(values))
    return (statistics.fmean(values) - statistics.fmean(others)) / error if error else 0.0


def counted() -> dict[str, Any]:
    """Instructions of a step, and of drawing its masks, on an emulated processor."""
    from dataclasses import replace

    from benchmarks.arm.counting import FILES as BOARD_FILES
    from benchmarks.arm.counting import count, counted_board

    model = import_onnx(export_torch(first_net(1)), "net")
    with counted_board((), (), ("ours",)) as board:
        place = board.root / BOARD_FILES[1:] / "net@1"
        place.mkdir(parents=True)
        (place / "shape.json").write_text(json.dumps(Net.input_shape))
        (place / "training.onnx").write_bytes(training_graph(model, Recipe().features).to_bytes())
        np.savez(place / "weights.npz", **dict(model.tensors))  # type: ignore[arg-type]
        machine = replace(board, processor=ARM_PROCESSOR)
        step, draws = (
            count(machine, engine, ["net@1"], ARM_BATCH, 900)["net@1"]["instructions"] for engine in ("ours", "draws")
        )
    return {"processor": ARM_PROCESSOR, "batch": ARM_BATCH, "step": step, "draws": draws, "share": draws / step}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--arm", action="store_true", help="count instructions on an emulated Arm processor, too")
    options = command.parse_args()
    cases = [{"engine": engine, "seed": seed} for engine in ENGINES for seed in SEEDS]
    derived: dict[str, Any] = {"compared": compared, "limit": lambda _: LIMIT}
    derived |= {"arm": lambda _: [counted()]} if options.arm else {}
    run_cases("dropout", None, cases, run, "onnxruntime", "torch", options=options, **derived)


if __name__ == "__main__":
    main()
