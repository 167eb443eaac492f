"""Predictions while a board trains: `python -m benchmarks.predictions`.

A board in a process of its own, on two cores, answers over its local socket with the model that it trains; the
application, another process, asks for one prediction after the other through the client. Phases without and with
training take turns, so that neighbours on the machine hit both alike. Both ends are on the same two cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import run_cases
from fedprune.core import tensorfile
from fedprune.model.recipe import Features, Recipe
from fedprune.wire.messages import Offer
from fedprune_device.client import Board

NETS = ("lenet", "vgg11_bn", "resnet20_bn")
CORES = 2
PAIRS = 10
SECONDS = 4.0
PAUSE = 0.005
"""Between two predictions; an application has something to do with them."""

SAMPLES, BATCH, CLASSES = 512, 32, 10
SOCKET = "local.sock"


def make(name: str, folder: Path) -> None:
    """What the server would send: both graphs and the weights."""
    from benchmarks.step_nets import network
    from fedprune_export.bundles.inference import inference_model
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(network(name)), name)
    widths = [g.size for g in model.architecture.groups]
    (folder / "training.onnx").write_bytes(training_graph(model, Features()).to_bytes())
    (folder / "inference.onnx").write_bytes(inference_model(model, widths))
    (folder / "weights.safetensors").write_bytes(tensorfile.encode(model.tensors))
    (folder / "about.json").write_text(json.dumps({"shape": model.architecture.input_shape, "widths": widths}))


def serve(folder: Path, threads: int, orders: Connection) -> None:
    """The board: it does what it is asked to, and says when it does."""
    from fedprune_device.api.address import Address
    from fedprune_device.api.endpoints import Endpoints
    from fedprune_device.api.http_server import LocalServer
    from fedprune_device.api.live_model import LiveModel
    from fedprune_device.data.dataset import LocalData
    from fedprune_device.hardware.thermal_guard import ThermalGuard
    from fedprune_device.serving.model_slots import Serving
    from fedprune_device.storage.state_directory import DeviceStore
    from fedprune_device.training.round_runner import RoundRunner, TrainerCache, TrainingThread

    about = json.loads((folder / "about.json").read_text())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, *about["shape"])).astype(np.float32)
    y = rng.integers(0, CLASSES, SAMPLES)
    recipe = Recipe(epochs=10_000, batch_size=BATCH, lr=1e-4)
    with DeviceStore(folder / "state") as store:
        names = ("weights.safetensors", "training.onnx", "inference.onnx")
        weights, training, inference = (store.blobs.put((folder / n).read_bytes()) for n in names)
        store.slots.stage(store.blobs.path(inference.sha256), store.blobs.path(weights.sha256))
        store.slots.install(Serving("job", 0, CLASSES, inference.sha256, weights.sha256))
        offer = Offer(
            "job", 1, 0, 0, "a" * 64, "b" * 64, tuple(about["widths"]), CLASSES, weights, training, inference,
            recipe.to_dict(),
        )  # fmt: skip
        bench = RoundRunner("d", store.blobs, store.slots, LocalData(x, y, x[:1], y[:1]), TrainerCache(threads))
        with LiveModel(folder / "state" / "serving") as model:
            endpoints = Endpoints(model, None, dict)
            with LocalServer(Address.parse(f"unix:{folder / SOCKET}"), endpoints):
                orders.send("ready")
                while orders.recv() == "train":
                    thread = TrainingThread(bench, offer, guard=ThermalGuard())
                    while thread.alive and (thread.status[0] != "train" or thread.status[1] < 2):
                        time.sleep(0.01)
                    orders.send("trains")
                    before, began = thread.status[1], time.monotonic()
                    orders.recv()
                    steps, seconds = thread.status[1] - before, time.monotonic() - began
                    thread.stop()
                    thread.join(60)
                    if thread.alive:
                        raise SystemExit("training didn't end within 60 s: nothing can be measured without it")
                    orders.send(1e3 * seconds / max(steps, 1))


def ask(board: Board, x: Any, seconds: float) -> list[float]:
    """Milliseconds of predictions, one after the other."""
    times, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends:
        began = time.perf_counter()
        board.predict(x)
        times.append(1e3 * (time.perf_counter() - began))
        time.sleep(PAUSE)
    return times


def measure(net: str, threads: int) -> dict[str, Any]:
    """Phases in turn on one net."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(net, folder)
        shape = json.loads((folder / "about.json").read_text())["shape"]
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(folder, threads, theirs))
        process.start()

        def tell(word: str) -> Any:
            ours.send(word)
            return ours.recv()

        try:
            assert ours.recv() == "ready"
            board = Board(f"unix:{folder / SOCKET}")
            ask(board, x, 1.0)
            idle, trains, steps = [], [], []
            for pair in range(PAIRS):
                for training in (False, True) if pair % 2 else (True, False):
                    if training:
                        assert tell("train") == "trains"
                    (trains if training else idle).append(ask(board, x, SECONDS))
                    if training:
                        steps.append(tell("rest"))
        finally:
            ours.send("end")
            process.join(60)
    ratios = [quantiles([t])["p95"] / quantiles([i])["p95"] for t, i in zip(trains, idle, strict=True)]
    return {
        "idle": quantiles(idle),
        "training": quantiles(trains),
        "ratio_p95": quantiles(trains)["p95"] / quantiles(idle)["p95"],
        "ratios_p95": ratios,
        "step_ms": statistics.median(steps),
    }


def quantiles(phases: list[list[float]]) -> dict[str, float]:
    times = np.concatenate(phases)
    p50, p95, p99 = np.quantile(times, (0.5, 0.95, 0.99)).tolist()
    return {"count": len(times), "p50": p50, "p95": p95, "p99": p99, "most": float(times.max())}


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    cases = [{"net": net, "threads": 1} for net in NETS]
    run_cases("predictions", __doc__, cases, measure, "onnxruntime", pairs=PAIRS, seconds=SECONDS)


if __name__ == "__main__":
    main()
