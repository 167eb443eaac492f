"""Adapters beside a frozen base of about 100 million parameters: `python -m benchmarks.lora`.

For each precision of the base a bundle is exported, and `fedprune-device train` takes a few steps with it in a fresh
process, whose peak (VmHWM) is read when it ends. Weights and samples are random: memory and bytes don't depend on them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fedprune_export as fx
from benchmarks.harness import run_cases
from benchmarks.tasks.nets import Characters
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import memory_use
from fedprune.planning.costs import costs_at

LAYERS, WIDTH, WORDS, LENGTH = 12, 768, 8000, 32
RANK, BATCH, STEPS = 8, 2, 4

_CHILD = """
import sys
from pathlib import Path
from fedprune_device.cli.main import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
print(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")))
raise SystemExit(code)
"""


class Decoder(Characters):
    """A large one, of words."""

    input_shape = (LENGTH,)

    def __init__(self) -> None:
        super().__init__(WORDS, WIDTH, LAYERS)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))


def measure(base: str) -> dict[str, Any]:
    """One precision's record."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        return trained(Decoder(), base, Path(name))


def trained(module: nn.Module, base: str, folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, WORDS, (BATCH * STEPS, LENGTH)) for _ in range(2))
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    model = fx.load(module, lora=fx.Lora(RANK), base=base)
    recipe = Recipe(batch_size=BATCH, epochs=1, lr=0.01)
    where = folder / base
    fx.export(model, fx.plan(model, "raspberry-pi-5", recipe=recipe, density=1.0), where)
    architecture, widths = model.architecture, model.architecture.sizes
    costs = costs_at(architecture, widths)
    predicted = memory_use(architecture, widths, costs, recipe, BATCH * STEPS, model.frozen)
    files = {p.name: p.stat().st_size for p in where.iterdir()}
    command: list[Any] = [sys.executable, "-c", _CHILD, "train", "--bundle", where, "--data", folder / "data.npz"]
    command += ["--out", folder / "trained", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "adapter_bytes": 4 * sum(v.size for n, v in model.tensors.items() if ".lora_" in n),
        "base_bytes": files.get("base.safetensors", 0),
        "weights_bytes": files["weights.safetensors"],
        "training_graph_bytes": files["training.onnx"],
        "peak_bytes": 1024 * int(said.split("VmHWM:")[1].split()[0]),
        "predicted_bytes": predicted.total,
    }


if __name__ == "__main__":
    run_cases("lora", __doc__, [{"base": base} for base in ("float16", "int8")], measure, "onnxruntime")
