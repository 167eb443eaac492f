"""Random small networks, drawn by Hypothesis: chains, and channels that are mixed in every way."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model

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
            second_value, width = values[draw(st.integers(0, len(values) - 1))]
            if width != channels:
                second_value = conv(second_value, width, channels)
            values.append((graph.emit("Add", value, second_value), channels))
        elif step == "concat":
            second_value, width = values[draw(st.integers(0, len(values) - 1))]
            values.append((graph.emit("Concat", value, second_value, attrs={"axis": 1}), channels + width))
        else:
            kernel = weight(channels, 1, 3, 3)
            values.append((graph.emit("Conv", value, kernel, attrs={"pads": [1] * 4, "group": channels}), channels))
    value, channels = values[-1]
    value = conv(value, channels, 4)
    pooled = graph.emit("MaxPool", value, attrs={"kernel_shape": [2, 2], "strides": [2, 2]})
    flat = graph.emit("Flatten", pooled, attrs={"axis": 1})
    graph.outputs = [Port(graph.emit("Gemm", flat, weight(3, 4 * 9), weight(3), attrs={"transB": 1}), F32, ("N", 3))]
    return import_onnx(graph.to_bytes(), "random")


_WIDE = {"epsilon": 0.01}
"""Of norms: few channels may be nearly constant, and to magnify their rounding errors tells nothing."""

MIXING = ("conv", "grouped", "transposed", "group norm", "layer norm", "instance norm", "halves", "shuffle", "gate",
          "glu", "slice", "every second", "add", "concat", "twice", "heads", "pixels", "sum")  # fmt: skip


@st.composite
def mixing_nets(draw: st.DrawFn) -> Model:
    """A random network of 12 channels whose steps split, shuffle, group and gate them in every way."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    graph = Graph(inputs=[Port("data", F32, ("N", 2, 4, 4))], opset=21)

    def weight(*shape: int) -> str:
        name = f"w{len(graph.initializers)}"
        graph.initializers[name] = (rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)
        return name

    def conv(value: str, before: int, after: int, **attrs: int) -> str:
        inside = before // attrs.get("group", 1)
        return graph.emit("Conv", value, weight(after, inside, 1, 1), weight(after), attrs=dict(attrs))

    def halves(value: str) -> list[str]:
        return graph.emit_many("Split", value, graph.ints(6, 6), outputs=2, attrs={"axis": 1})

    values = [graph.emit("Tanh", conv("data", 2, 12))]
    for step in draw(st.lists(st.sampled_from(MIXING), min_size=1, max_size=7)):
        value = values[draw(st.integers(max(0, len(values) - 3), len(values) - 1))]
        second = values[draw(st.integers(0, len(values) - 1))]
        if step == "conv":
            value = graph.emit("Tanh", conv(value, 12, 12))
        elif step == "grouped":
            value = conv(value, 12, 12, group=draw(st.sampled_from([2, 3, 4, 6, 12])))
        elif step == "transposed":
            groups = draw(st.sampled_from([1, 2, 4, 12]))
            kernel = weight(12, 12 // groups, 1, 1)
            value = graph.emit("ConvTranspose", value, kernel, weight(12), attrs={"group": groups})
        elif step == "group norm":
            groups = draw(st.sampled_from([1, 2, 3, 6, 12]))
            value = graph.emit(
                "GroupNormalization", value, weight(12), weight(12), attrs={"num_groups": groups, **_WIDE}
            )
        elif step == "layer norm":
            last = graph.emit("Transpose", value, attrs={"perm": [0, 2, 3, 1]})
            last = graph.emit("LayerNormalization", last, weight(12), weight(12), attrs=_WIDE)
            value = graph.emit("Transpose", last, attrs={"perm": [0, 3, 1, 2]})
        elif step == "instance norm":
            value = graph.emit("InstanceNormalization", value, weight(12), weight(12), attrs=_WIDE)
        elif step == "halves":
            a, b = halves(value)
            value = graph.emit("Concat", *draw(st.permutations([conv(a, 6, 6), b])), attrs={"axis": 1})
        elif step == "shuffle":
            groups = draw(st.sampled_from([2, 3, 4, 6]))
            rows = graph.emit("Reshape", value, graph.ints(-1, groups, 12 // groups, 4, 4))
            rows = graph.emit("Transpose", rows, attrs={"perm": [0, 2, 1, 3, 4]})
            value = graph.emit("Reshape", rows, graph.ints(-1, 12, 4, 4))
        elif step == "gate":
            value = graph.emit("Mul", value, graph.emit("Sigmoid", conv(second, 12, draw(st.sampled_from([1, 12])))))
        elif step == "glu":
            a, b = halves(value)
            value = conv(graph.emit("Mul", a, graph.emit("Sigmoid", b)), 6, 12)
        elif step == "slice":
            start = draw(st.integers(0, 6))
            some = graph.emit("Slice", value, graph.ints(start), graph.ints(start + 6), graph.ints(1))
            value = graph.emit("Add", conv(some, 6, 12), second)
        elif step == "every second":
            first = draw(st.integers(0, 1))
            some = graph.emit("Slice", value, graph.ints(first), graph.ints(12), graph.ints(1), graph.ints(2))
            value = conv(some, 6, 12)
        elif step == "add":
            value = graph.emit("Add", value, second)
        elif step == "concat":
            value = conv(graph.emit("Concat", value, second, attrs={"axis": 1}), 24, 12)
        elif step == "twice":
            value = conv(graph.emit("Tile", value, graph.ints(1, 2, 1, 1)), 24, 12)
        elif step == "heads":
            heads = draw(st.sampled_from([2, 3, 6]))
            q, k, v = (
                graph.emit("Reshape", conv(value, 12, 12), graph.ints(-1, heads, 12 // heads, 16)) for _ in range(3)
            )
            scores = graph.emit("MatMul", graph.emit("Transpose", q, attrs={"perm": [0, 1, 3, 2]}), k)
            scores = graph.emit("Softmax", scores, attrs={"axis": -1})
            y = graph.emit("MatMul", v, graph.emit("Transpose", scores, attrs={"perm": [0, 1, 3, 2]}))
            value = graph.emit("Reshape", y, graph.ints(-1, 12, 4, 4))
        elif step == "pixels":
            wide = graph.emit(
                "DepthToSpace", value, attrs={"blocksize": 2, "mode": draw(st.sampled_from(["DCR", "CRD"]))}
            )
            value = graph.emit("SpaceToDepth", wide, attrs={"blocksize": 2})
        else:
            total = graph.emit("ReduceSum", value, graph.ints(1), attrs={"keepdims": 1})
            value = graph.emit("Add", value, graph.emit("Tanh", total))
        values.append(value)
    value = conv(values[-1], 12, 5)
    flat = graph.emit("Flatten", graph.emit("Tanh", value), attrs={"axis": 1})
    graph.outputs = [Port(graph.emit("Gemm", flat, weight(3, 5 * 16), weight(3), attrs={"transB": 1}), F32, ("N", 3))]
    prefer = draw(st.sampled_from(["coarse", "fine"]))
    try:
        return import_onnx(graph.to_bytes(opset=21), "mixing", ImportChoices(prefer=prefer))
    except ModelError as error:
        assume("computes something else" not in str(error))  # norms of next to nothing: any rounding shows
        raise
