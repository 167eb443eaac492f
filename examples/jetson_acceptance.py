"""Acceptance of engines and CUDA on a real board: run it on a Jetson with a bundle, and compare with docs/jetson.md.

    python examples/jetson_acceptance.py --bundle bundle

A line per check, `ok` or `FAIL`, and at the end how many passed. It ends with 0 if all did. The bundle stays as it is;
engines are made in a temporary folder. It needs no more than a board has: fedprune, onnxruntime, TensorRT.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.disk import file_digest
from fedprune.core.errors import EngineError, FedpruneError
from fedprune.model import step_contract
from fedprune.runtime import session
from fedprune.runtime.bundle import TRAINING, Bundle, open_bundle
from fedprune.runtime.precision import lowered_weights
from fedprune.runtime.precision_files import files_of, graph_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.cli.build_engine import make_engine
from fedprune_device.data.dataset import LocalData
from fedprune_device.engines import bindings
from fedprune_device.engines.engine_selector import EngineRequest, EngineSelector, current_platform
from fedprune_device.serving.predictor import WEIGHTS, Predictor
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask

ROUNDS = 50


class Acceptance:
    """The checks, in order; what one makes, later ones use."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.plan = bundle.engine or EnginePlan()
        self.engines = folder / "engines"
        self.passed = self.failed = 0

    def run(self) -> int:
        for name, check in (
            ("board", self.board),
            ("build", self.build),
            ("restart", self.restart),
            ("speed", self.speed),
            ("new weights, first way", self.new_weights),
            ("new weights, second way", self.new_weights),
            ("damage", self.damage),
            ("time-out", self.time_out),
            ("training with CUDA", self.training),
        ):
            self.say(name, check)
        print(f"{self.passed} of {self.passed + self.failed} checks passed")
        return 0 if not self.failed else 1

    def say(self, name: str, check: Callable[[], str]) -> None:
        try:
            print(f"ok    {name}: {check()}", flush=True)
            self.passed += 1
        except (FedpruneError, AssertionError) as error:
            print(f"FAIL  {name}: {error}", flush=True)
            self.failed += 1

    def board(self) -> str:
        found = bindings.find_tensorrt()
        place, device = current_platform(found), found.device
        shared = "shared" if device.shared_memory else "its own"
        memory = f"{device.memory_total / 1e9:.1f} GB of memory ({shared})"
        return f"{place.board or 'unknown'}, L4T {place.l4t or 'none'}, sm {place.sm}, {memory}; {found.describe()}"

    def build(self) -> str:
        self.first = self.model(0)
        facts = make_engine(self.selector(), self.first)
        assert facts["way"] == "build", facts["way"]
        return described(facts)

    def restart(self) -> str:
        began = time.monotonic()
        facts = make_engine(self.selector(), self.first)
        assert facts["way"] == "build", f"it was made again: {facts['way']}"
        return f"the same engine, loaded and checked in {time.monotonic() - began:.1f} s"

    def speed(self) -> str:
        selector = self.selector()
        selector.request_engine(self.first)
        engine = selector.turn()
        assert engine is not None, selector.status
        x = self.inputs(1)
        cuda = Predictor(self.first.folder, cuda=True)
        times = {
            "engine": timed(Predictor(self.first.folder, session=engine), x),
            f"onnxruntime ({getattr(cuda.session, 'provider', '?')})": timed(cuda, x),
            "onnxruntime (cpu)": timed(self.first.predictor, x),
        }
        engine.close()
        return ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())

    def new_weights(self) -> str:
        self.seed = getattr(self, "seed", 0) + 1
        return described(make_engine(self.selector(), self.model(self.seed)))

    def damage(self) -> str:
        path = self.engines / "engine.plan"
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        return described(make_engine(self.selector(), self.model(self.seed)))

    def time_out(self) -> str:
        """A second is too little; should it do all the same, the engine must be right."""
        plan = replace(self.plan, timeout_s=1.0, level=5)
        try:
            return "built in a second: " + described(
                make_engine(EngineSelector(self.folder / "hasty", plan), self.first)
            )
        except EngineError as error:
            if "in time" not in str(error):
                raise
            return f"refused, as it should be: {error}"

    def training(self) -> str:
        architecture = self.bundle.architecture
        path = self.bundle.path(TRAINING)
        tensors = tensorfile.decode(self.bundle.path(WEIGHTS).read_bytes())
        found: dict[str, Any] = {}
        for cuda in (False, True):
            loaded = OnnxSession(path, training=True, cuda=cuda)
            trainer = Trainer(path, session=loaded)
            x = self.inputs(16)
            y = np.arange(16) % architecture.classes
            if self.bundle.recipe.loss != "cross_entropy":
                y = np.zeros((16, architecture.classes), np.float32)
            data = LocalData(x, y, x[:0], y[:0])
            recipe = replace(self.bundle.recipe, epochs=2, batch_size=8)
            widths = self.bundle.selection.widths
            result = trainer.train(
                tensors,
                data,
                TrainingTask(recipe, seed=0, device="d", round=1, classes=architecture.classes, widths=widths),
            )
            found[loaded.provider] = result.tensors, result.step_seconds, loaded.cpu_reason
        assert "cuda" in found, f"it ran on the CPU: {found['cpu'][2]}"
        moved = [np.abs(found["cuda"][0][n] - found["cpu"][0][n]).max() for n in found["cpu"][0]]
        far = float(max(moved))
        assert far < 1e-2, f"weights differ by {far:.2g}"
        milliseconds = ", ".join(f"{n} {1e3 * f[1]:.3g} ms a step" for n, f in found.items())
        return f"onnxruntime {session.onnxruntime_version()}, weights within {far:.2g}, {milliseconds}"

    def selector(self) -> EngineSelector:
        return EngineSelector(self.engines, self.plan)

    def model(self, seed: int) -> EngineRequest:
        """The bundle's model; with a seed, with weights that differ a little."""
        folder = self.folder / f"model-{seed}"
        if not folder.exists():
            folder.mkdir()
            lowered = [p for p in self.bundle.precisions if graph_file(p) == self.plan.graph]
            for name in {self.plan.graph, "inference.onnx", *(n for p in lowered for n in files_of(p))}:
                shutil.copyfile(self.bundle.path(name), folder / name)
            rng = np.random.default_rng(seed)
            tensors = tensorfile.decode(self.bundle.path(WEIGHTS).read_bytes())
            if seed:
                tensors = {n: v * (1 + 0.1 * rng.random(v.shape, np.float32)) for n, v in tensors.items()}
            (folder / WEIGHTS).write_bytes(tensorfile.encode(tensors))
            for precision in lowered:
                (folder / weights_file(precision)).write_bytes(lowered_weights(folder, precision, tensors))
        return EngineRequest(Predictor(folder), folder, file_digest(folder / WEIGHTS))

    def inputs(self, count: int) -> Any:
        kind, shape = OnnxSession(self.bundle.path("inference.onnx")).inputs[step_contract.X]
        sizes = [d if isinstance(d, int) else 1 for d in shape[1:]]
        if kind == "tensor(int64)":
            return np.zeros((count, *sizes), np.int64)
        return np.random.default_rng(0).random((count, *sizes), np.float32)


def described(facts: dict[str, Any]) -> str:
    return f"{facts['way']} in {facts['seconds']:.1f} s, deviation {facts['deviation']:.2g} from onnxruntime"


def timed(predictor: Predictor, x: Any) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        predictor.predict(x)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def main() -> int:
    parser = argparse.ArgumentParser(description="Try engines and CUDA on this board (docs/jetson.md).")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="a bundle of fedprune-export")
    arguments = parser.parse_args()
    try:
        bundle = open_bundle(arguments.bundle)
        bindings.find_tensorrt()
        with tempfile.TemporaryDirectory() as name:
            return Acceptance(bundle, Path(name)).run()
    except FedpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
