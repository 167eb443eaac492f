"""Writes the probe's reference net among the assets of `fedprune_device`; needs the exporter, which boards don't have.

A small convolutional net in the shape of those that boards train. Its graphs go through the compiler, so that the probe
measures what a round would run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from fedprune.chance import keyed
from fedprune.costs import costs_at
from fedprune.recipe import Features
from fedprune_export.graph import Graph, Port
from fedprune_export.importing import import_onnx
from fedprune_export.inference import inference_model
from fedprune_export.training import training_graph

INPUT, CLASSES, BATCH = (3, 32, 32), 10, 16
CONVOLUTIONS = ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
"""Input channels, output channels, stride."""

FOLDER = Path(__file__).parents[1] / "device_runtime" / "fedprune_device" / "assets"


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


def main(folder: Path = FOLDER) -> None:
    """Compile the net and write its graphs, shapes and costs."""
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


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
