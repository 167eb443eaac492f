"""Packs several inputs or outputs of a model into one row per sample.

Boards, planners and strategies handle models of one input and one output. Inputs are concatenated in the alphabetical
order of their names, and outputs in the model's own order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from fedprune.core.errors import ModelError, shape_text, value_text
from fedprune.core.text import first_few
from fedprune.model.step_contract import X
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import trace_graph

# Keys of a graph's metadata with the names and shapes of packed inputs and outputs: [[name, [sizes]], ...].
INPUTS_KEY, OUTPUTS_KEY = "fedprune.inputs", "fedprune.outputs"

_TYPES = [np.dtype(t) for t in (np.float32, np.float16, np.int64, np.int32, np.bool_, np.uint8)]


@dataclass(frozen=True)
class Piece:
    """An input or output in a packed row: its name, and one sample's shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_packing(metadata: dict[str, str], key: str) -> tuple[Piece, ...]:
    """The packing of a graph's inputs or outputs in its metadata; empty for a single one."""
    return tuple(Piece(str(name), tuple(map(int, shape))) for name, shape in json.loads(metadata.get(key, "[]")))


def pack_inputs(graph: Graph, notes: list[str]) -> None:
    """Pack several inputs into one: int64 if all are integers, else float32.

    Raises `ModelError` if one of them has no free batch, another free axis, or a type that isn't supported.
    """
    if len(graph.inputs) < 2:
        return
    ports = sorted(graph.inputs, key=lambda port: port.name)
    pieces = [Piece(port.name, _sample_sizes(port)) for port in ports]
    # float32 would round identifiers from 2^24 on, so only integers stay integers.
    are_integers = all(port.dtype in (np.dtype(np.int64), np.dtype(np.int32)) for port in ports)
    kind = np.dtype(np.int64 if are_integers else np.float32)
    row = graph.fresh(X)
    first, before = len(graph.nodes), 0
    for port, piece in zip(ports, pieces, strict=True):
        ends = graph.ints(before), graph.ints(before + piece.size)
        before += piece.size
        columns = graph.emit("Slice", row, *ends, graph.ints(1))
        cast = port.dtype != kind
        # 0 copies the batch; one number per sample has no other axis, hence −1.
        shape = graph.ints(*((0, *piece.shape) if piece.shape else (-1,)))
        value = graph.emit("Reshape", columns, shape, out=None if cast else port.name)
        if cast:
            to = int(onnx.helper.np_dtype_to_tensor_dtype(port.dtype))
            graph.emit("Cast", value, attrs={"to": to}, out=port.name)
    graph.nodes[:] = [*graph.nodes[first:], *graph.nodes[:first]]
    graph.inputs[:] = [Port(row, kind, ("N", before))]
    graph.metadata[INPUTS_KEY] = _packing_text(pieces)
    notes.append(_row_note("inputs", pieces))


def pack_outputs(graph: Graph, notes: list[str]) -> None:
    """Pack several outputs into one row per sample.

    Raises `ModelError` if one of them has no free batch, or another free axis.
    """
    if len(graph.outputs) < 2:
        return
    graph_trace, pieces = trace_graph(graph), []
    for port in graph.outputs:
        dims = graph_trace.dims(port.name)
        if not dims or dims[0] is not None or any(d is None for d in dims[1:]):
            raise ModelError(
                f"output {value_text(port.name)}",
                expected="float32 [n, ...] with fixed sizes behind the batch",
                got=shape_text(*("n" if d is None else d for d in dims)),
            )
        pieces.append(Piece(port.name, tuple(d for d in dims[1:] if d is not None)))
    flat = [graph.emit("Reshape", piece.name, graph.ints(0, piece.size)) for piece in pieces]
    row = graph.emit("Concat", *flat, attrs={"axis": 1})
    graph.outputs[:] = [Port(row, np.dtype(np.float32), ("N", sum(piece.size for piece in pieces)))]
    graph.metadata[OUTPUTS_KEY] = _packing_text(pieces)
    notes.append(_row_note("outputs", pieces))


def row_splitter(pieces: Sequence[Piece]) -> Callable[[Any], list[Any]]:
    """A function that splits torch tensors of packed rows [n, k] into their pieces [n, ...]."""

    def split(rows: Any) -> list[Any]:
        chunks = rows.split([piece.size for piece in pieces], 1)
        return [chunk.reshape(-1, *piece.shape) for chunk, piece in zip(chunks, pieces, strict=True)]

    return split


def _sample_sizes(port: Port) -> tuple[int, ...]:
    sizes = port.shape[1:]
    has_free_batch = bool(port.shape) and not isinstance(port.shape[0], int)
    if port.dtype not in _TYPES or not has_free_batch or not all(isinstance(d, int) and d > 0 for d in sizes):
        raise ModelError(
            f"input {value_text(port.name)}",
            expected=f"{', '.join(str(t) for t in _TYPES)} [n, ...] with a free batch and fixed sizes behind it",
            got=f"{port.dtype} {shape_text(*port.shape)}",
        )
    return tuple(d for d in sizes if isinstance(d, int))


def _packing_text(pieces: Sequence[Piece]) -> str:
    return json.dumps([[piece.name, list(piece.shape)] for piece in pieces])


def _row_note(kind: str, pieces: Sequence[Piece]) -> str:
    names = first_few([f"{piece.name} {shape_text('n', *piece.shape)}" for piece in pieces])
    size = sum(piece.size for piece in pieces)
    return f"The {kind} {names} are parts of one row of {size:,} numbers per sample, in this order."
