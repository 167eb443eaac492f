"""Deal Fashion-MNIST out to the boards of fleet.toml, unevenly: data/BOARD.npz for each, and data/server.npz.

    python deal.py

On real boards there is nothing to deal: each has its own samples. Such a file is all that a board needs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedprune.core.errors import FedpruneError
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.datasets.federation import Federation
from fedprune_server.simulation.datasets.fleet_data import draw_partition

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
BOARDS = ("hall-zero", "attic-zero", "shed-pi3", "shop-pi3", "yard-pi4", "barn-pi4", "desk-pi5", "dock-pi5")
WHERE = "Put the four .gz files of https://github.com/zalandoresearch/fashion-mnist into a folder fashion_mnist here."


def main() -> None:
    plan = DataPlan("fashion_mnist", devices=len(BOARDS), alpha=0.3, most=6000, server=0.15, ascending=True, seed=1)
    try:
        dealt = plan.read()
    except FedpruneError as error:
        sys.exit(f"{error}\n{WHERE}")
    dealt = Federation(
        replace(dealt.samples, class_names=CLASSES),
        dict(zip(BOARDS, dealt.holdings.values(), strict=True)),
        dealt.server,
        dealt.preparation,
    )
    folder = Path("data")
    folder.mkdir(exist_ok=True)
    for board in BOARDS:
        own = dealt.load(board)
        np.savez(folder / board, x_train=own.x_train, y_train=own.y_train, x_test=own.x_test, y_test=own.y_test)
        print(f"{board}: {own.samples} training samples of {len(set(own.y_train.tolist()))} classes")
    kept = dealt.evaluation()
    assert kept is not None
    x, y = kept
    half = len(y) // 2
    np.savez(folder / "server", x=x[half:], y=y[half:])
    np.savez(folder / "calibration", x=x[:half])
    draw_partition(dealt, folder / "boards.html")


if __name__ == "__main__":
    main()
