"""The folder of files: every ONNX file with the facts that the census needs, written by the `make_*` programs.

These programs run in other environments (TensorFlow's, Paddle's), so nothing of fedprune is imported here.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

# More than a fixed batch of any file, and no multiple of 4.
SAMPLES = 6
# The largest version that onnxruntime 1.18 loads. A newer number alone says nothing about a file.
MAX_IR_VERSION = 10


@dataclass(kw_only=True)
class Facts:
    """What is known of a file.

    Attributes:
        kind: The net.
        exporter: What wrote the file, with its version.
        loss: The recipe's loss; "own" for one that takes all outputs.
        choices: Keywords of `fedprune_export.load`.
        batch: The file's fixed batch; 0 for a free one.
        axes: The batch's axis by the name of an input or output, where it isn't 0.
        rounding: How precisely the file computes: "float32", "float16" or "int8".
        refused: Whether it should be refused.
    """

    kind: str
    exporter: str
    loss: str = "cross_entropy"
    choices: dict[str, Any] = field(default_factory=dict)
    batch: int = 0
    axes: dict[str, int] = field(default_factory=dict)
    rounding: str = "float32"
    refused: bool = False


Made = tuple[Facts, dict[str, Any]]
"""A file's facts and arrays."""


class Shelf:
    """The folder; `add` makes a file unless it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, make: Callable[[Path], Made]) -> None:
        """Let `make` write an ONNX file; keep it with its facts and arrays: inputs as `in.NAME`, samples first, and
        `y`, `before` and `after` where torch has taken a step. A failure is shown, and other files are made."""
        path = self.folder / f"{name}.onnx"
        if path.with_suffix(".json").exists():
            return
        try:
            facts, arrays = make(path)
            proto = onnx.load(path, load_external_data=False)
            if proto.ir_version > MAX_IR_VERSION:
                proto.ir_version = MAX_IR_VERSION
                path.write_bytes(proto.SerializeToString())
        except (Exception, SystemExit):  # noqa: BLE001 (Paddle ends the program where it refuses a net)
            print(f"{name} was NOT made:\n{traceback.format_exc(limit=-4)}", file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            return
        np.savez(path.with_suffix(".npz"), **{key: np.asarray(value) for key, value in arrays.items()})
        path.with_suffix(".json").write_text(json.dumps(asdict(facts), indent=1) + "\n")
        print(f"{name} was made", file=sys.stderr, flush=True)

    def add_all(self, tool: str, names: Iterable[str], convert: Callable[[str, Path], Made]) -> None:
        """Add what a tool makes of nets by their names."""
        for name in names:
            self.add(f"{tool}_{name}", partial(convert, name))

    def facts(self, name: str) -> Facts:
        return Facts(**json.loads((self.folder / f"{name}.json").read_text()))

    def arrays(self, name: str) -> dict[str, Any]:
        with np.load(self.folder / f"{name}.npz") as file:
            return dict(file)


def open_shelf(title: str | None, *packages: str) -> Shelf:
    """The folder that the command line names. Ends the program, and says so, where a package isn't installed."""
    command = argparse.ArgumentParser(description=(title or "").partition("\n")[0])
    command.add_argument("--files", type=Path, default=Path("build/onnx_files"), help="the folder of the files")
    options = command.parse_args()
    missing = [name for name in packages if installed(name) is None]
    if missing:
        print(f"SKIPPED: {title and title.partition(':')[0]}: not installed: {', '.join(missing)}", file=sys.stderr)
        raise SystemExit(0)
    return Shelf(options.files)


def installed(package: str) -> str | None:
    """The version of a distribution; None if it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def count_norms(path: Path) -> int:
    """How many batch norms a file has."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return sum(node.op_type == "BatchNormalization" for node in nodes)


def inputs_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs among a file's arrays, by their names."""
    return {key.removeprefix("in."): value for key, value in arrays.items() if key.startswith("in.")}


def normal(*shape: int, seed: int = 5) -> Any:
    """Random samples."""
    return np.random.default_rng(seed).standard_normal((SAMPLES, *shape)).astype(np.float32)
