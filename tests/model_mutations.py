"""Small sound models of every kind, and ways to damage them: what the importer's fuzzer feeds on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Rng = np.random.Generator
Nodes = list[onnx.NodeProto]
Tensors = dict[str, np.ndarray[Any, Any]]

EXTREMES = (0, -1, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
TYPES = (0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 17, 22, 23, 999)


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
    function = _model(
        [first, node("Swish", ["h"], ["r"], domain="own"), last],
        square,
        (6,),
        functions=[swish],
    )
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


_REFUSED = (ValueError, TypeError, IndexError, onnx.checker.ValidationError)
"""What protobuf raises at changes that no file can hold."""


def damaged(raw: bytes, rng: Rng) -> bytes:
    """A model with a few things changed: bytes of its file, or parts of its structure."""
    if rng.random() < 0.3:
        return _bytes(bytearray(raw), rng)
    proto = onnx.load_model_from_string(raw)
    for _ in range(int(rng.integers(1, 4))):
        with contextlib.suppress(
            ValueError, TypeError, IndexError, onnx.checker.ValidationError
        ):  # protobuf refuses it
            _STRUCTURAL[rng.integers(len(_STRUCTURAL))](proto, rng)
    out: bytes = proto.SerializeToString()
    return out


def _bytes(data: bytearray, rng: Rng) -> bytes:
    for _ in range(int(rng.integers(1, 5))):
        at, kind = int(rng.integers(len(data))), rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8))
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        else:
            data[at : at + 1] = b"\xff\xff\xff\xff\x7f"
        if not data:
            return b""
    return bytes(data)


def _any(items: Any, rng: Rng) -> Any:
    items = list(items)
    return items[rng.integers(len(items))] if items else None


def _names(proto: onnx.ModelProto) -> list[str]:
    out = [t.name for t in proto.graph.initializer] + [i.name for i in proto.graph.input]
    return out + [o for n in proto.graph.node for o in n.output]


def _rewire(proto: onnx.ModelProto, rng: Rng) -> None:
    n = _any(proto.graph.node, rng)
    if n is not None and n.input:
        n.input[rng.integers(len(n.input))] = _any([*_names(proto), "", "nothing"], rng)


def _rename(proto: onnx.ModelProto, rng: Rng) -> None:
    n = _any(proto.graph.node, rng)
    if n is not None and n.output:
        n.output[rng.integers(len(n.output))] = _any(["", "x" * 5000, "ü~9", "const~1", "lr", *_names(proto)], rng)


def _drop(proto: onnx.ModelProto, rng: Rng) -> None:
    part = _any([proto.graph.node, proto.graph.initializer, proto.graph.input, proto.graph.output], rng)
    if len(part):
        del part[rng.integers(len(part))]


def _repeat(proto: onnx.ModelProto, rng: Rng) -> None:
    part = _any([proto.graph.node, proto.graph.initializer, proto.graph.output], rng)
    if len(part):
        part.add().CopyFrom(part[rng.integers(len(part))])


def _swap(proto: onnx.ModelProto, rng: Rng) -> None:
    a, b = (int(rng.integers(len(proto.graph.node))) for _ in "ab")
    held = onnx.NodeProto()
    held.CopyFrom(proto.graph.node[a])
    proto.graph.node[a].CopyFrom(proto.graph.node[b])
    proto.graph.node[b].CopyFrom(held)


def _operator(proto: onnx.ModelProto, rng: Rng) -> None:
    n = _any(proto.graph.node, rng)
    n.op_type = _any(_OPERATORS, rng)
    if rng.random() < 0.2:
        n.domain = _any(["", "ai.onnx", "com.microsoft", "own"], rng)


def _attribute(proto: onnx.ModelProto, rng: Rng) -> None:
    a = _any([a for n in proto.graph.node for a in n.attribute], rng)
    if a is None:
        return
    kind = rng.integers(6)
    if kind == 0:
        a.i = int(_any(EXTREMES, rng))
    elif kind == 1 and len(a.ints):
        a.ints[rng.integers(len(a.ints))] = int(_any(EXTREMES, rng))
    elif kind == 2:
        a.type = int(rng.integers(0, 15))
    elif kind == 3:
        a.f = float(_any([np.nan, np.inf, -1.0, 0.0, 1e30], rng))
    elif kind == 4:
        a.s = bytes(rng.integers(0, 256, 3, np.uint8))
    else:
        del a.ints[:]


def _new_attribute(proto: onnx.ModelProto, rng: Rng) -> None:
    n = _any(proto.graph.node, rng)
    name = _any(["axis", "axes", "perm", "name", "keepdims", "num_groups", "value", "to", "group", "op_type"], rng)
    n.attribute.append(helper.make_attribute(name, _any([1, -1, 2**40, [0, 1], [2**33], 0.5, "x"], rng)))


def _dims(proto: onnx.ModelProto, rng: Rng) -> None:
    t = _any(proto.graph.initializer, rng)
    if t is None:
        return
    if t.dims and rng.random() < 0.7:
        t.dims[rng.integers(len(t.dims))] = int(_any(EXTREMES, rng))
    else:
        t.dims.append(int(_any(EXTREMES, rng)))


def _type(proto: onnx.ModelProto, rng: Rng) -> None:
    if (t := _any(proto.graph.initializer, rng)) is not None:
        t.data_type = int(_any(TYPES, rng))


def _numbers(proto: onnx.ModelProto, rng: Rng) -> None:
    """Other values of a tensor of the same size."""
    t = _any(proto.graph.initializer, rng)
    if t is None:
        return
    array = np.array(numpy_helper.to_array(t))
    if array.dtype.kind == "i" and array.size:
        array.reshape(-1)[rng.integers(array.size)] = _any(EXTREMES, rng)
    elif array.dtype.kind == "f" and array.size:
        array.reshape(-1)[rng.integers(array.size)] = _any([np.nan, np.inf, -np.inf, 1e38, 0], rng)
    t.CopyFrom(numpy_helper.from_array(array, t.name))


def _port(proto: onnx.ModelProto, rng: Rng) -> None:
    value = _any([*proto.graph.input, *proto.graph.output], rng)
    tensor = value.type.tensor_type
    kind = rng.integers(3)
    if kind == 0:
        tensor.elem_type = int(_any(TYPES, rng))
    elif kind == 1 and tensor.shape.dim:
        tensor.shape.dim[rng.integers(len(tensor.shape.dim))].dim_value = int(_any(EXTREMES, rng))
    else:
        tensor.shape.dim.add().dim_param = "M"


def _opset(proto: onnx.ModelProto, rng: Rng) -> None:
    if proto.opset_import:
        proto.opset_import[0].version = int(_any([0, 1, 7, 9, 11, 13, 15, 18, 20, 21, 22, 23, 24, 99, 2**40], rng))


def _outside(proto: onnx.ModelProto, rng: Rng) -> None:
    if (t := _any(proto.graph.initializer, rng)) is not None:
        t.data_location = TensorProto.EXTERNAL
        t.external_data.add(key="location", value=_any(["../w", "/etc/hostname", "", "w.bin"], rng))


def _insert(proto: onnx.ModelProto, rng: Rng) -> None:
    """A new operator between two others."""
    at = int(rng.integers(len(proto.graph.node)))
    n = proto.graph.node[at]
    if not n.input:
        return
    extra = _any([[], ["zero"], [_any(_names(proto), rng)], ["", ""]], rng)
    fresh = f"new{at}"
    made = helper.make_node(_any(_OPERATORS, rng), [n.input[0], *extra], [fresh])
    n.input[0] = fresh
    rest = [onnx.NodeProto() for _ in proto.graph.node]
    for copy, old in zip(rest, proto.graph.node, strict=True):
        copy.CopyFrom(old)
    del proto.graph.node[:]
    proto.graph.node.extend([*rest[:at], made, *rest[at:]])


_Change = Callable[[onnx.ModelProto, Rng], None]
_STRUCTURAL: tuple[_Change, ...] = (
    _rewire,
    _rewire,
    _rename,
    _drop,
    _repeat,
    _swap,
    _operator,
    _operator,
    _attribute,
    _attribute,
    _new_attribute,
    _dims,
    _type,
    _numbers,
    _numbers,
    _port,
    _opset,
    _outside,
    _insert,
    _insert,
)
_OPERATORS = tuple(
    sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""} | {"NoSuchOperator", "FusedConv"})
)
