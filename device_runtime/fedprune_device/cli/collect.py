"""Samples for a board that runs, from files, sensors and cameras: `fedprune-device collect`."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.cli import ended_by_signals, options_of, print_json
from fedprune.core.disk import storage_errors
from fedprune.core.errors import BrokerError, DataError, ExitCode, StorageFullError, UsageError
from fedprune_device.api.address import SOCKET, Address
from fedprune_device.cli.options import log_handler
from fedprune_device.client import Board, BoardError
from fedprune_device.collection.camera import Camera
from fedprune_device.collection.collector import UNFIT, Collector
from fedprune_device.collection.frames import frames
from fedprune_device.collection.sensor_topic import SCHEMES, SensorOptions, SensorTopic
from fedprune_device.data.array_source import read_arrays
from fedprune_device.data.image_decoding import ENDINGS, MAX_BYTES

Sample = tuple[str, Any, "int | str | None"]
"""A sample's name for messages, the sample as the client takes it, and its label."""

SOURCE = "FEDPRUNE_SOURCE"
RECORDINGS = (".mjpeg", ".mjpg", ".avi")

_FULL = 507  # the status of a board without room on its disk
_PIPE = "-"
_AGAIN_S = 5.0  # until a camera that is gone is opened again


def collect(arguments: argparse.Namespace) -> int | None:
    address = arguments.local or f"unix:{arguments.state.absolute() / SOCKET}"
    Address.parse(address)
    sources = arguments.sources or list(filter(None, [os.environ.get(SOURCE)]))
    if not sources:
        raise UsageError("no source is given", hint=f"Name one, or set {SOURCE}.")
    live = [source for source in sources if _is_live(source)]
    if live:
        if len(sources) > 1:
            raise UsageError(f"{live[0].rpartition('@')[2]} goes on, and must be the only source")
        _follow(live[0], address, arguments)
        return None
    return _add_all([Path(source) for source in sources], Board(address), arguments)


def _is_live(source: str) -> bool:
    """Whether a source goes on: a topic, a camera or a pipe."""
    if source == _PIPE or source.startswith(SCHEMES):
        return True
    try:
        mode = Path(source).stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def _follow(source: str, address: str, arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, handlers=[log_handler()])
    collector = Collector(Board(address, tries=1), arguments.every)
    try:
        with ended_by_signals():
            if source.startswith(SCHEMES):
                SensorTopic(source, options_of(SensorOptions, arguments), collector).run()
            elif source == _PIPE:
                _watch_pipe(sys.stdin.fileno(), collector)
            elif stat.S_ISCHR(Path(source).stat().st_mode):
                _watch_camera(Path(source), arguments.every, collector)
            else:
                with Path(source).open("rb") as file:
                    _watch_pipe(file.fileno(), collector)
    except KeyboardInterrupt:
        pass  # the end of what goes on
    if arguments.json:
        print_json(dict(collector.counts))
    else:
        print(collector.summary)


def _watch_pipe(file: int, collector: Collector) -> None:
    for frame in frames(lambda size: os.read(file, size)):
        collector.add(frame)


def _watch_camera(path: Path, every: float, collector: Collector) -> None:
    camera: Camera | None = Camera(path)
    while True:
        try:
            with camera or Camera(path) as opened:
                while True:
                    collector.add(opened.frame())
                    time.sleep(every)
        except DataError as error:  # noqa: PERF203
            camera = None
            collector.problem("camera gone", error)
            time.sleep(_AGAIN_S)


def _add_all(sources: list[Path], board: Board, arguments: argparse.Namespace) -> int:
    count = Counter[str]()
    for source in sources:
        for name, x, label in _samples(source, arguments):
            try:
                added = board.add(x, label)
            except BoardError as error:
                if error.status == _FULL:
                    raise StorageFullError(f"{name}: {error}") from error
                if error.status not in UNFIT:
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


def _samples(source: Path, arguments: argparse.Namespace) -> Iterator[Sample]:
    if source.is_dir():
        return _images(source)
    if source.suffix.lower() in RECORDINGS:
        return _frames(source, max(1, round(arguments.every * arguments.rate)))
    return _rows(source)


def _frames(path: Path, step: int) -> Iterator[Sample]:
    """Every `step`-th frame of a recording."""
    number = -1
    with storage_errors(f"can't read {path}"), path.open("rb") as file:
        for number, frame in enumerate(frames(file.read)):
            if number % step == 0:
                yield f"frame {number} of {path}", frame, None
    if number < 0:
        raise DataError(f"{path} holds no frames", expected="JPEG images, one after the other (MJPEG)")


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
