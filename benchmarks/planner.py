"""How far predicted peak memory is off, of rounds and of predicting: every case in a fresh process.

    python benchmarks/planner.py [--raw measured.json] [--python INTERPRETER ...]

Peak memory is the high-water mark of resident memory of a process that has imported what `fedprune-device run` imports
and reads its samples from a file; a round is a whole one, in a thread, evaluations and the new model's check included.
Predictions begin with what the process measures of itself, as a board's do. The constants of `fedprune.planning.costs`
were fitted to the nets of `nets`, `TIMM` and `LARGE` with onnxruntime 1.31.1 and 1.23.2 together, and to none of
`HELD_OUT`. Cases that the raw file has aren't measured again. Times are another page's: `latency.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, TEST_SAMPLES = 512, 128
STEPS = 3
BATCHES = 8, 32
TIMM = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "regnetx_002", "convnext_atto")
LARGE = (
    ("gru_net", 0, 1.0, (8, 32)),
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


def nets() -> dict[str, Any]:
    """Torch modules by name: those that the tests share, some of them wider."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from torch import nn

    from support.nets import small_nets as shared

    class WideLeNet(nn.Module):
        """The LeNet of federated learning's papers: 32 and 64 channels, 512 hidden units."""

        input_shape = (1, 28, 28)

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
            self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
            self.fc1 = nn.Linear(64 * 49, 512)
            self.fc2 = nn.Linear(512, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
            x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
            x = torch.relu(self.fc1(torch.flatten(x, 1)))
            return self.fc2(x)

    class Signals(nn.Module):
        """A net for signals of six sensors: three convolutions over time, two linear layers."""

        input_shape = (6, 128)

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv1d(a, b, 5, padding=2) for a, b in ((6, 64), (64, 96), (96, 128)))
            self.fc1 = nn.Linear(128 * 16, 256)
            self.fc2 = nn.Linear(256, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv in self.convs:
                x = torch.max_pool1d(torch.relu(conv(x)), 2)
            return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))

    return {
        "LeNet": WideLeNet(),
        "LeNet-5": shared.lenet(),
        "VGG11-BN": shared.VGG11(width=1.0),
        "ResNet20-BN": shared.resnet20_bn(),
        "ConcatNet": shared.concat_net(),
        "Signals": Signals(),
    }


