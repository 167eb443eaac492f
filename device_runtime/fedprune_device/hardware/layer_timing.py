"""Times of kinds of layers on this board: small nets, timed at a few widths, and the table that explains the times.

The nets are assets that `examples/make_probe_graphs.py` writes. Their training graphs run at any width, as those of
jobs do; predictions have a graph per width, since onnxruntime lays out constant weights for the widths that it finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import ProfileError, StorageError
from fedprune.core.rng import keyed
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Tensors
from fedprune.planning.latency_model import LatencyTable, Measurement
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.runtime.session import Session
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor

ARCHIVE = "probe_layers.tar.gz"  # the asset: `index.json` and a folder per net

_MIN_POINTS = 3
"""Widths of a net that are measured even where its share of the time is over; one, where all of the time is."""

_MIN_RUNS, _MAX_RUNS = 3, 25
_ENOUGH = 0.03  # seconds that one point's runs take where they are short
_LONG = 0.3  # seconds of a run from which on one is enough

Clock = Callable[[], float]


@dataclass(frozen=True)
class _Time:
    """Until when a net may be measured: its share, and the end of all."""

    clock: Clock
    share: float
    end: float

    def over(self, points: int) -> bool:
        now = self.clock()
        return (points >= _MIN_POINTS and now > self.share) or (points >= 1 and now > self.end)


class LayerNets:
    """The shipped nets, read from the package."""

    def __init__(self) -> None:
        with tarfile.open(fileobj=io.BytesIO(_archive()), mode="r:gz") as archive:
            self._files = {m.name: part.read() for m in archive if (part := archive.extractfile(m)) is not None}

    @cached_property
    def points(self) -> dict[str, list[dict[str, Any]]]:
        """Per net the widths and batches to measure, the most telling ones first."""
        found: dict[str, list[dict[str, Any]]] = json.loads(self._files["index.json"])
        return found

    def architecture(self, net: str) -> Architecture:
        return Architecture.from_json(self._files[f"{net}/architecture.json"])

    def training(self, net: str, unit: str) -> bytes:
        """The training graph for a unit, one of `UNITS`."""
        return self._files[f"{net}/training-{unit}.onnx"]

    def inference(self, net: str, point: int) -> bytes:
        return self._files[f"{net}/inference-{point}.onnx"]


def measure(
    threads: int = 1, seconds: float = 10.0, clock: Clock = time.perf_counter, *, cuda: bool = False
) -> list[Measurement]:
    """Time the nets' training steps and predictions, at least one point per net, others while `seconds` last.

    `cuda` is that of `Session`.
    """
    nets = LayerNets()
    began, found = clock(), list[Measurement]()
    end = began + seconds
    for place, (net, points) in enumerate(nets.points.items()):
        now = clock()
        share = (end - now) / (len(nets.points) - place)
        found += _steps(nets, net, points, threads, _Time(clock, now + share * 0.65, end), cuda)
        now = clock()
        found += _predictions(nets, net, points, threads, _Time(clock, now + share * 0.35, end), cuda)
    return found


def remembered_table(path: Path, about: str, make: Callable[[], LatencyTable]) -> LatencyTable:
    """The table of an earlier start, valid while `about` (board, versions, threads) and the nets stay the same.

    Nothing is kept if `path`'s folder doesn't exist yet.
    """
    depends = f"{about} {hashlib.sha256(_archive()).hexdigest()}"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["about"] == depends:
            return LatencyTable.from_dict(body["latency"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ProfileError):
        pass  # it is missing or damaged: it can be measured again
    found = make()
    with contextlib.suppress(StorageError):
        write_whole(path, json.dumps({"about": depends, "latency": found.to_dict()}).encode())
    return found


def _archive() -> bytes:
    return (resources.files("fedprune_device") / "assets" / ARCHIVE).read_bytes()


def _steps(
    nets: LayerNets, net: str, points: list[dict[str, Any]], threads: int, time_left: _Time, cuda: bool
) -> list[Measurement]:
    architecture = nets.architecture(net)
    graph = nets.training(net, CUDA if cuda else CPU)
    # Recorded steps are faster, but one session can't record fifteen widths: plans count what is launched one by one.
    session = Session(graph, threads=threads, training=True, cuda=cuda, records=False)
    out: list[Measurement] = []
    for number, point in enumerate(points):
        if time_left.over(number):
            break
        widths, batch = tuple(point["widths"]), int(point["batch"])
        taken = median_seconds(one_step(session, _feeds(architecture, widths, batch)), time_left.clock)
        out.append(Measurement(architecture, widths, batch, taken, True))
    return out


def one_step(session: Session, feeds: Tensors) -> Callable[[], object]:
    """A step as the trainer takes its first ones: on a GPU weights and the optimiser's state stay there."""
    moving = {n: v for n, v in feeds.items() if step_contract.following(n) in session.outputs}
    fed: dict[str, Any] = {**feeds, **session.place(moving, "state")}
    into: dict[str, Any] = {}
    if session.provider == CUDA:
        into = {step_contract.following(n): v for n, v in session.place(moving, "next state").items()}
    return lambda: session.run(fed, into=into)


