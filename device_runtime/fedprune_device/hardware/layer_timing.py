"""Measures how long kinds of layers take on this board: it times small nets at a few widths.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.errors import ProfileError, StorageError
from fedprune.core.median import median
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Tensors
from fedprune.planning.latency_model import LatencyTable, Measurement
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.runtime.session import OnnxSession
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor

# The asset: `index.json` and a folder per net.
ARCHIVE = "probe_layers.tar.gz"

# Widths of a net that are measured even after its share of the time is over. After the end of all time it is one: a
# table needs every kind of layer.
_MIN_POINTS = 3

_MIN_RUNS, _MAX_RUNS = 3, 25
# Seconds that one point's runs take where they are short: the median of fewer runs is noisy.
_MIN_RUN_TIME_S = 0.03
# Seconds of a run from which on one is enough: noise is a small share of it.
_LONG_RUN_S = 0.3

Clock = Callable[[], float]


@dataclass(frozen=True)
class _TimeLimits:
    """The times until which a net may be measured: the end of its share, and the end of all."""

    clock: Clock
    share_ends_at: float
    ends_at: float

    def points_in_time(self, points: list[dict[str, Any]]) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """The index, widths and batch of each point, until the time is over."""
        for i, point in enumerate(points):
            now = self.clock()
            if (i >= _MIN_POINTS and now > self.share_ends_at) or (i >= 1 and now > self.ends_at):
                return
            yield i, tuple(point["widths"]), int(point["batch"])


class LayerNets:
    """The shipped nets, read from the package."""

    def __init__(self) -> None:
        with tarfile.open(fileobj=io.BytesIO(_archive()), mode="r:gz") as archive:
            self._files = {m.name: file.read() for m in archive if (file := archive.extractfile(m)) is not None}

    @cached_property
    def points(self) -> dict[str, list[dict[str, Any]]]:
        """Per net the widths and batches to measure, the most informative ones first."""
        points_of_nets: dict[str, list[dict[str, Any]]] = json.loads(self._files["index.json"])
        return points_of_nets

    def architecture(self, net: str) -> Architecture:
        return Architecture.from_json(self._files[f"{net}/architecture.json"])

    def training(self, net: str, unit: str) -> bytes:
        """The training graph for a unit, one of `UNITS`."""
        return self._files[f"{net}/training-{unit}.onnx"]

    def inference(self, net: str, point: int) -> bytes:
        return self._files[f"{net}/inference-{point}.onnx"]


def measure_layers(
    threads: int = 1, seconds: float = 10.0, clock: Clock = time.perf_counter, *, cuda: bool = False
) -> list[Measurement]:
    """Time the nets' training steps and predictions, at least one point per net, others while `seconds` last.

    `cuda` is that of `OnnxSession`.
    """
    nets = LayerNets()
    began, measurements = clock(), list[Measurement]()
    end = began + seconds
    for net_number, (net, points) in enumerate(nets.points.items()):
        now = clock()
        # What earlier nets left of their shares is divided among the nets to come.
        share = (end - now) / (len(nets.points) - net_number)
        measurements += _time_steps(nets, net, points, threads, _TimeLimits(clock, now + share * 0.65, end), cuda)
        now = clock()
        measurements += _time_predictions(nets, net, points, threads, _TimeLimits(clock, now + share * 0.35, end), cuda)
    return measurements


def load_or_measure_table(path: Path, conditions: str, make: Callable[[], LatencyTable]) -> LatencyTable:
    """Load the table of an earlier start, or measure one if `conditions` (board, versions, threads) or nets changed.

    The table is not stored if `path`'s folder doesn't exist yet.
    """
    key = f"{conditions} {hashlib.sha256(_archive()).hexdigest()}"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["about"] == key:
            return LatencyTable.from_dict(body["latency"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ProfileError):
        pass  # it is missing or damaged: it can be measured again
    table = make()
    with contextlib.suppress(StorageError):
        write_atomically(path, json.dumps({"about": key, "latency": table.to_dict()}).encode())
    return table


def _archive() -> bytes:
    return (resources.files("fedprune_device") / "assets" / ARCHIVE).read_bytes()


def _time_steps(
    nets: LayerNets, net: str, points: list[dict[str, Any]], threads: int, time_left: _TimeLimits, cuda: bool
) -> list[Measurement]:
    architecture = nets.architecture(net)
    graph = nets.training(net, CUDA if cuda else CPU)
    # Recorded steps are faster, but one session can't record fifteen widths: plans count operators launched one by one.
    session = OnnxSession(graph, threads=threads, training=True, cuda=cuda, records=False)
    measurements: list[Measurement] = []
    for _, widths, batch in time_left.points_in_time(points):
        seconds = median_seconds(step_runner(session, _timing_feeds(architecture, widths, batch)), time_left.clock)
        measurements.append(Measurement(architecture, widths, batch, seconds, training=True))
    return measurements


def step_runner(session: OnnxSession, feeds: Tensors) -> Callable[[], object]:
    """A step as the trainer takes its first ones: on a GPU weights and the optimiser's state stay there."""
    moving = {n: v for n, v in feeds.items() if step_contract.next_name(n) in session.outputs}
    inputs: dict[str, Any] = {**feeds, **session.place(moving, "state")}
    outputs: dict[str, Any] = {}
    if session.provider == CUDA:
        outputs = {step_contract.next_name(n): v for n, v in session.place(moving, "next state").items()}
    return lambda: session.run(inputs, into=outputs)


