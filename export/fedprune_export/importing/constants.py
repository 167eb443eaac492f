"""Rewrites how a graph stores and uses constants, so that they fit layers of any width.

- `drop_zero_products`: products of constant zeros are zeros, such as those of the state with which an unrolled layer
  begins. As a product they would keep all hidden units.
- `fold_constants`: values that depend neither on data nor on weights are computed and stored.
- `copy_fills`: gives each reader of a filled value a copy of its own. A filled value is a number that is repeated to a
  computed size, such as the zeros with which a recurrent layer begins. Exporters make one value for several layers,
  whose hidden units could then only be cut together.
- `guard_zero_norms`: divides by 1 where the norm of a direction (weight norm) is 0, which would give NaN.
- `narrow_constants`: stores a constant with equal numbers for all channels as one number.
"""

from __future__ import annotations

from collections.abc import Collection, Container

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.importing.refusals import RANDOM_OPERATORS
from fedprune_export.ir.dropout import is_dropout
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.operators import MANY_TO_ONE, REARRANGEMENTS, SIZE_OPERATORS
from fedprune_export.ir.shape_arithmetic import size_marks
from fedprune_export.ir.trace import Trace, run_values


def constant_input(graph: Graph, node: Node, index: int, what: str) -> Array | None:
    """The constant at an input of a node; None where it is left out. Raises `ModelError` if it is computed."""
    if len(node.inputs) <= index or not node.inputs[index]:
        return None
    if node.inputs[index] not in graph.initializers:
        raise ModelError(f"operator {node.op} ({node.name}) takes computed {what}", expected=f"constant {what}")
    return graph.initializers[node.inputs[index]]


_FILL_PRESERVING = REARRANGEMENTS | {"Cast", "Gather", "Slice", "Split", "Concat"}
_MAX_COPIES = 64  # a value with more readers is hardly a layer's first state


def copy_fills(graph: Graph, constants: Collection[str]) -> None:
    """Give every reader of a filled value a copy of the nodes that make it."""
    # `sizes` are values that shapes are computed from; `filled` are numbers repeated to such a shape.
    constant_names, sizes = set(constants), set[str]()
    filled: set[str] = set()
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        if node.domain:
            continue
        reads = [i for i in node.inputs if i]
        if node.op in SIZE_OPERATORS or all(i in sizes or i in constant_names for i in reads):
            fills = node.op in ("Expand", "ConstantOfShape") and any(i in sizes for i in reads)
            (filled if fills else sizes).update(o for o in node.outputs if o)
        elif node.op in _FILL_PRESERVING and all(i in filled or i in sizes or i in constant_names for i in reads):
            filled.update(o for o in node.outputs if o)
    nodes: list[Node] = []
    readers: dict[str, list[Node]] = {}
    # From the last node to the first, so that the inputs of a copy are copied in turn.
    for node in reversed(graph.nodes):
        copies = [node]
        output_names = [o for o in node.outputs if o]
        if output_names and filled.issuperset(output_names) and not outputs.intersection(output_names):
            reader_nodes = list({id(n): n for name in output_names for n in readers.get(name, [])}.values())
            copies += [_copy_for_reader(graph, node, reader) for reader in reader_nodes[1:_MAX_COPIES]]
        for copy in copies[::-1]:
            nodes.append(copy)
            for name in copy.inputs:
                readers.setdefault(name, []).append(copy)
    graph.nodes = nodes[::-1]


def guard_zero_norms(graph: Graph, constants: Container[str]) -> None:
    """Divide by 1 where the L2 norm of a parameter is 0, as that of a direction (weight norm) under a mask may be.

    0 / 0 is NaN, also in PyTorch. Where the norm is not 0, value and gradient stay the same.
    """
    makers = graph.producers()
    nodes: list[Node] = []
    for node in graph.nodes:
        length = makers.get(node.inputs[1]) if node.op == "Div" and not node.domain else None
        if length is not None and length.op == "ReduceL2" and not length.domain:
            source, divisor = length.inputs[0], node.inputs[1]
            if source in graph.initializers and source not in constants:
                empty, node.inputs[1] = graph.fresh("Equal"), graph.fresh("Where")
                nodes.append(Node("Equal", [divisor, graph.scalar(0)], [empty], {}, empty))
                choice = [empty, graph.scalar(1), divisor]
                nodes.append(Node("Where", choice, [node.inputs[1]], {}, node.inputs[1]))
        nodes.append(node)
    graph.nodes = nodes


