"""How far predicted peak memory is off, of rounds and of predicting: every case in a fresh process.

    python -m benchmarks.planner [--python INTERPRETER ...]

Peak memory is the high-water mark of resident memory of a process that has imported what `fedprune-device run` imports
and reads its samples from a file; a round is a whole one, in a thread, evaluations and the new model's check included.
Predictions begin with what the process measures of itself, as a board's do. The constants of `fedprune.planning.costs`
were fitted to `NETS`, `TIMM` and `LARGE` with onnxruntime 1.31.1 and 1.23.2 together, and to none of `HELD_OUT`. Times
are another page's: `benchmarks.latency`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, parser, peak_bytes, save, setting

SAMPLES, TEST_SAMPLES, STEPS = 512, 128, 3
BATCHES = 8, 32
NETS = ("LeNet", "LeNet-5", "VGG11-BN", "ResNet20-BN", "ConcatNet", "Signals")
TIMM = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "regnetx_002", "convnext_atto")
POOLED = ("PooledNet", "OverlapNet", "PooledNet-5", "WidePooledNet")
"""Convolutions of 96 × 96 pixels, ReLU and a pooling of the largest activation, without batch norm."""

LARGE = (
    ("gru_net", 0, 1.0, (8, 32)),
    ("PooledNet", 0, 1.0, (8, 32)),
    ("OverlapNet", 0, 1.0, (8, 32)),
    ("mobilenetv2_100", 128, 1.0, (8, 32)),
    ("efficientnet_b0", 128, 0.5, (8, 32)),
    ("lcnet_035", 224, 1.0, (8, 32)),
    ("mobilenetv2_100", 224, 1.0, (8,)),
    ("efficientnet_b0", 224, 1.0, (4, 8)),
    ("mobilenetv3_small_100", 224, 1.0, (8, 32)),
    ("resnet18", 224, 1.0, (8, 32)),
)
"""Networks whose activations take most: name, size of images (0 for a net of the tests), density, batches. They train
on 64 samples."""

HELD_OUT = (
    ("PooledNet-5", 0, 1.0, (8, 32)),
    ("WidePooledNet", 0, 1.0, (8, 32)),
    ("unet_bn", 0, 1.0, (8, 32)),
    ("lstm_net", 0, 1.0, (8, 32)),
    ("mnasnet_small", 96, 1.0, (8, 32)),
    ("starnet_s050", 96, 1.0, (8, 32)),
    ("resnet10t", 128, 1.0, (8, 32)),
    ("fasternet_t0", 128, 1.0, (8, 32)),
    ("ghostnet_050", 160, 1.0, (8, 32)),
    ("repvit_m0_9", 96, 0.5, (8, 32)),
)
"""The same of networks to which no constant was fitted."""

GROUPS = ("rows", "large", "held_out")


def nets() -> dict[str, Any]:
    """Torch modules by name: those that the tests share, some of them wider."""
    from torch import nn

    from benchmarks.step_nets import network
    from support.nets import small_nets as shared

    channels = ((6, 64), (64, 96), (96, 128))
    convolutions = [m for a, b in channels for m in (nn.Conv1d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2))]
    signals = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 6))
    signals.input_shape = (6, 128)  # type: ignore[assignment]
    made = (
        network("lenet"), shared.lenet(), shared.VGG11(width=1.0), shared.resnet20_bn(), shared.concat_net(), signals,
        pooled_net((32, 64), 3), pooled_net((32, 64), 3, overlap=True), pooled_net((32, 64, 64), 5),
        pooled_net((64, 64), 3),
    )  # fmt: skip
    return dict(zip((*NETS, *POOLED), made, strict=True))


def pooled_net(channels: tuple[int, ...], kernel: int, *, overlap: bool = False) -> Any:
    """Convolutions, each with a ReLU and a pooling that halves the image, and a linear layer."""
    from torch import nn

    image, layers = 96, []
    for before, after in itertools.pairwise((3, *channels)):
        pool = nn.MaxPool2d(3, 2, padding=1) if overlap else nn.MaxPool2d(2)
        layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.ReLU(), pool]
        image //= 2
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * image**2, 10))
    net.input_shape = (3, 96, 96)  # type: ignore[assignment]
    return net


def module_of(name: str, image: int) -> Any:
    """A net of `nets`, a network of timm for images of a size, or with size 0 one of the tests'."""
    from support.nets import published_nets as zoo
    from support.nets import small_nets as shared

    if name in (*NETS, *POOLED):
        return nets()[name]
    return zoo.timm_model(name, image) if image else getattr(shared, name)()


def cases() -> Iterator[dict[str, Any]]:
    """Nets with group, size of images, density, batches and number of samples."""
    for name, image in (*((name, 0) for name in NETS), *((name, 64) for name in TIMM)):
        for density in (1.0, 0.5):
            yield {"group": "rows", "net": name, "image": image, "density": density, "batches": BATCHES, "n": SAMPLES}
    for group, further in (("large", LARGE), ("held_out", HELD_OUT)):
        for name, image, density, batches in further:
            yield {"group": group, "net": name, "image": image, "density": density, "batches": batches, "n": 64}


