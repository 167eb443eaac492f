"""Samples for a board that runs, from files: `fedprune-device collect`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.cli import print_json
from fedprune.core.disk import storage_errors
from fedprune.core.errors import BrokerError, DataError, ExitCode, StorageFullError
from fedprune_device.api.address import SOCKET, Address
from fedprune_device.client import Board, BoardError
from fedprune_device.data.array_source import read_arrays
from fedprune_device.data.image_decoding import ENDINGS, MAX_BYTES

Sample = tuple[str, Any, "int | str | None"]
"""A sample's name for messages, the sample as the client takes it, and its label."""

_FULL = 507  # the status of a board without room on its disk
_UNFIT = (400, 409, 413, 415, 422)  # statuses of a sample or label that the board doesn't take


def collect(arguments: argparse.Namespace) -> int:
    address = arguments.local or f"unix:{arguments.state.absolute() / SOCKET}"
    Address.parse(address)
    board, count = Board(address), Counter[str]()
    for source in arguments.sources:
        for name, x, label in _images(source) if source.is_dir() else _rows(source):
            try:
                added = board.add(x, label)
            except BoardError as error:
                if error.status == _FULL:
                    raise StorageFullError(f"{name}: {error}") from error
                if error.status not in _UNFIT:
                    raise BrokerError(f"{name}: {error}") from error
                print(f"{name} is left out: {error}", file=sys.stderr)
                count["left out"] += 1
                continue
            count["known" if added["duplicate"] else "kept" if added["kept"] else "not kept"] += 1
    kinds = ("kept", "known", "not kept", "left out")
    if arguments.json:
        print_json({kind: count[kind] for kind in kinds})
    else:
        print(", ".join(f"{count[kind]} {kind}" for kind in kinds))
    return int(ExitCode.OK if not count["left out"] else ExitCode.DATA)


def _images(root: Path) -> Iterator[Sample]:
    with storage_errors(f"can't read {root}"):
        files = sorted(p for p in root.glob("*/*") if p.suffix.lower() in ENDINGS)
    if not files:
        raise DataError(f"{root} holds no images", expected="CLASS/image.jpg or .png")
    for path in files:
        with storage_errors(f"can't read {path}"):
            if path.stat().st_size > MAX_BYTES:
                raise DataError(f"size of {path}", expected=f"at most {MAX_BYTES} bytes", got=path.stat().st_size)
            yield str(path), path.read_bytes(), path.parent.name


def _rows(path: Path) -> Iterator[Sample]:
    found = read_arrays(path)
    if "x" not in found and "x_train" not in found:
        raise DataError(f"array 'x' is missing in {path}", got=", ".join(found) or "nothing")
    # What is tested on the board chooses itself; a file's own test samples are left out.
    x, y = (found["x"], found.get("y")) if "x" in found else (found["x_train"], found.get("y_train"))
    if x.ndim < 2 or x.dtype.kind not in "iuf":
        raise DataError(f"x in {path}", expected="numbers [n, ...]", got=f"{x.dtype} {x.shape}")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        wanted = f"a whole number for each of {len(x)} samples"
        raise DataError(f"y in {path}", expected=wanted, got=f"{y.dtype} {y.shape}")
    for number in range(len(x)):
        yield f"sample {number} of {path}", np.ascontiguousarray(x[number]), None if y is None else int(y[number])
