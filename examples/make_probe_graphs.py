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
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.rng import keyed
from fedprune.model.recipe import Features
from fedprune.planning.costs import costs_at
from fedprune.planning.kernel_workload import BLOCKS
from fedprune.runtime import blocks
from fedprune_export.bundles.inference import inference_model
from fedprune_export.formulation import Forms, formulated
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.training.step_graph import training_graph

sys.path.insert(0, str(Path(__file__).parent))
from probe_forms import BATCH as FORM_BATCH
from probe_forms import SHAPES, graphs
from probe_nets import NETS

POINTS = 15
"""Widths at which each net is measured: whole, a half, a quarter, then random ones."""

BATCHES = (16, 16, 4, 8, 16)

INPUT, CLASSES, BATCH = (3, 32, 32), 10, 16
CONVOLUTIONS = ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
"""Input channels, output channels, stride."""

ROOT = Path(__file__).parents[1]
FOLDER, CHECKS = ROOT / "device_runtime/fedprune_device/assets", ROOT / "toolkit/fedprune/assets"
"""Where the probe's graphs lie, and those that find the length of blocks."""


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
    return keyed(0, shape).standard_normal(shape).astype(np.float32)


def points(sizes: tuple[int, ...], name: str) -> list[dict[str, object]]:
    """Widths and batches at which a net is measured."""
    random = keyed(0, "points", name)
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
        files[f"{name}/training.onnx"] = training_graph(model, Features()).to_bytes()
        for i, point in enumerate(index[name]):
            files[f"{name}/inference-{i}.onnx"] = inference_model(model, point["widths"])
    files["index.json"] = json.dumps(index).encode()
    return packed(files)


def forms() -> bytes:
    """The graphs of `probe_forms.py`, with standard operators and with blocks of every length, as one archive."""
    files = dict[str, bytes]()
    rows: list[dict[str, Any]] = []
    for number, shape in enumerate(SHAPES):
        rows.append({"shape": [*astuple(shape)[:-1], int(shape.depthwise)], "graphs": dict[str, list[str]]()})
        for block in (0, *BLOCKS[1:]):
            found = {name: graph.to_bytes() for name, graph in graphs(shape, block)}
            rows[-1]["graphs"][str(block)] = list(found)
            files |= {f"{number}/{block}/{name}.onnx": raw for name, raw in found.items()}
    files["index.json"] = json.dumps({"batch": FORM_BATCH, "shapes": rows}).encode()
    return packed(files)


def packed(files: dict[str, bytes]) -> bytes:
    """Files as one compressed archive, the same for the same files."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as out:
        for name in sorted(files):
            about = tarfile.TarInfo(name)
            about.size = len(files[name])
            out.addfile(about, io.BytesIO(files[name]))
    return gzip.compress(raw.getvalue(), 9, mtime=0)


def check_of_blocks(block: int) -> bytes:
    """A convolution of 3×3 in plain layout and in blocks, as `fedprune.runtime.blocks` compares them."""
    shapes = {blocks.X: ("N", blocks.CHANNELS, blocks.PLACES, blocks.PLACES), blocks.W: (blocks.CHANNELS,) * 2 + (3, 3)}
    ports = [Port(n, np.dtype(np.float32), s) for n, s in shapes.items()]
    result = Port(blocks.IN_BLOCKS, np.dtype(np.float32), shapes[blocks.X])
    graph = Graph(ports, [result], name="blocks")
    attrs = {"kernel_shape": [3, 3], "strides": [1, 1], "dilations": [1, 1], "pads": [1] * 4, "group": 1}
    graph.emit("Conv", blocks.X, blocks.W, attrs=attrs, out=blocks.IN_BLOCKS)
    out = formulated(graph, {**shapes, blocks.IN_BLOCKS: shapes[blocks.X]}, Forms(block, blocks.SAMPLES))
    out.emit("Conv", blocks.X, blocks.W, attrs=attrs, out=blocks.PLAIN)
    out.outputs.append(Port(blocks.PLAIN, np.dtype(np.float32), shapes[blocks.X]))
    return out.to_bytes()


def main(folder: Path = FOLDER, checks: Path = CHECKS) -> None:
    """Compile the net and write its graphs, shapes and costs; and the checks of blocks."""
    model = import_onnx(network(), "probe")
    architecture = model.architecture
    costs = costs_at(architecture, architecture.sizes)
    folder.mkdir(exist_ok=True)
    (folder / "probe_training.onnx").write_bytes(training_graph(model, Features()).to_bytes())
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
    (folder / "probe_forms.tar.gz").write_bytes(forms())
    for block in BLOCKS[1:]:
        (checks / blocks.file_name(block)).write_bytes(check_of_blocks(block))


if __name__ == "__main__":
    main(*2 * [Path(p) for p in sys.argv[1:2]])