def _time_predictions(
    nets: LayerNets, net: str, points: list[dict[str, Any]], threads: int, time_left: _TimeLimits, cuda: bool
) -> list[Measurement]:
    architecture = nets.architecture(net)
    x = keyed_generator(0, "layers").standard_normal((1, *architecture.input_shape)).astype(np.float32)
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for i, widths, _ in time_left.points_in_time(points):
            (folder / GRAPH).write_bytes(nets.inference(net, i))
            (folder / WEIGHTS).write_bytes(tensorfile.encode(_timing_weights(architecture, widths)))
            predictor = Predictor(folder, threads=threads, cuda=cuda)
            seconds = median_seconds(lambda p=predictor: p.predict(x), time_left.clock)  # type: ignore[misc]
            measurements.append(Measurement(architecture, widths, 1, seconds, training=False))
    return measurements


def _timing_weights(architecture: Architecture, widths: tuple[int, ...]) -> Tensors:
    """Positive weights of an ordinary size: denormal numbers would slow processors down."""
    random = keyed_generator(0, "layers", *widths)
    shapes = architecture.shapes(widths)
    return {n: (0.01 + 0.05 * random.random(s, np.float32)).astype(np.float32) for n, s in shapes.items()}  # nosec B311  # NumPy's, for values to time with


def _timing_feeds(architecture: Architecture, widths: tuple[int, ...], batch: int) -> Tensors:
    random = keyed_generator(0, "layers", batch)
    x = random.standard_normal((batch, *architecture.input_shape)).astype(np.float32)
    trainable = [tensor.name for tensor in architecture.trainable]
    y = random.integers(0, architecture.classes, batch)
    return timed_step_feeds(x, y, _timing_weights(architecture, widths), trainable)


def timed_step_feeds(x: Any, y: Any, tensors: Tensors, trainable: Iterable[str]) -> Tensors:
    """All inputs of a training step at a learning rate of 0, with empty momenta."""
    numbers = (step_contract.LR, step_contract.MOMENTUM, step_contract.WEIGHT_DECAY)
    feeds: dict[str, Any] = {step_contract.X: x, step_contract.Y: y, **dict.fromkeys(numbers, np.array(0, np.float32))}
    return feeds | tensors | {step_contract.momentum_name(name): np.zeros_like(tensors[name]) for name in trainable}


def median_seconds(
    run: Callable[[], object],
    clock: Clock = time.perf_counter,
    total_s: float = _MIN_RUN_TIME_S,
    max_runs: float = _MAX_RUNS,
) -> float:
    """The median seconds of a run. The first run, which allocates, doesn't count.

    A slow board runs once more, others for `total_s` seconds, but no more than `max_runs` times.
    """
    began = clock()
    run()
    min_runs = 1 if clock() - began > _LONG_RUN_S else _MIN_RUNS
    times: list[float] = []
    while len(times) < min_runs or (sum(times) < total_s and len(times) < max_runs):
        began = clock()
        run()
        times.append(clock() - began)
    return max(median(times), 1e-7)
