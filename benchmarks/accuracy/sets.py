"""Real data, read from `FEDPRUNE_DATA`: plain files as they are, packed ones unpacked once into `build/data`."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedprune_server.data.npz import read_npz
from fedprune_server.data.samples import Samples
from fedprune_server.data.source import VARIABLE, read_samples

UNPACKED = Path("build/data")


@cache
def samples(name: str) -> Samples:
    """A data set by its name, such as `cifar10`."""
    ready = UNPACKED / f"{name}.npz"
    root = os.environ.get(VARIABLE)
    if root is None and not ready.exists():
        sys.exit(f"{VARIABLE} is not set: it must name a folder with {name}.npz or the data set's own files.")
    packed = Path(root or "", f"{name}.npz")
    if root is not None and not (packed.exists() and _is_packed(packed)):
        return read_samples(name)
    if not ready.exists():
        print(f"unpacking {packed} to {ready}", file=sys.stderr)
        arrays = _unpacker(packed.parent).load(packed)
        ready.parent.mkdir(parents=True, exist_ok=True)
        part = ready.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **arrays)
        part.rename(ready)
    return read_npz(ready)


def _is_packed(path: Path) -> bool:
    with np.load(path, allow_pickle=False) as file:
        return any(":" in name for name in file.files)


def _unpacker(folder: Path) -> Any:
    """The module `packed` that lies beside packed files."""
    spec = importlib.util.spec_from_file_location("packed", folder / "packed.py")
    if spec is None or spec.loader is None:
        sys.exit(f"{folder} has packed data but no packed.py to read it.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