def narrow_constants(graph: Graph, trace: Trace, constants: set[str]) -> None:
    """Shorten constants along axes on which all their numbers are equal, if another operand gives the axis its size.

    The names of new constants are added to `constants`.
    """
    for node in graph.nodes:
        if node.domain or node.op not in MANY_TO_ONE or not all(i in trace.shapes for i in node.inputs):
            continue
        for position, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name not in constants or value.size < 2:
                continue
            operand_shapes = [trace.shapes[i] for i in node.inputs if i not in constants]
            shortened = value
            for axis, size in enumerate(value.shape):
                from_end = value.ndim - axis
                is_given = any(len(shape) >= from_end and shape[-from_end] == size for shape in operand_shapes)
                # Without another operand of this size the result itself would become shorter.
                if size > 1 and is_given and (value == value.take([0], axis)).all():
                    shortened = shortened.take([0], axis)
            if shortened.size < value.size:
                node.inputs[position] = graph.constant(shortened, shortened.dtype)
                constants.add(node.inputs[position])


def _copy_for_reader(graph: Graph, node: Node, reader: Node) -> Node:
    """Copy a node, and let one of its readers read the copy."""
    names = {name: graph.fresh(node.op) for name in node.outputs if name}
    reader.inputs = [names.get(i, i) for i in reader.inputs]
    outputs = [names.get(o, "") for o in node.outputs]
    return Node(node.op, list(node.inputs), outputs, dict(node.attrs), outputs[0])


def drop_zero_products(graph: Graph, trace: Trace, constants: set[str]) -> None:
    """Store the products of constant zeros, where their size doesn't depend on the batch, as zeros.

    The names of new constants are added to `constants`.
    """
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        output = node.outputs[0]
        if node.op != "MatMul" or node.domain or output in outputs or any(trace.batched(output)):
            continue
        if any(i in constants and i in graph.initializers and not graph.initializers[i].any() for i in node.inputs):
            graph.initializers[output] = np.zeros(trace.shapes[output], trace.dtypes[output])
            constants.add(output)
    graph.nodes = [n for n in graph.nodes if n.outputs[0] not in graph.initializers]


def fold_constants(graph: Graph, trace: Trace, constants: set[str], output: str) -> None:
    """Compute values that depend neither on data nor on weights, and store them as constants.

    That includes shape arithmetic that doesn't depend on the batch; it has full widths, also in a cut graph.
    """
    constant_values = {n: graph.initializers[n] for n in constants if n in graph.initializers}
    # A mark says that a size depends on the batch.
    for name, marks in size_marks(graph, trace, constant_values, trace.batched).items():
        if name in trace.integers and not marks.any():
            constant_values[name] = trace.integers[name]
    computable: set[str] = set()
    for node in graph.nodes:
        reads = [i for i in node.inputs if i]
        if (
            # Folding would freeze one draw of random numbers, or remove a dropout.
            node.op not in RANDOM_OPERATORS
            and not is_dropout(node)
            and all(i in constant_values or i in computable for i in reads)
            and not all(o in constant_values for o in node.outputs if o)
        ):
            computable.update(o for o in node.outputs if o)
    if computable:
        computed_nodes = [n for n in graph.copy().nodes if any(o in computable for o in n.outputs)]
        computed = Graph(nodes=computed_nodes, initializers=dict(constant_values), opset=graph.opset)
        constant_values.update(run_values(computed, sorted(computable), batch=1))
    folded = {o for n in graph.nodes for o in n.outputs if o in constant_values and o != output}
    graph.nodes = [n for n in graph.nodes if not all(o in folded for o in n.outputs if o)]
    for name in folded:
        graph.initializers[name] = np.array(constant_values[name], order="C")
        constants.add(name)
