"""What a round of twenty devices costs with each trainer: `OMP_NUM_THREADS=1 python benchmarks/simulation.py`.

The offers are worked out as in a simulation: evaluated, trained, checked, evaluated, encoded. Trainers take turns on
the same offers, so that whoever else uses the machine hits all of them; with a GPU, `torch:cuda` takes part, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accuracy.nets import NETS
from synthetic_nets import setting, write

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.hardware.profile_store import find
from fedprune.model.architecture import widths_at
from fedprune.model.selection import Selection
from fedprune.training.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.fleet.trainers import bench
from fedprune_server.simulation.fleet.virtual_device import Bench, VirtualDevice, Work

SHAPE, CLASSES = (3, 16, 16), 10
DEVICES, SAMPLES, TESTS = 20, 450, 150
DENSITIES = (1.0, 0.75, 0.5, 0.25)
RECIPES = {
    "HeteroFL's": Recipe(epochs=2, batch_size=64, lr=0.05),
    "ours": Recipe(
        epochs=2,
        batch_size=64,
        lr=0.05,
        logit_adjustment=True,
        ordered_dropout=(0.5,),
        average=0.85,
        calibrate=True,
    ),
}
ALL, ALONE = ("onnxruntime", "torch", "torch/20"), ("onnxruntime", "torch")
CASES = (("small_cnn", "HeteroFL's", ALL, 2), ("resnet8", "HeteroFL's", ALONE, 1), ("small_cnn", "ours", ALONE, 1))
"""Net, recipe, trainers, turns."""


def devices() -> list[VirtualDevice]:
    """Twenty devices whose numbers of samples differ as dealt-out ones do."""
    out = []
    for i in range(DEVICES):
        rng = np.random.default_rng(i)
        count = int(SAMPLES * (0.5 + i / (DEVICES - 1)))
        x = rng.standard_normal((count + TESTS, *SHAPE)).astype(np.float32)
        y = rng.integers(0, CLASSES, count + TESTS)
        data = LocalData(x[TESTS:], y[TESTS:], x[:TESTS], y[:TESTS])
        out.append(VirtualDevice(f"board-{i:02}", find("raspberry-pi-4b"), data))
    return out


def offers(model: Model, recipe: Recipe, store: BlobStore) -> list[Work]:
    """What a server sends them."""
    architecture, out = model.architecture, list[Work]()
    training = store.put(training_graph(model, recipe.features).to_bytes()).to_dict()
    for i, device in enumerate(devices()):
        widths = widths_at(architecture, DENSITIES[i % len(DENSITIES)])
        weights = Selection.of(architecture, widths).gather(model.tensors)
        body: dict[str, Any] = {
            "seed": 0,
            "architecture": architecture.digest,
            "selection": "0" * 64,
            "widths": widths,
            "classes": architecture.classes,
            "weights": store.put(tensorfile.encode(weights)).to_dict(),
            "training": training,
            "inference": store.put(inference_model(model, widths)).to_dict(),
            "recipe": recipe.to_dict(),
        }
        out.append((device, body, 1))
    return out


def turn(tested: Bench, work: Sequence[Work]) -> tuple[float, float, dict[str, float]]:
    """CPU seconds, seconds by the clock and loss after training per device."""
    tested.boards = {}
    cpu, clock = time.process_time(), time.perf_counter()
    if tested.together > 1:
        tested.prepare(work)
    losses = {device.name: tested.carry_out(device, *rest).metrics["loss_after"] for device, *rest in work}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - clock, losses


def measure(net: str, option: str, trainers: Sequence[str], turns: int) -> dict[str, Any]:
    """One net and recipe with all trainers in turn."""
    torch.manual_seed(0)
    module = NETS[net](SHAPE, CLASSES)
    model = import_onnx(export_torch(module, input_shape=SHAPE, name=net), net)
    found: dict[str, dict[str, Any]] = {t: {"cpu": [], "clock": []} for t in trainers}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = BlobStore(folder / "blobs", durable=False)
        work = offers(model, RECIPES[option], store)
        benches = {t: bench(t, 1, model, store, folder / str(i)) for i, t in enumerate(trainers)}
        for number in range(turns + 1):
            for name, tested in benches.items():
                cpu, clock, losses = turn(tested, work)
                found[name]["losses"] = losses
                if number:  # the first loads and compiles
                    found[name]["cpu"].append(cpu)
                    found[name]["clock"].append(clock)
    board = found["onnxruntime"]["losses"]
    rows = {}
    for name, row in found.items():
        # A processor's seconds say nothing of a GPU that it waits for.
        by = "clock" if "cuda" in name else "cpu"
        ratios = [own / other for own, other in zip(row[by], found["onnxruntime"][by], strict=True)]
        rows[name] = {
            "cpu_s": statistics.median(row["cpu"]),
            "clock_s": statistics.median(row["clock"]),
            "beside_onnxruntime": statistics.median(ratios),
            "furthest_loss": max(abs(row["losses"][n] / board[n] - 1) for n in board),
        }
    return {
        "net": net,
        "recipe": option,
        "turns": turns,
        "parameters": sum(model.tensors[t.name].size for t in model.architecture.trainable),
        "rows": rows,
    }


def page(cases: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    heading = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores (one used; load {about['load']} from others), "
        f"onnxruntime {about['onnxruntime']}, torch {about['torch']}. "
        "`OMP_NUM_THREADS=1 python benchmarks/simulation.py`"
    )
    explained = (
        f"A round of {DEVICES} devices of {SAMPLES} training samples on average (half to one and a half times as many) "
        f"and {TESTS} test samples of 3×16×16, five devices each at densities 1, 0.75, 0.5 and 0.25; 2 epochs, batches "
        "of 64: evaluated, trained, checked, evaluated and encoded as boards do it. *Ours* adds narrower steps, logit "
        "adjustment, a moving average and a pass for batch-norm statistics. `torch/20` works out all devices of a "
        "width at once. CPU seconds of a round (of `torch:cuda` seconds by the clock, beside onnxruntime's by the "
        "clock); medians over turns. "
        "*Loss*: the furthest that a device's loss after training is from that of onnxruntime."
    )
    table = ["| net | recipe | turns | trainer | s | beside onnxruntime | loss |", "|---|---|---|---|---|---|---|"]
    for case in cases:
        for name, row in case["rows"].items():
            about_case = f"{case['net']} ({case['parameters'] / 1e3:.0f} k) | {case['recipe']} | {case['turns']}"
            seconds = row["clock_s" if "cuda" in name else "cpu_s"]
            numbers = f"{seconds:.2f} | {row['beside_onnxruntime']:.2f} | {row['furthest_loss']:.1e}"
            table.append(f"| {about_case} | {name} | {numbers} |")
    return "\n\n".join(["# A round by each trainer", heading, explained, "\n".join(table)])


def main() -> None:
    torch.set_num_threads(1)
    gpu = ("torch:cuda/1", "torch:cuda/20") if torch.cuda.is_available() else ()
    cases = [measure(net, option, (*trainers, *gpu), turns) for net, option, trainers, turns in CASES]
    about = setting("onnxruntime", "torch")
    closing = (
        "On a CPU nothing is gained by working out many devices at once: a convolution of one device fills a core, and "
        "with the devices' own weights it becomes a grouped convolution, which is slower there. It is meant "
        "for GPUs, whose time would go into starting small kernels"
    ) + ("." if gpu else "; no GPU was at hand.")
    write("simulation", {"setting": about, "cases": cases}, page(cases, about) + "\n\n" + closing + "\n")


if __name__ == "__main__":
    main()
