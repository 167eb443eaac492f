"""A training step of a bundle as the board chooses it, and of other graphs: `python arm_forms.py BUNDLE OUT GRAPH...`.

Prints the length of the board's blocks and the file that it chose; `OUT` has what came out of each graph.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.runtime.blocks import block_size
from fedprune.runtime.bundle import TRAINING, WEIGHTS, open_bundle
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer

RECIPE = Recipe(epochs=1, batch_size=8, lr=0.05, momentum=0.9, weight_decay=0.01)
SAMPLES = 21


def trained(folder: Path, graph: Path, blocked: Path | None = None) -> dict[str, np.ndarray]:
    """Weights after a few steps from those of a bundle."""
    bundle = open_bundle(folder)
    random = np.random.default_rng(0)
    x = random.standard_normal((SAMPLES, *bundle.architecture.input_shape)).astype(np.float32)
    data = LocalData(x, random.integers(0, bundle.architecture.classes, SAMPLES), x[:0], np.zeros(0, np.int64))
    tensors = tensorfile.load(bundle.path(WEIGHTS))
    trainer = Trainer(graph, blocked=blocked)
    return trainer.train(
        tensors, data, RECIPE, seed=1, device="d", round=1, classes=bundle.architecture.classes
    ).tensors


def main(folder: Path, out: Path, *graphs: Path) -> None:
    block = block_size()
    blocked = open_bundle(folder).blocked(block)
    found = {TRAINING: trained(folder, folder / TRAINING, blocked)} | {g.name: trained(folder, g) for g in graphs}
    np.savez(out, **{f"{graph}/{name}": value for graph, tensors in found.items() for name, value in tensors.items()})
    print(json.dumps({"block": block, "blocked": blocked is not None}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
