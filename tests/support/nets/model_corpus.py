"""Small sound models of every kind, of which the importer's fuzzer makes damaged ones."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Nodes = list[onnx.NodeProto]
Tensors = dict[str, np.ndarray[Any, Any]]


def _values(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def _model(
    nodes: Nodes,
    tensors: Tensors,
    shape: tuple[int, ...],
    *,
    opset: int = 17,
    out: int = 2,
    dtype: int = TensorProto.FLOAT,
    functions: list[onnx.FunctionProto] | None = None,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["N", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", out])],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("own", 1)] if functions else [])
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions or [])
    raw: bytes = proto.SerializeToString()
    return raw


node = helper.make_node


def corpus() -> dict[str, bytes]:
    """Models by name, all of which can be imported."""
    first, last = node("Gemm", ["x", "a"], ["h"]), node("Gemm", ["r", "b"], ["y"])
    square: Tensors = {"a": _values(6, 4), "b": _values(4, 2)}
    mlp = _model([first, node("Relu", ["h"], ["r"]), last], square, (6,))
    norms: Tensors = {f"n{i}": np.abs(_values(4)) + 0.5 for i in range(4)}
    conv = _model(
        [
            node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
            node("BatchNormalization", ["c", *norms], ["n"], epsilon=1e-5),
            node("Relu", ["n"], ["r"]),
            node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            node("GlobalAveragePool", ["p"], ["g"]),
            node("Shape", ["g"], ["s"]),
            node("Gather", ["s", "zero"], ["d"], axis=0),
            node("Concat", ["d", "rest"], ["t"], axis=0),
            node("Reshape", ["g", "t"], ["f"]),
            node("Gemm", ["f", "b"], ["y"]),
        ],
        {"k": _values(4, 3, 3, 3), **norms, "zero": _ints(0), "rest": _ints(-1), "b": _values(4, 2)},
        (3, 8, 8),
    )
    attention = _model(
        [
            *(node("MatMul", ["x", f"w{i}"], [i]) for i in "qkv"),
            node("Attention", ["q", "k", "v"], ["a"], q_num_heads=2, kv_num_heads=2, is_causal=1),
            node("LayerNormalization", ["a", "s", "b"], ["n"], axis=2),
            node("Gelu", ["n"], ["e"]),
            node("ReduceMean", ["e", "axes"], ["m"], keepdims=0),
            node("Gemm", ["m", "o"], ["y"]),
        ],
        {
            **{f"w{i}": _values(8, 8) for i in "qkv"},
            "s": _values(8),
            "b": _values(8),
            "axes": _ints(1),
            "o": _values(8, 2),
        },
        (5, 8),
        opset=23,
    )
    sequence = _model(
        [
            node("SplitToSequence", ["x", "size"], ["seq"], axis=1),
            node("SequenceAt", ["seq", "one"], ["p"]),
            node("SequenceAt", ["seq", "zero"], ["q"]),
            node("SequenceConstruct", ["p", "q"], ["both"]),
            node("ConcatFromSequence", ["both"], ["c"], axis=1),
            node("Gemm", ["c", "w"], ["y"]),
        ],
        {
            "size": np.array(3, np.int64),
            "one": np.array(1, np.int64),
            "zero": np.array(0, np.int64),
            "w": _values(6, 2),
        },
        (6,),
        opset=18,
    )
    embedding = _model(
        [
            node("Gather", ["table", "x"], ["e"]),
            node("Transpose", ["e"], ["t"], perm=[1, 0, 2]),
            node("LSTM", ["t", "w", "r", "b"], ["", "h"], hidden_size=4),
            node("Squeeze", ["h", "zero"], ["l"]),
            node("Gemm", ["l", "o"], ["y"]),
        ],
        {
            "table": _values(9, 3),
            "w": _values(1, 16, 3),
            "r": _values(1, 16, 4),
            "b": _values(1, 32),
            "zero": _ints(0),
            "o": _values(4, 2),
        },
        (5,),
        dtype=TensorProto.INT64,
    )
    branch = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Tanh")):
        inner = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 6])
        branch[name] = helper.make_graph([node(op, ["x"], ["z"])], op, [], [inner])
    choice = _model(
        [node("If", ["yes"], ["h"], **branch), node("Gemm", ["h", "w"], ["y"])],
        {"yes": np.array(True), "w": _values(6, 2)},
        (6,),
    )
    swish = helper.make_function(
        "own", "Swish", ["a"], ["b"],
        [node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["b"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    function = _model([first, node("Swish", ["h"], ["r"], domain="own"), last], square, (6,), functions=[swish])
    shapes = _model(
        [
            node("Resize", ["x", "", "scales"], ["u"], mode="nearest"),
            node("Pad", ["u", "pads"], ["p"], mode="reflect"),
            node("Slice", ["p", "starts", "ends", "axes"], ["s"]),
            node("Split", ["s", "parts"], ["a", "b"], axis=1),
            node("Concat", ["b", "a"], ["c"], axis=1),
            node("ReduceMean", ["c"], ["m"], axes=[2, 3], keepdims=0),
            node("ConstantOfShape", ["two"], ["z"], value=numpy_helper.from_array(np.ones(1, np.float32))),
            node("Range", ["i0", "i4", "i1"], ["i"]),
            node("Cast", ["i"], ["f"], to=1),
            node("Add", ["m", "f"], ["h"]),
            node("Mul", ["h", "z"], ["k"]),
            node("MatMul", ["k", "w"], ["y"]),
        ],
        {
            "scales": np.array([1, 1, 2, 2], np.float32),
            "pads": _ints(0, 0, 1, 1, 0, 0, 1, 1),
            "starts": _ints(1),
            "ends": _ints(2**40),
            "axes": _ints(2),
            "parts": _ints(1, 3),
            "two": _ints(1, 4),
            "i0": np.array(0, np.int64),
            "i1": np.array(1, np.int64),
            "i4": np.array(4, np.int64),
            "w": _values(4, 2),
        },
        (4, 5, 5),
    )
    half = [node("Sqrt", ["e"], ["d"]), node("Div", ["c", "d"], ["n"]), node("Mul", ["n", "s"], ["g"])]
    norm = _model(
        [
            node("ReduceMean", ["x"], ["m"], axes=[-1], keepdims=1),
            node("Sub", ["x", "m"], ["c"]),
            node("Mul", ["c", "c"], ["q"]),
            node("ReduceMean", ["q"], ["v"], axes=[-1], keepdims=1),
            node("Add", ["v", "eps"], ["e"]),
            *half,
            node("Gemm", ["g", "w"], ["y"]),
        ],
        {"eps": np.array(1e-5, np.float32), "s": _values(6), "w": _values(6, 2)},
        (6,),
        opset=13,
    )
    return {
        "mlp": mlp,
        "conv": conv,
        "attention": attention,
        "sequence": sequence,
        "embedding": embedding,
        "choice": choice,
        "function": function,
        "shapes": shapes,
        "norm": norm,
    }
