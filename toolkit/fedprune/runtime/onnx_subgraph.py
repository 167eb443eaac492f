"""The subgraph of a compiled graph that some of its outputs need.

onnxruntime runs a whole graph however few of its outputs are requested (its option to run only what leads to them does
nothing in the builds that boards have). A board measures batch-norm statistics and validation losses with the forward
pass alone, so the graph is cut before it is loaded. ONNX files are protocol buffers. Boards have no onnx package, so
this module reads the few fields that the cut needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from fedprune.core.errors import ModelError

# Wire types of protocol buffers. Groups (3 and 4) are obsolete, and no ONNX file has them.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Numbers of fields, by the message that has them.
_GRAPH, _METADATA = 7, 14  # ModelProto
_KEY, _VALUE = 1, 2  # StringStringEntryProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13  # GraphProto
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE = 1, 2, 5  # NodeProto
_ATTRIBUTE_GRAPHS = (6, 11)  # AttributeProto: the bodies of loops and branches
_NAME = 1  # ValueInfoProto
_TENSOR_NAME = 8  # TensorProto
_TYPE, _TENSOR_TYPE, _ELEMENT_TYPE = 2, 1, 1  # ValueInfoProto, TypeProto and its tensor type
# The element type float32.
_FLOAT32 = 1

# Levels of loops and branches within each other: a limit for the recursion. Exporters write two or three.
_MAX_DEPTH = 32


def subgraph_for(model: bytes, outputs: Collection[str], given_values: Collection[str] = ()) -> bytes:
    """The graph (without external data) with only these outputs, and the inputs, constants and operators that they
    need. `given_values` are float32 values that become inputs instead of being computed. Raises `ModelError` if it is
    not an ONNX file, or has no such output or value."""

    def cut(graph: bytes) -> bytes:
        return _cut_graph(graph, set(outputs), frozenset(given_values))

    try:
        fields = list(_decode_fields(model))
        return b"".join(_encode_field(n, k, cut(v) if (n, k) == (_GRAPH, _BYTES) else v) for n, k, v in fields)
    except (IndexError, ValueError) as error:
        raise _unreadable(error) from error


class Subgraphs:
    """The subgraphs of one graph, each of which is cut once. A board needs the same three or four in every round, and
    each cut reads the whole graph."""

    def __init__(self) -> None:
        self._subgraphs = dict[tuple[frozenset[str], frozenset[str]], bytes]()

    def subgraph_for(
        self, read: Callable[[], bytes], outputs: Collection[str], given_values: Collection[str] = ()
    ) -> bytes:
        """As `subgraph_for`; `read` gives the graph's bytes if they are needed."""
        key = frozenset(outputs), frozenset(given_values)
        if key not in self._subgraphs:
            self._subgraphs[key] = subgraph_for(read(), outputs, given_values)
        return self._subgraphs[key]


def metadata_of(model: bytes) -> dict[str, str]:
    """The metadata of a graph. Raises `ModelError` if it is not an ONNX file."""
    try:
        entries = [v for n, k, v in _decode_fields(model) if (n, k) == (_METADATA, _BYTES)]
        return {_field_text(entry, _KEY): _field_text(entry, _VALUE) for entry in entries}
    except (IndexError, ValueError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ModelError:
    return ModelError(f"the graph can't be read as an ONNX file ({type(error).__name__}: {error})")


def _cut_graph(graph: bytes, output_names: set[str], replaced: frozenset[str]) -> bytes:
    rows = list(_decode_fields(graph))
    missing = output_names - {_field_text(v, _NAME) for n, _, v in rows if n == _OUTPUT}
    if missing:
        raise ModelError("the graph lacks outputs", got=", ".join(sorted(missing)[:5]))
    kept_rows, needed_values, replaced_here = set(), set(output_names), set[str]()
    # Backwards: ONNX requires operators to stand in the order in which they run.
    for index in reversed(range(len(rows))):
        number, _, value = rows[index]
        if number != _NODE:
            continue
        node_outputs = set(_field_texts(value, _NODE_OUTPUT))
        replaced_here |= node_outputs & replaced
        if needed_values.isdisjoint(node_outputs - replaced):
            continue
        kept_rows.add(index)
        needed_values.update(_values_read(value))
        # The name of absent optional inputs, which absent optional outputs of other operators share.
        needed_values.discard("")
    if replaced - replaced_here:
        raise ModelError("the graph lacks values", got=", ".join(sorted(replaced - replaced_here)[:5]))
    kept_fields = [_encode_field(_INPUT, _BYTES, _float_input(name)) for name in sorted(replaced)]
    for index, (number, kind, value) in enumerate(rows):
        if number == _NODE and index not in kept_rows:
            continue
        if number == _OUTPUT and _field_text(value, _NAME) not in output_names:
            continue
        if number in (_INPUT, _VALUE_INFO) and _field_text(value, _NAME) not in needed_values:
            continue
        if number == _INITIALIZER and _field_text(value, _TENSOR_NAME) not in needed_values:
            continue
        kept_fields.append(_encode_field(number, kind, value))
    return b"".join(kept_fields)


def _float_input(name: str) -> bytes:
    """A float32 input of any shape."""
    tensor = _encode_field(_ELEMENT_TYPE, _VARINT, _encode_varint(_FLOAT32))
    kind = _encode_field(_TENSOR_TYPE, _BYTES, tensor)
    return _encode_field(_NAME, _BYTES, name.encode()) + _encode_field(_TYPE, _BYTES, kind)


def _values_read(node: bytes, depth: int = 0) -> Iterator[str]:
    """Names of the values that an operator reads, also inside its loops and branches."""
    if depth > _MAX_DEPTH:
        raise ValueError("loops are nested too deeply")
    yield from _field_texts(node, _NODE_INPUT)
    for number, kind, attribute in _decode_fields(node):
        if (number, kind) != (_NODE_ATTRIBUTE, _BYTES):
            continue
        for field, wire_type, body in _decode_fields(attribute):
            if field not in _ATTRIBUTE_GRAPHS or wire_type != _BYTES:
                continue
            for n, k, value in _decode_fields(body):
                if (n, k) == (_NODE, _BYTES):
                    yield from _values_read(value, depth + 1)
                elif (n, k) == (_OUTPUT, _BYTES):
                    yield _field_text(value, _NAME)  # a branch may hand an outer value through


def _field_texts(message: bytes, number: int) -> list[str]:
    return [v.decode() for n, k, v in _decode_fields(message) if (n, k) == (number, _BYTES)]


def _field_text(message: bytes, number: int) -> str:
    return next(iter(_field_texts(message, number)), "")


def _decode_fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Fields of a protocol buffer: number, wire type and bytes, those of nested messages without their length."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _read_varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, field_end = _read_varint(message, position)
        elif kind == _BYTES:
            length, position = _read_varint(message, position)
            field_end = position + length
        elif kind in (_FIXED64, _FIXED32):
            field_end = position + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if field_end > end:
            raise ValueError("cut short")
        yield number, kind, message[position:field_end]
        position = field_end


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
        if shift > 63:  # more than 64 bits: a damaged file, which must not loop on
            raise ValueError("a number is too long")


def _encode_field(number: int, kind: int, value: bytes) -> bytes:
    head = _encode_varint(number << 3 | kind)
    return head + _encode_varint(len(value)) + value if kind == _BYTES else head + value


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
