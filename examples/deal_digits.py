"""Deal the demo's digits out to boards: `python examples/deal_digits.py FOLDER BOARD...` writes for a small fleet

FOLDER/model.onnx        a network with random weights
FOLDER/server.npz        the server's own samples, to measure the global model on
FOLDER/calibration.npz   what it measures batch-norm statistics on
FOLDER/BOARD.npz         each board's own samples: its own mixture of classes
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fedprune_server.simulation.digits import deal, digits_model, write_hand


def main(folder: Path, boards: list[str]) -> None:
    hands = deal(boards)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(digits_model())
    np.savez(folder / "server.npz", x=hands.x, y=hands.y)
    np.savez(folder / "calibration.npz", x=hands.calibration)
    for board, hand in hands.devices.items():
        write_hand(folder / f"{board}.npz", hand)
        counts = np.bincount(hand.y_train, minlength=10)
        print(f"{board}: {len(hand.y_train)} samples to learn from, by class {' '.join(map(str, counts))}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
