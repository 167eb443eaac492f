"""Writes the probe's nets among the assets of `fedprune_device`; needs the exporter, which boards don't have.

A small convolutional net in the shape of those that boards train. Its graphs go through the compiler, so that the probe
measures what a round would run. Beside it, in one archive, the nets of `probe_nets.py` at a few widths each.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

from fedprune.core.rng import keyed_generator
from fedprune.model.features import Features
from fedprune.planning.costs import costs_at
from fedprune.planning.probe_report import UNITS
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.training.step_graph import training_graph

sys.path.insert(0, str(Path(__file__).parent))
from probe_nets import NETS

POINTS = 15
"""Widths at which each net is measured: whole, a half, a quarter, then random ones."""

BATCHES = (16, 16, 4, 8, 16)

INPUT, CLASSES, BATCH = (3, 32, 32), 10, 16
CONVOLUTIONS = ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
"""Input channels, output channels, stride."""

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "device_runtime/fedprune_device/assets"


def network() -> bytes:
    """The reference net, as the bytes of an ONNX file."""
    graph = Graph(name="probe")
    graph.inputs = [Port("x", np.dtype(np.float32), ("N", *INPUT))]
    value = "x"
    for i, (inner, outer, stride) in enumerate(CONVOLUTIONS):
        graph.initializers[f"c{i}.weight"] = _weights(outer, inner, 3, 3)
        graph.initializers[f"c{i}.bias"] = _weights(outer)
        attrs = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [stride, stride]}
        value = graph.emit("Relu", graph.emit("Conv", value, f"c{i}.weight", f"c{i}.bias", attrs=attrs))
    graph.initializers["fc.weight"] = _weights(CLASSES, CONVOLUTIONS[-1][1])
    graph.initializers["fc.bias"] = _weights(CLASSES)
    value = graph.emit("Flatten", graph.emit("GlobalAveragePool", value), attrs={"axis": 1})
    graph.emit("Gemm", value, "fc.weight", "fc.bias", attrs={"transB": 1}, out="logits")
    graph.outputs = [Port("logits", np.dtype(np.float32), ("N", CLASSES))]
    return graph.to_bytes()


def _weights(*shape: int) -> np.ndarray:
    return keyed_generator(0, shape).standard_normal(shape).astype(np.float32)


def points(sizes: tuple[int, ...], name: str) -> list[dict[str, object]]:
    """Widths and batches at which a net is measured."""
    random = keyed_generator(0, "points", name)
    out: list[dict[str, object]] = []
    for i in range(POINTS):
        shares = np.full(len(sizes), 0.5**i) if i < 3 else np.exp(random.uniform(np.log(0.08), 0, len(sizes)))
        # Every other random plan is one of multiples, so that both sides of a board's cliffs are seen alike.
        m = 8 if i >= 3 and i % 2 else 1
        widths = [min(n, max(m, m * round(float(n * s / m)))) for n, s in zip(sizes, shares, strict=True)]
        out.append({"widths": widths, "batch": BATCHES[i % len(BATCHES)]})
    return out


def archive() -> bytes:
    """The nets of `probe_nets.py`, compiled, as one compressed archive."""
    index, files = {}, dict[str, bytes]()
    for name, net in NETS.items():
        model = import_onnx(net(), name)
        index[name] = points(model.architecture.sizes, name)
        files[f"{name}/architecture.json"] = model.architecture.to_json().encode()
        for unit in UNITS:
            files[f"{name}/training-{unit}.onnx"] = nameless(training_graph(model, Features(), unit))
        for i, point in enumerate(index[name]):
            files[f"{name}/inference-{i}.onnx"] = inference_model(model, point["widths"])
    files["index.json"] = json.dumps(index).encode()
    return packed(files)


def nameless(graph: Graph) -> bytes:
    """A graph without the names of its nodes, which nobody reads here and which take a seventh of the archive."""
    model = graph.to_proto()
    for node in model.graph.node:
        node.ClearField("name")
    raw: bytes = model.SerializeToString(deterministic=True)
    return raw


def packed(files: dict[str, bytes]) -> bytes:
    """Files as one compressed archive, the same for the same files."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as out:
        for name in sorted(files):
            about = tarfile.TarInfo(name)
            about.size = len(files[name])
            out.addfile(about, io.BytesIO(files[name]))
    return gzip.compress(raw.getvalue(), 9, mtime=0)


def main(folder: Path = FOLDER) -> None:
    """Compile the net and write its graphs, shapes and costs."""
    model = import_onnx(network(), "probe")
    architecture = model.architecture
    costs = costs_at(architecture, architecture.sizes)
    folder.mkdir(exist_ok=True)
    for unit in UNITS:
        (folder / f"probe_training-{unit}.onnx").write_bytes(training_graph(model, Features(), unit).to_bytes())
    (folder / "probe_inference.onnx").write_bytes(inference_model(model, architecture.sizes))
    body = {
        "batch": BATCH,
        "classes": CLASSES,
        "input_shape": list(INPUT),
        "forward_macs": costs.forward_macs,
        "training_macs": costs.training_macs,
        "tensors": {name: list(shape) for name, shape in architecture.shapes(architecture.sizes).items()},
    }
    (folder / "probe.json").write_text(json.dumps(body) + "\n")
    (folder / "probe_layers.tar.gz").write_bytes(archive())


if __name__ == "__main__":
    main(*[Path(p) for p in sys.argv[1:2]])