def prepare(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Write a net as a board gets it, and samples; returns what else a process must know."""
    from fedprune.core import tensorfile
    from fedprune.model.architecture import widths_at
    from fedprune.model.features import Features
    from fedprune.model.selection import Selection
    from fedprune.planning.costs import costs_at
    from fedprune_device.serving.predictor import GRAPH, WEIGHTS
    from fedprune_export.bundles.inference import inference_model
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(module_of(case["net"], case["image"])), case["net"])
    architecture, n = model.architecture, case["n"]
    widths = widths_at(architecture, case["density"])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n + TEST_SAMPLES, *architecture.input_shape), dtype=np.float32)
    y = rng.integers(0, architecture.classes, len(x))
    np.savez(folder / "samples.npz", x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])
    (folder / "training.onnx").write_bytes(training_graph(model, Features()).to_bytes())
    (folder / GRAPH).write_bytes(inference_model(model, widths))
    weights = Selection.of(architecture, widths).gather(model.tensors)
    (folder / WEIGHTS).write_bytes(tensorfile.encode(weights))
    spec = {"widths": widths, "classes": architecture.classes, "input_shape": architecture.input_shape}
    spec["costs"] = vars(costs_at(architecture, widths))
    (folder / "spec.json").write_text(json.dumps(spec))
    return spec


def child(folder: Path, batch: int) -> None:
    """Carry out a round of a few steps as a device does, or with batch 0 predict, and print the peak memory."""
    import onnxruntime

    spec = json.loads((folder / "spec.json").read_text())
    process = 0
    if batch:
        # All that `fedprune-device run` imports; a thread trains, as on a board.
        import fedprune_device.agent.agent
        import fedprune_device.api.http_server
        import fedprune_device.cli.main
        import fedprune_device.releases.release_agent
        import fedprune_device.releases.release_trial
        import fedprune_device.telemetry.crash_reporter  # noqa: F401
        from fedprune_device.data.array_source import load_data
        from fedprune_device.hardware.probe import process_memory

        data = load_data(str(folder / "samples.npz"))
        process = (process_memory() or 0) - data.memory_bytes
        with ThreadPoolExecutor(1) as thread:
            thread.submit(carry_out, folder, batch, spec, data).result()
    else:
        from fedprune_device.serving.predictor import Predictor

        predictor, rng = Predictor(folder, threads=1), np.random.default_rng(0)
        for _ in range(STEPS):
            predictor.predict(rng.standard_normal((1, *spec["input_shape"]), dtype=np.float32))
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "process_bytes": process, "peak_bytes": peak_bytes()}))


def carry_out(folder: Path, batch: int, spec: dict[str, Any], data: Any) -> None:
    """A round on noise: evaluation, a few steps, the check of the new model, evaluation, predictions of one sample."""
    from fedprune.model.recipe import Recipe
    from fedprune.wire.messages import Offer
    from fedprune_device.serving.predictor import GRAPH, WEIGHTS
    from fedprune_device.storage.state_directory import DeviceStore
    from fedprune_device.training.round_runner import RoundRunner

    recipe = Recipe(epochs=STEPS, batch_size=batch, lr=1e-6, max_steps=STEPS)
    with tempfile.TemporaryDirectory(dir=folder) as state, DeviceStore(Path(state)) as store:
        files = (store.blobs.put((folder / name).read_bytes()) for name in (WEIGHTS, "training.onnx", GRAPH))
        offer = Offer(
            "benchmark", 1, 0, 0, "0" * 64, "0" * 64, tuple(spec["widths"]), spec["classes"], *files, recipe.to_dict()
        )
        runner = RoundRunner("d", store.blobs, store.slots, data)
        runner.commit(runner.carry_out(offer))


def measure(case: dict[str, Any], pythons: list[str]) -> list[dict[str, Any]]:
    """What processes of each interpreter take for a net's batches, without the predictions."""
    with tempfile.TemporaryDirectory() as place:
        spec, rows = prepare(Path(place), case), []
        for python in pythons:
            for batch in (0, *case["batches"]):
                command = [python, "-m", "benchmarks.planner", "--child", place, "--batch", str(batch)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
                about = {k: case[k] for k in ("net", "image", "density")} | {"samples": case["n"]}
                about |= {"what": "training" if batch else "predicting", "batch": batch or 1, "costs": spec["costs"]}
                rows.append({**about, **json.loads(done.stdout)})
    return rows


def predicted(row: dict[str, Any], processes: dict[str, int]) -> dict[str, Any]:
    """A row with its prediction; that of predicting begins with the median of what training processes measured."""
    from fedprune.model.features import Features
    from fedprune.planning.costs import Costs

    costs = Costs(**row["costs"])
    if row["what"] == "training":
        memory = costs.training_memory(row["batch"], Features(), row["samples"], process=row["process_bytes"]).total
    else:
        memory = costs.inference_bytes(1, processes[row["onnxruntime"]])
    return {**row, "predicted_bytes": memory, "error": memory / row["peak_bytes"] - 1}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--child", type=Path, help="one process's part")
    command.add_argument("--batch", type=int, default=32, help="of a process's part")
    command.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters (default: this one)")
    options = command.parse_args()
    if options.child:
        child(options.child, options.batch)
        return
    rows: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for case in cases():
        if all(str(case[name]) == value for name, value in options.only):
            rows[case["group"]] += measure(case, options.python)
            print(f"{case['net']} at {case['density']:g} is measured", file=sys.stderr, flush=True)
    training = [row for group in rows.values() for row in group if row["what"] == "training"]
    processes = {
        version: int(statistics.median(r["process_bytes"] for r in training if r["onnxruntime"] == version))
        for version in {r["onnxruntime"] for r in training}
    }
    body = {group: [predicted(row, processes) for row in found] for group, found in rows.items()}
    save(options.out or "planner", {"setting": setting("onnxruntime"), **body})


if __name__ == "__main__":
    main()
