"""Predictions while a board trains: `python benchmarks/predictions.py`.

A board in a process of its own, on two cores, answers over its local socket with the model that it trains; the
application, another process, asks for one prediction after the other through the client. Phases without and with
training take turns, so that neighbours on the machine hit both alike. Both ends are on the same two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

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

BAR = 1.5
SAMPLES, BATCH, CLASSES = 512, 32, 10
AHEAD = """The machine had other work to do meanwhile. Linux was asked to schedule this benchmark's processes, all of
them alike, ahead of that (`--ahead`); what is left of it still raises all numbers, those without training more in
proportion. A quiet machine says more."""
LEVEL = "Neighbours on a machine raise all numbers, those while training more: its processes have used up their turn."

SOCKET, READY = "local.sock", "ready"


def make(name: str, folder: Path) -> None:
    """What the server would send: both graphs and the weights."""
    from step_nets import network

    from fedprune_export.bundles.inference import inference_model
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(network(name)), name)
    widths = [g.size for g in model.architecture.groups]
    (folder / "training.onnx").write_bytes(training_graph(model, Features()).to_bytes())
    (folder / "inference.onnx").write_bytes(inference_model(model, widths))
    (folder / "weights.safetensors").write_bytes(tensorfile.encode(model.tensors))
    (folder / "about.json").write_text(json.dumps({"shape": model.architecture.input_shape, "widths": widths}))


def serve(folder: Path, threads: int) -> None:
    """The board: it does what it is told on its standard input, and says when it does."""
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
                print(READY, flush=True)
                while sys.stdin.readline().strip() == "train":
                    thread = TrainingThread(bench, offer, guard=ThermalGuard())
                    while thread.alive and (thread.status[0] != "train" or thread.status[1] < 2):
                        time.sleep(0.01)
                    print("trains", flush=True)
                    before, began = thread.status[1], time.monotonic()
                    sys.stdin.readline()
                    steps, seconds = thread.status[1] - before, time.monotonic() - began
                    thread.stop()
                    thread.join(60)
                    if thread.alive:
                        raise SystemExit("training didn't end within 60 s: nothing can be measured without it")
                    print(json.dumps({"step_ms": 1e3 * seconds / max(steps, 1)}), flush=True)


def ask(board: Board, x: Any, seconds: float) -> list[float]:
    """Milliseconds of predictions, one after the other."""
    times, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends:
        began = time.perf_counter()
        board.predict(x)
        times.append(1e3 * (time.perf_counter() - began))
        time.sleep(PAUSE)
    return times


def measure(name: str, pairs: int, threads: int) -> dict[str, Any]:
    """Phases in turn on one net."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(name, folder)
        shape = json.loads((folder / "about.json").read_text())["shape"]
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        command = [sys.executable, __file__, "--board", place, "--threads", str(threads)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None

        def tell(word: str) -> str:
            process.stdin.write(f"{word}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return process.stdout.readline().strip()  # type: ignore[union-attr]

        try:
            assert process.stdout.readline().strip() == READY
            board = Board(f"unix:{folder / SOCKET}")
            ask(board, x, 1.0)
            idle, trains, steps = [], [], []
            for pair in range(pairs):
                for training in (False, True) if pair % 2 else (True, False):
                    if training:
                        assert tell("train") == "trains"
                    (trains if training else idle).append(ask(board, x, SECONDS))
                    if training:
                        steps.append(json.loads(tell("rest"))["step_ms"])
        finally:
            process.stdin.close()
            process.wait(60)
    return {"net": name, "threads": threads, "idle": told(idle), "training": told(trains)} | {
        "ratio_p95": told(trains)["p95"] / told(idle)["p95"],
        "ratios_p95": [told([t])["p95"] / told([i])["p95"] for t, i in zip(trains, idle, strict=True)],
        "step_ms": statistics.median(steps),
    }


def told(phases: list[list[float]]) -> dict[str, float]:
    times = np.concatenate(phases)
    p50, p95, p99 = np.quantile(times, (0.5, 0.95, 0.99)).tolist()
    return {"count": len(times), "p50": p50, "p95": p95, "p99": p99, "most": float(times.max())}


def go_ahead() -> None:
    """Have Linux put this session's processes ahead of other sessions', whatever is nice to whom within it."""
    os.setsid()
    Path("/proc/self/autogroup").write_text("-15")


def page(about: dict[str, Any], rows: list[dict[str, Any]], pairs: int) -> str:
    table = "\n".join(
        f"| {r['net']} | {r['step_ms']:.1f} | {r['idle']['p50']:.2f} | {r['training']['p50']:.2f} "
        f"| {r['idle']['p95']:.2f} | {r['training']['p95']:.2f} | {r['ratio_p95']:.2f} "
        f"| {statistics.median(r['ratios_p95']):.2f} ({min(r['ratios_p95']):.2f} to {max(r['ratios_p95']):.2f}) "
        f"| {r['idle']['p99']:.2f} | {r['training']['p99']:.2f} |"
        for r in rows
    )
    worst = max(r["ratio_p95"] for r in rows)
    return f"""# Predictions while a board trains

{about["date"]}, {about["cpu"]}, {CORES} of {about["cores"]} cores (load {about["load"]} at the start),
Python {about["python"]}, onnxruntime {about["onnxruntime"]}. `python benchmarks/predictions.py`

One sample at a time through the Python client and the unix socket, with the model that the board trains on one thread
in batches of {BATCH}. {pairs} pairs of {SECONDS:g} s without and with training, in turns; milliseconds over all phases
of a kind. *Ratio* is that of the 95th percentiles, beside it the median (and range) of the ratios within a pair.
{AHEAD if about["ahead"] else LEVEL}

| net | step | p50 idle | p50 training | p95 idle | p95 training | ratio | within a pair | p99 idle | p99 training |
|---|---|---|---|---|---|---|---|---|---|
{table}

The bar is {BAR}: the largest ratio here is {worst:.2f}, {"below it" if worst <= BAR else "above it"}.
"""


def main() -> None:
    """Measure, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of phases of each net (default: 10)")
    parser.add_argument("--nets", nargs="*", default=NETS, help="only these nets; nothing is written then")
    parser.add_argument("--threads", type=int, default=1, help="threads that train (default: 1)")
    parser.add_argument("--ahead", action="store_true", help="ahead of other work on a busy machine; as root")
    parser.add_argument("--board", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.board is not None:
        serve(arguments.board, arguments.threads)
        return
    from synthetic_nets import setting, write

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    about = {**setting("onnxruntime"), "ahead": arguments.ahead}
    if arguments.ahead:
        go_ahead()
    rows = []
    for name in arguments.nets:
        rows.append(measure(name, arguments.pairs, arguments.threads))
        print(rows[-1], file=sys.stderr, flush=True)
    text = page(about, rows, arguments.pairs)
    if tuple(arguments.nets) == NETS and arguments.threads == 1:
        write("predictions", {"setting": about, "pairs": arguments.pairs, "seconds": SECONDS, "rows": rows}, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
