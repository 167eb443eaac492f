"""How fast a bundle trains and predicts on this machine, and how much memory that takes."""

from __future__ import annotations

import json
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError
from fedprune.core.imports import module_code
from fedprune.model import step_contract
from fedprune.runtime.bundle import INFERENCE, TRAINING, WEIGHTS, Bundle
from fedprune.runtime.precision_files import FLOAT32, graph_file
from fedprune.runtime.session import Session
from fedprune_export.bundles.inference import inference_graph
from fedprune_export.checks.step_feeds import random_labels, step_feeds
from fedprune_export.ir.trace import sample_feeds


@dataclass(frozen=True)
class Measurement:
    """Measurements of one graph at one batch size and number of threads.

    Attributes:
        what: `training step` or `prediction`.
        quartiles: Seconds of a run: lower quartile, median, upper quartile.
        peak_bytes: Most memory of the process that ran nothing else.
    """

    what: str
    batch: int
    threads: int
    runs: int
    quartiles: tuple[float, float, float]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return self.quartiles[1]

    def to_dict(self) -> dict[str, Any]:
        low, median, high = self.quartiles
        return {
            "what": self.what,
            "batch": self.batch,
            "threads": self.threads,
            "runs": self.runs,
            "seconds": {"lower_quartile": low, "median": median, "upper_quartile": high},
            "peak_bytes": self.peak_bytes,
        }


STEP = "training step"
PREDICTION = "prediction"


class Stopwatch:
    """Times the graphs of a bundle, each measurement in a process of its own."""

    def __init__(self, bundle: Bundle, runs: int) -> None:
        self._bundle = bundle
        self._runs = runs
        self._graph = inference_graph(bundle.folder)

    def training_step(self, batch: int, threads: int) -> Measurement:
        """Time a training step on random samples. Raises `ModelError` if the graph can't be loaded or run."""
        bundle, classes = self._bundle, self._bundle.architecture.classes
        path = bundle.path(TRAINING)
        inputs = Session(path, training=True).inputs
        tensors = tensorfile.load(bundle.path(WEIGHTS))
        x = sample_feeds(self._graph, batch)[step_contract.X]
        y = random_labels(bundle.recipe, batch, classes, inputs[step_contract.Y])
        feeds = step_feeds(inputs, bundle.recipe, {**tensors, **bundle.frozen()}, x, y, classes)
        return self._measured(STEP, path, feeds, batch, threads)

    def prediction(self, batch: int, threads: int, precision: str = FLOAT32) -> Measurement:
        """Time a prediction of random samples, at a precision that the bundle has.

        Other arguments and errors are those of `training_step`.
        """
        feeds = sample_feeds(self._graph, batch)
        lower = precision != FLOAT32
        what = f"{PREDICTION}, {precision}" if lower else PREDICTION
        graph = self._bundle.path(graph_file(precision) if lower else INFERENCE)
        return self._measured(what, graph, feeds, batch, threads)

    def _measured(self, what: str, graph: Path, feeds: dict[str, Any], batch: int, threads: int) -> Measurement:
        with tempfile.TemporaryDirectory(prefix="fedprune-") as name:
            file = Path(name) / "feeds.safetensors"
            file.write_bytes(tensorfile.encode(feeds))
            plan = {
                "graph": str(graph.resolve()),
                "feeds": str(file),
                "training": what.startswith(STEP),
                "threads": threads,
                "runs": self._runs,
            }
            found = _in_child(plan)
        low, median, high = np.quantile(found["seconds"], (0.25, 0.5, 0.75)).tolist()
        return Measurement(what, batch, threads, self._runs, (low, median, high), int(found["peak_bytes"]))


def _in_child(plan: dict[str, Any]) -> dict[str, Any]:
    command: Sequence[str] = (sys.executable, "-c", module_code("fedprune_export.profiling.benchmark_child"))
    done = subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, check=False)  # noqa: S603  # nosec B603  # our own module, in this Python
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ModelError(f"{plan['graph']} can't be timed ({last[:300]})")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
