"""Ways to damage a model: in its bytes, in its structure, or gently, so that the standard still allows it."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Rng = np.random.Generator

EXTREMES = (0, -1, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
TYPES = (0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 17, 22, 23, 999)


_REFUSED = (ValueError, TypeError, IndexError, onnx.checker.ValidationError)
"""What protobuf raises at changes that no file can hold."""


def damage_model(raw: bytes, rng: Rng) -> bytes:
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
    items = _any([proto.graph.node, proto.graph.initializer, proto.graph.input, proto.graph.output], rng)
    if len(items):
        del items[rng.integers(len(items))]


def _repeat(proto: onnx.ModelProto, rng: Rng) -> None:
    items = _any([proto.graph.node, proto.graph.initializer, proto.graph.output], rng)
    if len(items):
        items.add().CopyFrom(items[rng.integers(len(items))])


def _swap(proto: onnx.ModelProto, rng: Rng) -> None:
    a, b = (int(rng.integers(len(proto.graph.node))) for _ in "ab")
    spare = onnx.NodeProto()
    spare.CopyFrom(proto.graph.node[a])
    proto.graph.node[a].CopyFrom(proto.graph.node[b])
    proto.graph.node[b].CopyFrom(spare)


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
    tensor = _any([*proto.graph.input, *proto.graph.output], rng).type.tensor_type
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
    node = helper.make_node(_any(_OPERATORS, rng), [n.input[0], *extra], [fresh])
    n.input[0] = fresh
    rest = [onnx.NodeProto() for _ in proto.graph.node]
    for copy, old in zip(rest, proto.graph.node, strict=True):
        copy.CopyFrom(old)
    del proto.graph.node[:]
    proto.graph.node.extend([*rest[:at], node, *rest[at:]])


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