def _predictions(
    nets: LayerNets, net: str, points: list[dict[str, Any]], threads: int, time_left: _Time, cuda: bool
) -> list[Measurement]:
    architecture = nets.architecture(net)
    x = keyed(0, "layers").standard_normal((1, *architecture.input_shape)).astype(np.float32)
    out: list[Measurement] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for number, point in enumerate(points):
            if time_left.over(number):
                break
            widths = tuple(point["widths"])
            (folder / GRAPH).write_bytes(nets.inference(net, number))
            (folder / WEIGHTS).write_bytes(tensorfile.encode(_tensors(architecture, widths)))
            predictor = Predictor(folder, threads=threads, cuda=cuda)
            taken = median_seconds(lambda p=predictor: p.predict(x), time_left.clock)  # type: ignore[misc]
            out.append(Measurement(architecture, widths, 1, taken, False))
    return out


def _tensors(architecture: Architecture, widths: tuple[int, ...]) -> Tensors:
    """Positive weights of an ordinary size: no numbers that processors are slow with."""
    random = keyed(0, "layers", *widths)
    shapes = architecture.shapes(widths)
    return {n: (0.01 + 0.05 * random.random(s, np.float32)).astype(np.float32) for n, s in shapes.items()}  # nosec B311  # NumPy's, for values to time with


def _feeds(architecture: Architecture, widths: tuple[int, ...], batch: int) -> Tensors:
    random = keyed(0, "layers", batch)
    x = random.standard_normal((batch, *architecture.input_shape)).astype(np.float32)
    trainable = [tensor.name for tensor in architecture.trainable]
    return timed_step_feeds(
        x, random.integers(0, architecture.classes, batch), _tensors(architecture, widths), trainable
    )


def timed_step_feeds(x: Any, y: Any, tensors: Tensors, trainable: Iterable[str]) -> Tensors:
    """All inputs of a training step at a learning rate of 0, with empty momenta."""
    numbers = (step_contract.LR, step_contract.MOMENTUM, step_contract.WEIGHT_DECAY)
    feeds: dict[str, Any] = {step_contract.X: x, step_contract.Y: y, **dict.fromkeys(numbers, np.array(0, np.float32))}
    return feeds | tensors | {step_contract.buffer(name): np.zeros_like(tensors[name]) for name in trainable}


def median_seconds(
    run: Callable[[], object], clock: Clock = time.perf_counter, enough: float = _ENOUGH, most: float = _MAX_RUNS
) -> float:
    """Seconds of a run, without the first, which allocates; slow boards run only once more.

    Others run for `enough` seconds, but no more than `most` times.
    """
    began = clock()
    run()
    least = 1 if clock() - began > _LONG else _MIN_RUNS
    times: list[float] = []
    while len(times) < least or (sum(times) < enough and len(times) < most):
        began = clock()
        run()
        times.append(clock() - began)
    return max(float(np.median(times)), 1e-7)
