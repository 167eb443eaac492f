"""Write the demo's model: a small convolutional network for 8×8 digits, with random weights, as ONNX.

    python examples/make_digits_model.py digits_net.onnx

It needs the `onnx` package only. The same seed gives the same bytes. `--shape 1,28,28` writes a net for larger images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = (32, 64, 128)
CLASSES = 10
SCALE = 0.5
"""Share of He's scale. Batch normalisation undoes it for channels that some device trains; those that no device is wide
enough to hold stay quiet in the global model."""


def digits_net(seed: int = 0, shape: tuple[int, ...] = (1, 8, 8)) -> onnx.ModelProto:
    """Three convolutions with batch normalisation, pooling after the second, mean over the map, one linear layer."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}

    def add(op: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [f"v{len(nodes)}"], f"{op.lower()}{len(nodes)}", **attributes))
        return nodes[-1].output[0]

    value, before = "x", shape[0]
    for number, after in enumerate(CHANNELS, 1):
        kernel = SCALE * rng.standard_normal((after, before, 3, 3)) * np.sqrt(2 / (before * 9))  # He et al. 2015
        weights[f"conv{number}.weight"] = kernel
        weights[f"bn{number}.weight"] = np.ones(after)
        weights[f"bn{number}.bias"] = np.zeros(after)
        weights[f"bn{number}.running_mean"] = np.zeros(after)
        weights[f"bn{number}.running_var"] = np.ones(after)
        value = add("Conv", value, f"conv{number}.weight", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        norm = (f"bn{number}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
        value = add("Relu", add("BatchNormalization", value, *norm, epsilon=1e-5))
        if number == 2:
            value = add("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])
        before = after
    weights["fc.weight"] = SCALE * rng.standard_normal((CLASSES, before)) * np.sqrt(1 / before)
    weights["fc.bias"] = np.zeros(CLASSES)
    value = add("Flatten", add("GlobalAveragePool", value), axis=1)
    nodes.append(helper.make_node("Gemm", [value, "fc.weight", "fc.bias"], ["logits"], "fc", transB=1))
    graph = helper.make_graph(
        nodes,
        "digits-net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="fedprune"
    )
    onnx.checker.check_model(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's digits model as ONNX.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), default=(1, 8, 8))
    arguments = parser.parse_args()
    arguments.file.write_bytes(digits_net(arguments.seed, arguments.shape).SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
