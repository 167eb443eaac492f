"""A board's own source of samples: a class of three methods. Here a logger appends to a file of vibrations.

    fedprune-device run --data own_source:Vibrations ...

The logger writes records of 128 times 3 accelerations (float32) and a class (a byte) to FEDPRUNE_VIBRATIONS.
"""

import os
from pathlib import Path

import numpy as np

from fedprune_device import ArrayType, Schema

RECORD = np.dtype([("x", "<f4", (3, 128)), ("y", "u1")])


class Vibrations:
    def __init__(self) -> None:
        self.path = Path(os.environ["FEDPRUNE_VIBRATIONS"])

    def schema(self) -> Schema:
        return Schema({"x": ArrayType((3, 128)), "y": ArrayType((), "int64")}, class_names=("still", "worn", "broken"))

    def __len__(self) -> int:
        return self.path.stat().st_size // RECORD.itemsize

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        records = np.memmap(self.path, RECORD, "r", shape=(len(self),))[indices]
        return {"x": records["x"], "y": records["y"]}