def module_of(name: str, image: int) -> Any:
    """A network of timm for images of a size, or with size 0 one of the tests'."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.nets import published_nets as zoo
    from support.nets import small_nets as shared

    return zoo.timm_model(name, image) if image else getattr(shared, name)()


def timm_nets() -> dict[str, Any]:
    """Networks of timm for images of 64 pixels."""
    return {name: module_of(name, 64) for name in TIMM}


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

        data = load_data(str(folder.parent / f"{spec['net']}.npz"))
        process = (process_memory() or 0) - data.bytes
        with ThreadPoolExecutor(1) as thread:
            thread.submit(carry_out, folder, batch, spec, data).result()
    else:
        from fedprune_device.serving.predictor import Predictor

        predictor = Predictor(folder, threads=1)
        rng = np.random.default_rng(0)
        for _ in range(STEPS):
            predictor.predict(rng.standard_normal((1, *spec["input_shape"]), dtype=np.float32))
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_bytes": peak, "process_bytes": process, "onnxruntime": onnxruntime.__version__}))


def carry_out(folder: Path, batch: int, spec: dict[str, Any], data: Any) -> None:
    """A round on noise: evaluation, a few steps, the check of the new model, evaluation, predictions of one sample."""
    from fedprune.model.recipe import Recipe
    from fedprune.wire.messages import Offer
    from fedprune_device.serving.predictor import GRAPH, WEIGHTS
    from fedprune_device.storage.state_directory import DeviceStore
    from fedprune_device.training.round_runner import RoundRunner

    recipe = Recipe(epochs=STEPS, batch_size=batch, lr=1e-6, max_steps=STEPS)
    with tempfile.TemporaryDirectory(dir=folder) as state, DeviceStore(Path(state)) as store:
        offer = Offer(
            job="benchmark",
            round=1,
            attempt=0,
            seed=0,
            architecture="0" * 64,
            selection="0" * 64,
            widths=tuple(spec["widths"]),
            classes=spec["classes"],
            weights=store.blobs.put((folder / WEIGHTS).read_bytes()),
            training=store.blobs.put((folder / "training.onnx").read_bytes()),
            inference=store.blobs.put((folder / GRAPH).read_bytes()),
            recipe=recipe.to_dict(),
        )
        bench = RoundRunner("d", store.blobs, store.slots, data)
        bench.commit(bench.make(offer))


def prepare(root: Path) -> None:
    """Write every net at its widths, as a board gets it, with its costs."""
    cases = [("rows", name, 0, m, (1.0, 0.5), (0, *BATCHES), SAMPLES) for name, m in (nets() | timm_nets()).items()]
    for group, further in (("large", LARGE), ("held_out", HELD_OUT)):
        cases += [(group, n, image, module_of(n, image), (d,), (0, *b), 64) for n, image, d, b in further]
    for case in cases:
        prepare_net(root, *case)


def prepare_net(
    root: Path,
    group: str,
    net: str,
    image: int,
    module: Any,
    densities: tuple[float, ...],
    batches: tuple[int, ...],
    samples: int,
) -> None:
    """Write a net, its samples and its costs."""
    from fedprune.core import tensorfile
    from fedprune.model.architecture import widths_at
    from fedprune.model.recipe import Features
    from fedprune.model.selection import Selection
    from fedprune.planning.costs import costs_at
    from fedprune_device.serving.predictor import GRAPH, WEIGHTS
    from fedprune_export.bundles.inference import inference_model
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    name = f"{net}-{image}" if image else net
    model = import_onnx(export_torch(module), name)
    architecture = model.architecture
    graph = training_graph(model, Features()).to_bytes()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples + TEST_SAMPLES, *architecture.input_shape), dtype=np.float32)
    y = rng.integers(0, architecture.classes, len(x))
    parts = {"x_train": x[:samples], "y_train": y[:samples], "x_test": x[samples:], "y_test": y[samples:]}
    np.savez(root / f"{name}.npz", **parts)
    for density in densities:
        widths = widths_at(architecture, density)
        folder = root / f"{name}-{density}"
        folder.mkdir(parents=True)
        (folder / "training.onnx").write_bytes(graph)
        (folder / GRAPH).write_bytes(inference_model(model, widths))
        weights = Selection.of(architecture, widths).gather(model.tensors)
        (folder / WEIGHTS).write_bytes(tensorfile.encode(weights))
        spec = {"group": group, "net": name, "density": density, "widths": widths, "classes": architecture.classes}
        spec |= {"image": image, "batches": batches, "samples": samples}
        spec |= {"input_shape": architecture.input_shape, "costs": vars(costs_at(architecture, widths))}
        (folder / "spec.json").write_text(json.dumps(spec))


def measure(root: Path, pythons: list[str], raw: Path) -> None:
    """Measure the cases of `prepare` that the raw file doesn't have, each in a fresh process of each interpreter."""
    rows = json.loads(raw.read_text()) if raw.exists() else []
    done = {(r["folder"], r["batch"], r["onnxruntime"]) for r in rows}
    for python in pythons:
        code = "import onnxruntime; print(onnxruntime.__version__)"
        version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            for batch in json.loads((folder / "spec.json").read_text())["batches"]:
                if (folder.name, batch, version) in done:
                    continue
                command = [python, __file__, "--child", str(folder), "--batch", str(batch)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append({"folder": folder.name, "batch": batch, **json.loads(run.stdout)})
                raw.write_text(json.dumps(rows))
                print(f"{folder.name}, batch {batch}: {rows[-1]['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)


def compare(rows: list[dict[str, Any]], root: Path) -> dict[str, list[dict[str, Any]]]:
    """Predictions and their errors beside what was measured, in three groups: `rows`, `large` and `held_out`."""
    from fedprune.model.recipe import Features
    from fedprune.planning.costs import Costs

    table: dict[str, list[dict[str, Any]]] = {"rows": [], "large": [], "held_out": []}
    versions = {row["onnxruntime"] for row in rows}
    measured_by = {v: [r["process_bytes"] for r in rows if r["batch"] and r["onnxruntime"] == v] for v in versions}
    processes = {version: int(statistics.median(measured)) for version, measured in measured_by.items()}
    for row in rows:
        spec = json.loads((root / row["folder"] / "spec.json").read_text())
        costs, samples, batch = Costs(**spec["costs"]), spec["samples"], row["batch"]
        if batch:
            memory = costs.training_memory(batch, Features(), samples, process=row["process_bytes"]).total
        else:
            memory = costs.inference_bytes(1, processes[row["onnxruntime"]])
        about = {"net": spec["net"].removesuffix(f"-{spec['image']}"), "image": spec["image"], "samples": samples}
        about |= {"density": spec["density"], "what": "training" if batch else "predicting", "batch": batch or 1}
        measured = {k: row[k] for k in ("onnxruntime", "process_bytes", "peak_bytes")}
        error = memory / row["peak_bytes"] - 1
        table[spec["group"]].append(
            {**about, "costs": spec["costs"], **measured, "predicted_bytes": memory, "error": error}
        )
    return table


def spread(errors: list[float]) -> str:
    """Least, greatest and median error, and the median of its size."""
    size = statistics.median(map(abs, errors))
    return f"{min(errors):+.0%} to {max(errors):+.0%}, median {statistics.median(errors):+.0%} (of its size {size:.0%})"


def page(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The results as a page."""
    groups = {
        "rows": "eleven nets",
        "large": "nets whose activations take most",
        "held_out": "nets that no constant was fitted to",
    }
    versions = sorted({r["onnxruntime"] for r in result["rows"]}, reverse=True)
    summary, tables = [], []
    for group, title in groups.items():
        for what in ("training", "predicting"):
            for version in versions:
                errors = [r["error"] for r in result[group] if r["what"] == what and r["onnxruntime"] == version]
                if errors:
                    summary.append(f"- {title}, {what}, onnxruntime {version}: {spread(errors)}.")
        lines = []
        for r in result[group]:
            net = f"{r['net']}, {r['image']} px" if r["image"] else r["net"]
            cells = [net, r["density"], r["what"], r["batch"], r["onnxruntime"], f"{r['peak_bytes'] / 1e6:.0f}"]
            cells += [f"{r['predicted_bytes'] / 1e6:.0f}", f"{r['error']:+.0%}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        head = "| net | density | process | batch | onnxruntime | peak MB | predicted | error |\n|" + "---|" * 8
        tables.append(f"## {title.capitalize()}\n\n{head}\n" + "\n".join(lines))
    text = "\n".join(summary)
    return f"""# How far predicted memory is off

{about["date"]}, {about["cpu"]}, Python {about["python"]}, onnxruntime {" and ".join(versions)}.
`python benchmarks/planner.py`

Peak resident memory, every case in a fresh process that has imported all that a board's agent imports. Training is a
whole round of {STEPS} steps, from the first evaluation to the new model's check and the last one, with {SAMPLES} local
samples (64 outside the first table) and {TEST_SAMPLES} to test with, read from a file. Its prediction begins with what
the process measured of itself before; that of predicting with the median of what the training processes measured.

{text}

{(chr(10) * 2).join(tables)}
"""


def main() -> None:
    """Measure, compare, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help="where measurements are kept")
    parser.add_argument("--prepared", type=Path, help="where prepared nets are kept")
    parser.add_argument("--python", nargs="+", help="interpreters that measure (default: this one)")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.batch)
        return
    from synthetic_nets import setting, write

    with tempfile.TemporaryDirectory() as made:
        root, raw = arguments.prepared or Path(made) / "nets", arguments.raw or Path(made) / "raw.json"
        if not root.exists():
            root.mkdir()
            prepare(root)
        measure(root, arguments.python or [sys.executable], raw)
        about = setting("onnxruntime")
        result = {"setting": about, **compare(json.loads(raw.read_text()), root)}
    write("planner", result, page(about, result))


if __name__ == "__main__":
    main()
