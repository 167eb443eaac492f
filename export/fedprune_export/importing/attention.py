"""Attention and the embedding of places that goes with it, operators of opset 23, in operators of opset 17."""

from __future__ import annotations

import math

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.shape_inference import MOST_NUMBERS
from fedprune_export.ir.trace import Trace


def emit_attention(graph: Graph, node: Node, seen: Trace, used: set[str]) -> None:
    """Write an Attention of opset 23 as MatMul, Mul, Add, Softmax, MatMul.

    Inputs are [batch, heads, tokens, size] or [batch, tokens, heads * size]. Raises `ModelError` if it uses a cache,
    shares keys between heads, has a soft cap, or gives further outputs.
    """
    q, k, v, mask, *cache = [*node.inputs, *[""] * 6][:6]
    heads = _heads(node, seen)
    refused = {
        "a cache of keys": any(cache),
        "further outputs": any(o in used for o in node.outputs[1:] if o),
        "a soft cap": bool(node.attrs.get("softcap")),
        "fewer heads for keys than for queries": heads[0] != heads[1],
    }
    for what, found in refused.items():
        if found:
            raise ModelError(
                f"operator Attention ({node.name}) has {what}, which can't be lowered", hint="Export it at opset 18."
            )
    flat = len(seen.shapes[q]) == 3
    if flat:
        q, k, v = (_apart(graph, name, heads[0], seen) for name in (q, k, v))
    size = seen.shapes[node.inputs[0]][-1] // (heads[0] if flat else 1)
    scale = float(node.attrs.get("scale") or 1 / math.sqrt(size))
    scores = graph.emit("MatMul", q, graph.emit("Transpose", k, attrs={"perm": [0, 1, 3, 2]}))
    scores = graph.emit("Mul", scores, graph.scalar(scale))
    tokens = tuple(seen.dims(node.inputs[i])[-2] for i in (0, 1))
    most = heads[0] * math.prod(t or 1 for t in tokens)
    if most > MOST_NUMBERS:
        raise ModelError(f"operator Attention ({node.name})", expected=f"at most {MOST_NUMBERS} scores", got=most)
    for bias in _biases(graph, node, mask, tokens, seen):
        scores = graph.emit("Add", scores, bias)
    out = graph.emit(
        "MatMul", graph.emit("Softmax", scores, attrs={"axis": -1}), v, out=None if flat else node.outputs[0]
    )
    if flat:
        rows = graph.emit("Transpose", out, attrs={"perm": [0, 2, 1, 3]})
        width = seen.shapes[node.outputs[0]][-1]
        graph.emit("Reshape", rows, graph.ints(0, -1 if tokens[0] is None else tokens[0], width), out=node.outputs[0])


def _heads(node: Node, seen: Trace) -> tuple[int, int]:
    """Heads of queries and of keys."""
    if len(seen.shapes[node.inputs[0]]) == 4:
        return seen.shapes[node.inputs[0]][1], seen.shapes[node.inputs[1]][1]
    try:
        return int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
    except KeyError as error:
        raise ModelError(f"operator Attention ({node.name}) has no number of heads") from error


def _apart(graph: Graph, name: str, heads: int, seen: Trace) -> str:
    """[batch, tokens, heads * size] as [batch, heads, tokens, size]."""
    _, tokens, width = seen.dims(name)
    target = graph.ints(0, -1 if tokens is None else tokens, heads, (width or 0) // heads)
    return graph.emit("Transpose", graph.emit("Reshape", name, target), attrs={"perm": [0, 2, 1, 3]})


def _biases(graph: Graph, node: Node, mask: str, tokens: tuple[int | None, ...], seen: Trace) -> list[str]:
    """The additive mask of the scores: minus infinity where a query must not attend."""
    out = []
    if node.attrs.get("is_causal"):
        if None in tokens:
            raise ModelError(f"operator Attention ({node.name}) is causal over a free number of tokens")
        ahead = np.triu(np.ones([t or 0 for t in tokens], np.bool_), 1)
        out.append(graph.constant(np.where(ahead, -np.inf, 0), np.float32))
    if mask and seen.dtypes[mask] == np.bool_:
        out.append(graph.emit("Where", mask, graph.scalar(0), graph.scalar(-np.inf)))
    elif mask:
        out.append(mask)
    return out


def emit_rotary(graph: Graph, node: Node, seen: Trace) -> None:
    """Write a RotaryEmbedding of opset 23 as products with cosines and sines: each pair (a, b) of the first numbers of
    a head is turned to (a·cos − b·sin, a·sin + b·cos).

    Inputs are [batch, heads, tokens, size] or [batch, tokens, heads * size]; pairs are halves of the size apart, or
    neighbours. Raises `ModelError` if the number of heads isn't known.
    """
    x, cosines, sines, places = [*node.inputs, ""][:4]
    flat = len(seen.shapes[x]) == 3
    heads = int(node.attrs.get("num_heads") or 0) if flat else seen.shapes[x][1]
    if not heads:
        raise ModelError(f"operator RotaryEmbedding ({node.name}) has no number of heads")
    tokens, size = seen.dims(x)[-2], seen.shapes[x][-1] // (heads if flat else 1)
    value = _apart(graph, x, heads, seen) if flat else x
    turned = int(node.attrs.get("rotary_embedding_dim") or size)
    parts = (
        [value]
        if turned == size
        else graph.emit_many("Split", value, graph.ints(turned, size - turned), outputs=2, attrs={"axis": -1})
    )
    side = bool(node.attrs.get("interleaved"))
    if side:
        a, b = (
            graph.emit("Slice", parts[0], graph.ints(i), graph.ints(turned), graph.ints(-1), graph.ints(2))
            for i in (0, 1)
        )
    else:
        a, b = graph.emit_many("Split", parts[0], graph.ints(turned // 2, turned // 2), outputs=2, attrs={"axis": -1})
    cos, sin = (graph.emit("Unsqueeze", _at_places(graph, c, places), graph.ints(1)) for c in (cosines, sines))
    pair = (
        graph.emit("Sub", graph.emit("Mul", a, cos), graph.emit("Mul", b, sin)),
        graph.emit("Add", graph.emit("Mul", a, sin), graph.emit("Mul", b, cos)),
    )
    if side:
        both = graph.emit("Concat", *(graph.emit("Unsqueeze", v, graph.ints(-1)) for v in pair), attrs={"axis": -1})
        whole = [graph.emit("Reshape", both, graph.ints(0, heads, -1 if tokens is None else tokens, turned))]
    else:
        whole = list(pair)
    last = None if flat else node.outputs[0]
    out = graph.emit("Concat", *whole, *parts[1:], attrs={"axis": -1}, out=last)
    if flat:
        rows = graph.emit("Transpose", out, attrs={"perm": [0, 2, 1, 3]})
        graph.emit("Reshape", rows, graph.ints(0, -1 if tokens is None else tokens, heads * size), out=node.outputs[0])


def _at_places(graph: Graph, table: str, places: str) -> str:
    """Cosines or sines [batch, tokens, pairs] of a table, which isn't trained."""
    if table in graph.initializers:
        table = graph.constant(graph.initializers[table], np.float32)
    return graph.emit("Gather", table, places, attrs={"axis": 0}) if places else table
