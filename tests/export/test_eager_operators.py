"""Every operator of the torch trainer computes what onnxruntime computes, alone and mapped over several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedprune.core.errors import ModelError
from fedprune.runtime.session import Session
from fedprune_export.autodiff.tape import RULES
from fedprune_export.eager.context import OPERATORS, Context
from fedprune_export.eager.program import Program
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.training.step_graph import training_graph  # noqa: F401 (registers the gradient rules)

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]
CPU = torch.device("cpu")


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def floats(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def number(value: float) -> Array:
    return np.array(value, np.float32)


MAP, ROWS = (2, 4, 6, 5), (3, 4)
"""Shapes of what is fed: samples come first."""

CORNERS, BOTH = {"coordinate_transformation_mode": "align_corners"}, {"direction": "bidirectional"}
SINGLE = [
    *("Abs", "Asinh", "Atan", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "HardSwish", "Identity", "Neg"),
    *("Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh", "Elu", "Selu", "Celu"),
    *("LeakyRelu", "HardSigmoid", "ThresholdedRelu", "Shrink", "IsNaN", "IsInf", "Reciprocal", "GlobalAveragePool"),
    *("GlobalMaxPool", "GlobalLpPool", "LpNormalization", "Softmax", "LogSoftmax", "Hardmax", "ReduceMean"),
    *("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "MeanVarianceNormalization"),
]
CASES: list[tuple[str, dict[str, Any], Sequence[int], list[Array | None]]] = [
    *((op, {}, MAP, []) for op in SINGLE if not op.startswith(("Reduce", "Mean"))),
    *((op, {"axes": [2, 3], "keepdims": 0}, MAP, []) for op in SINGLE if op.startswith("Reduce") and op != "ReduceSum"),
    ("ReduceSum", {"keepdims": 1}, MAP, [ints(1, -1)]),
    ("ReduceMax", {"axes": [-1]}, MAP, []),
    ("ReduceMin", {"axes": [1], "keepdims": 0}, MAP, []),
    ("ReduceProd", {"axes": [2, 3]}, MAP, []),
    ("ReduceLogSum", {"axes": [2]}, MAP, []),
    ("MeanVarianceNormalization", {"axes": [2, 3]}, MAP, []),
    *((op, {}, MAP, [floats(4, 1, 1)]) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "PRelu")),
    *((op, {}, MAP, [floats(5)]) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    ("Pow", {}, MAP, [number(3)]),
    ("Mod", {"fmod": 1}, MAP, [number(0.7)]),
    ("Acos", {}, MAP, []),
    ("Acosh", {}, MAP, []),
    ("Asin", {}, MAP, []),
    ("Atanh", {}, MAP, []),
    ("Log", {}, MAP, []),
    ("Sqrt", {}, MAP, []),
    ("Clip", {}, MAP, [number(-0.5), number(0.5)]),
    ("Clip", {}, MAP, [None, number(0.5)]),
    ("Cast", {"to": 7}, MAP, []),
    ("CumSum", {"exclusive": 1, "reverse": 1}, MAP, [np.array(2, np.int64)]),
    ("Gemm", {"alpha": 0.5, "beta": 2.0, "transB": 1}, ROWS, [floats(5, 4), floats(5)]),
    ("Gemm", {}, ROWS, [floats(4, 5), floats(5)]),
    ("MatMul", {}, MAP, [floats(5, 3)]),
    ("Einsum", {"equation": "nchw,cd->ndhw"}, MAP, [floats(4, 3)]),
    ("ArgMax", {"axis": 1, "keepdims": 0}, MAP, []),
    ("ArgMin", {"axis": -1, "select_last_index": 1}, MAP, []),
    ("Where", {}, MAP, []),
    ("Reshape", {}, MAP, [ints(0, -1, 5)]),
    ("Flatten", {"axis": 2}, MAP, []),
    ("Squeeze", {}, (2, 1, 3, 1), [ints(1, -1)]),
    ("Unsqueeze", {}, ROWS, [ints(1, -1)]),
    ("Transpose", {"perm": [0, 2, 3, 1]}, MAP, []),
    ("Concat", {"axis": 1}, MAP, [floats(2, 3, 6, 5)]),
    ("Split", {"axis": 2}, MAP, [ints(2, 4)]),
    ("Slice", {}, MAP, [ints(1, -1), ints(4, -100), ints(2, 3), ints(2, -2)]),
    ("Slice", {}, MAP, [ints(-3), ints(2**40), ints(1)]),
    ("Gather", {"axis": 1}, MAP, [np.array([[0, -1], [2, 1]])]),
    ("GatherElements", {"axis": 1}, ROWS, [np.array([[0, -1], [2, 1], [3, 3]])]),
    ("GatherND", {}, MAP, [np.array([[0, 1], [1, -1]])]),
    ("ScatterElements", {"axis": 1}, ROWS, [np.array([[0, -2], [2, 1], [3, 0]]), floats(3, 2)]),
    ("ScatterND", {}, ROWS, [np.array([[0, 1], [2, 3]]), floats(2)]),
    ("TopK", {"axis": 1}, MAP, [ints(2)]),
    ("Expand", {}, (3, 1), [ints(2, 3, 4)]),
    ("Tile", {}, ROWS, [ints(1, 2)]),
    ("Trilu", {"upper": 0}, MAP, [np.array(-1, np.int64)]),
    *(("Pad", {"mode": mode}, MAP, [ints(0, 0, 1, 2, 0, 0, 3, 1)]) for mode in ("constant", "edge", "reflect")),
    ("Pad", {}, MAP, [ints(0, 1, 0, -1, 0, 2, 0, -1), number(0.5)]),
    ("DepthToSpace", {"blocksize": 2}, MAP, []),
    ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, MAP, []),
    ("SpaceToDepth", {"blocksize": 2}, (2, 3, 4, 6), []),
    ("Conv", {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": 2}, MAP, [floats(6, 2, 3, 2), floats(6)]),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2]}, (2, 4, 9), [floats(3, 4, 4)]),
    ("Conv", {"dilations": [2, 2, 1]}, (1, 2, 6, 5, 4), [floats(3, 2, 3, 2, 2)]),
    ("ConvTranspose", {"strides": [2, 2], "pads": [0, 1, 1, 0], "group": 2}, MAP, [floats(4, 3, 3, 2), floats(6)]),
    ("ConvTranspose", {"strides": [3], "output_padding": [1]}, (2, 4, 5), [floats(4, 2, 3)]),
    ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 0, 0, 1]}, MAP, []),
    ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 1], "auto_pad": "VALID"}, MAP, []),
    ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}, MAP, []),
    ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "count_include_pad": 1}, MAP, []),
    ("LpPool", {"kernel_shape": [2, 2], "strides": [2, 2], "p": 3}, MAP, []),
    ("Resize", {"mode": "nearest"}, MAP, [None, np.array([1, 1, 2, 2], np.float32)]),
    ("Resize", {"mode": "linear"}, MAP, [None, None, ints(2, 4, 9, 7)]),
    ("Resize", {"mode": "cubic", **CORNERS}, MAP, [None, None, ints(2, 4, 9, 7)]),
    ("BatchNormalization", {"epsilon": 0.1}, MAP, [floats(4), floats(4), floats(4), floats(4) ** 2]),
    ("InstanceNormalization", {}, MAP, [floats(4), floats(4)]),
    ("LayerNormalization", {"axis": -2}, MAP, [floats(6, 5), floats(6, 5)]),
    ("LRN", {"size": 3, "alpha": 0.1, "bias": 2.0}, MAP, []),
    *(
        (op, {"hidden_size": 3, **BOTH, **more}, (5, 2, 4), [floats(2, g * 3, 4), floats(2, g * 3, 3), bias])
        for op, g, more in (("LSTM", 4, {}), ("GRU", 3, {"linear_before_reset": 1}), ("GRU", 3, {}), ("RNN", 1, {}))
        for bias in (floats(2, 2 * g * 3), None)
    ),
    ("LSTM", {"hidden_size": 3, "direction": "reverse"}, (5, 2, 4), [floats(1, 12, 4), floats(1, 12, 3)]),
]
DOMAINS = {"Acosh": (1.1, 3.0), "Log": (0.1, 2.0), "Sqrt": (0.1, 2.0), "ReduceLogSum": (0.1, 2.0)}
UNIT = ("Acos", "Asin", "Atanh")
WRITTEN_OTHERWISE = {"Gelu", "GroupNormalization", "Mish", "RMSNormalization"}
"""Operators that opset 17 lacks: `test_eager_training` has them in whole networks."""


def _graph(op: str, attrs: dict[str, Any], shape: Sequence[int], others: list[Array | None]) -> Graph:
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), tuple(shape))])
    names = ["x"]
    if op == "Where":
        others = [np.ones(1, np.bool_), floats(1)]
    for i, other in enumerate(others):
        names.append("" if other is None else f"c{i}")
        if other is not None:
            graph.initializers[f"c{i}"] = other
    if op == "Where":
        names = ["c0", "x", "c1"]
    if op in ("LSTM", "GRU", "RNN"):
        names = [n for n in names if n]
    outputs = {"Split": 2, "TopK": 2, "LSTM": 3, "GRU": 2, "RNN": 2}.get(op, 1)
    graph.nodes = [Node(op, names, [f"y{i}" for i in range(outputs)], attrs, "node")]
    graph.outputs = [Port(f"y{i}", np.dtype(np.float32), (None,)) for i in range(outputs)]
    return graph


def _samples(op: str, shape: Sequence[int]) -> Array:
    low, high = DOMAINS.get(op, (-0.95, 0.95) if op in UNIT else (-2.5, 2.5))
    return np.random.default_rng(3).uniform(low, high, (2, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "attrs", "shape", "others"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_an_operator_gives_what_onnxruntime_gives(
    op: str, attrs: dict[str, Any], shape: Sequence[int], others: list[Array | None]
) -> None:
    graph = _graph(op, attrs, shape, others)
    proto = graph.as_held()
    del proto.graph.output[:]
    proto.graph.output.extend([type(proto.graph.input[0])(name=f"y{i}") for i in range(len(graph.nodes[0].outputs))])
    session = Session(proto.SerializeToString())
    run, program = Context(statistics=frozenset(graph.nodes[0].inputs[3:5])), Program(graph, [], CPU)
    samples = _samples(op, shape)
    mapped = torch.func.vmap(lambda x: program({}, x, run))(torch.from_numpy(samples))
    for i, x in enumerate(samples):
        expected = session.run({"x": x}, ["y0"])["y0"]
        got = program({}, torch.from_numpy(x), run).numpy()
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(mapped[i].numpy(), expected, rtol=2e-5, atol=2e-6)


def test_arithmetic_of_shapes_truths_and_indices() -> None:
    graph = Graph(inputs=[Port("x", np.dtype(np.int64), (2, 3))])
    graph.initializers = {"depth": ints(5), "values": np.array([0, 1], np.float32), "zero": number(0)}
    shape = graph.emit("Shape", "x")
    filled = graph.emit("ConstantOfShape", shape, attrs={"value": np.array([2.0], np.float32)})
    hot = graph.emit("OneHot", "x", "depth", "values", attrs={"axis": 1})
    count = graph.emit("Cast", graph.emit("Size", "x"), attrs={"to": 1})
    size = graph.emit("Gather", shape, graph.constant(1, np.int64))
    steps = graph.emit("Range", graph.constant(0, np.int64), size, graph.constant(1, np.int64))
    total = graph.emit("Add", filled, graph.emit("Cast", steps, attrs={"to": 1}))
    both = graph.emit("Xor", graph.emit("Greater", total, graph.scalar(2.5)), graph.emit("Less", total, count))
    odd = graph.emit("Or", graph.emit("Not", both), graph.emit("And", both, both))
    kept = graph.emit("Where", odd, total, "zero")
    out = graph.emit("Add", graph.emit("Unsqueeze", kept, graph.ints(1)), hot, out="y")
    graph.outputs = [Port(out, np.dtype(np.float32), (2, 5, 3))]
    x = np.array([[0, -1, 4], [2, 2, 1]], np.int64)
    expected = Session(graph.to_bytes()).run({"x": x})["y"]
    got = Program(graph, [], CPU)({}, torch.from_numpy(x), Context())
    np.testing.assert_allclose(got.numpy(), expected)


def test_every_operator_that_trains_is_known_or_named() -> None:
    """Whoever adds a gradient rule adds the operator here, or says that the torch trainer lacks it."""
    assert set(RULES) - set(OPERATORS) == set()
    used = {case[0] for case in CASES} | WRITTEN_OTHERWISE | {"Dropout"}
    logical = {"Shape", "Size", "ConstantOfShape", "Range", "OneHot", "Xor", "Or", "And", "Not"}
    assert set(OPERATORS) <= used | logical


def test_an_operator_that_is_not_known_is_named() -> None:
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), (2, 3))])
    graph.outputs = [Port(graph.emit("NonZero", "x", out="y"), np.dtype(np.int64), (None,))]
    with pytest.raises(ModelError, match="NonZero"):
        Program(graph, [], CPU)


def test_a_use_that_is_not_known_is_named() -> None:
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), (2, 3, 4))])
    graph.initializers = {"i": np.array([[0], [1]])}
    graph.emit("GatherND", "x", "i", attrs={"batch_dims": 1}, out="y")
    graph.outputs = [Port("y", np.dtype(np.float32), (2,))]
    with pytest.raises(ModelError, match=r"GatherND.*batch_dims"):
        Program(graph, [], CPU)({}, torch.zeros(2, 3, 4), Context())
