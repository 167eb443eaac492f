"""Ties an embedding to a layer that holds a copy of its table, as language models' last layers do.

Exporters fold the transposition of a layer's weight, which makes a second tensor of a table that two layers share.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from fedprune.core.text import first_few
from fedprune_export.ir.graph import Array, Graph, Node

_PRODUCT_OPERATORS = ("Gemm", "MatMul")


def tie_tables(graph: Graph, constants: Container[str], notes: list[str]) -> None:
    """Let products read the table of an embedding where their weight has the same numbers, also transposed."""
    readers = graph.consumers()

    def weights_read_by(operators: tuple[str, ...], position: int) -> dict[str, Array]:
        """Tensors that only these operators read, at one position."""
        return {
            name: value
            for name, value in graph.initializers.items()
            if name not in constants
            and value.dtype == np.float32
            and value.ndim == 2
            and min(value.shape) > 1
            and readers.get(name)
            and all(n.op in operators and not n.domain and i == position for n, i in readers[name])
        }

    tables = weights_read_by(("Gather",), 0)
    pairs: list[str] = []
    for name, value in weights_read_by(_PRODUCT_OPERATORS, 1).items() if tables else ():
        for table, rows in tables.items():
            is_turned = np.array_equal(value, rows.T)
            # Equal numbers throughout are what fresh tensors begin with.
            if not (is_turned or np.array_equal(value, rows)) or np.all(value == value[0, 0]):
                continue
            source = table
            if is_turned:
                source = graph.fresh("Transpose")
                graph.nodes.insert(0, Node("Transpose", [table], [source], {"perm": [1, 0]}, source))
            for node, position in readers[name]:
                node.inputs[position] = source
            pairs.append(f"{name} of {table}")
            break
    if pairs:
        graph.prune()
        notes.append(
            "Layers whose weights are copies of an embedding's table share it, and train it together: "
            f"{first_few(pairs, max_names=3)}."
        )
