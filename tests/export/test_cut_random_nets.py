"""Random small networks: chains with residual additions, concatenations and flattening, cut anywhere."""

from __future__ import annotations

import numpy as np
from cutting import cut_error, random_selection
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_export.graph import Graph, Port
from fedprune_export.imported import Model
from fedprune_export.importing import import_onnx

F32 = np.dtype(np.float32)


@st.composite
def nets(draw: st.DrawFn) -> Model:
    """A random network on 6×6 maps; every step reads values that earlier steps made."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    graph = Graph(inputs=[Port("data", F32, ("N", 2, 6, 6))])
    values: list[tuple[str, int]] = [("data", 2)]

    def weight(*shape: int) -> str:
        name = f"w{len(graph.initializers)}"
        scale = np.sqrt(2 / max(int(np.prod(shape[1:])), 1))
        graph.initializers[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
        return name

    def conv(value: str, before: int, after: int) -> str:
        return graph.emit("Conv", value, weight(after, before, 3, 3), weight(after), attrs={"pads": [1] * 4})

    for step in draw(
        st.lists(st.sampled_from(["conv", "norm", "relu", "add", "concat", "depth"]), min_size=2, max_size=8)
    ):
        value, channels = values[draw(st.integers(max(0, len(values) - 3), len(values) - 1))]
        if step == "conv":
            after = draw(st.integers(1, 6))
            values.append((conv(value, channels, after), after))
        elif step == "norm":
            vectors = [weight(channels), weight(channels), weight(channels), weight(channels)]
            graph.initializers[vectors[3]] = np.abs(graph.initializers[vectors[3]]) + np.float32(0.5)
            values.append((graph.emit("BatchNormalization", value, *vectors), channels))
        elif step == "relu":
            values.append((graph.emit("Relu", value), channels))
        elif step == "add":
            other, width = values[draw(st.integers(0, len(values) - 1))]
            if width != channels:
                other = conv(other, width, channels)
            values.append((graph.emit("Add", value, other), channels))
        elif step == "concat":
            other, width = values[draw(st.integers(0, len(values) - 1))]
            values.append((graph.emit("Concat", value, other, attrs={"axis": 1}), channels + width))
        else:
            kernel = weight(channels, 1, 3, 3)
            attrs = {"pads": [1] * 4, "group": channels}
            values.append((graph.emit("Conv", value, kernel, attrs=attrs), channels))
    value, channels = values[-1]
    value = conv(value, channels, 4)
    pooled = graph.emit("MaxPool", value, attrs={"kernel_shape": [2, 2], "strides": [2, 2]})
    flat = graph.emit("Flatten", pooled, attrs={"axis": 1})
    out = graph.emit("Gemm", flat, weight(3, 4 * 9), weight(3), attrs={"transB": 1})
    graph.outputs = [Port(out, F32, ("N", 3))]
    return import_onnx(graph.to_bytes(), "random")


@settings(max_examples=60, deadline=None)
@given(model=nets(), density=st.sampled_from([0.01, 0.3, 0.5, 0.8]), seed=st.integers(0, 99))
def test_cut_equals_masked(model: Model, density: float, seed: int) -> None:
    assert model.architecture.groups
    assert cut_error(model, random_selection(model, density, seed), batch=4) < 1e-5
