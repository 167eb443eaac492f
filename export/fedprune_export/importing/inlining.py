"""Inlining of local functions, and removal of branches that are never taken and of sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, reason, shown
from fedprune_export.importing.model_file import check
from fedprune_export.importing.sequences import SEQUENCE_OPERATORS, without_sequences
from fedprune_export.ir.graph import read_tensor

MOST_NODES = 40_000  # operators of a model, with functions inlined; more would take over a minute to import

_DEEPEST = 20  # functions that call functions, and branches within branches


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without local functions, branches on constants and sequences: the same object if it has none.

    Raises `ModelError` if functions call each other without end, the model has too many operators, or the length of a
    sequence isn't known.
    """
    if model.functions:
        _check_calls(model)
        model = _inlined(model)
    if len(model.graph.node) > MOST_NODES:
        raise ModelError("number of operators", expected=f"at most {MOST_NODES}", got=len(model.graph.node))
    operators = {n.op_type for n in model.graph.node if n.domain in ("", "ai.onnx")}
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    grouped = 18 <= opset < 21 and "GroupNormalization" in operators
    if not grouped and (model.functions or "If" in operators or operators & SEQUENCE_OPERATORS):
        check(model)
    if not grouped and "If" not in operators and not operators & SEQUENCE_OPERATORS:
        return model
    out = onnx.ModelProto()
    out.CopyFrom(model)
    if "If" in operators:
        _take_branches(out.graph)
    if grouped:
        _per_group(out.graph)
    if any(n.op_type in SEQUENCE_OPERATORS for n in out.graph.node):
        without_sequences(out, opset)
    return out


# -- functions ---------------------------------------------------------------------------------------------------------


def _check_calls(model: onnx.ModelProto) -> None:
    """Make sure that writing functions out comes to an end, and soon."""
    functions = {(f.domain, f.name): f for f in model.functions}
    calls = {k: Counter((n.domain, n.op_type) for n in f.node) for k, f in functions.items()}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], depth: int) -> int:
        if key not in functions:
            return 1
        if depth > _DEEPEST:
            raise ModelError(f"local functions call each other more than {_DEEPEST} deep", got=shown(key[1]))
        if key not in sizes:
            sizes[key] = sum(n * size(k, depth + 1) for k, n in calls[key].items())
        return sizes[key]

    total = sum(size((n.domain, n.op_type), 0) for n in model.graph.node)
    if total > MOST_NODES:
        raise ModelError("number of operators with functions written out", expected=f"at most {MOST_NODES}", got=total)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnx import inliner

    try:
        onnx.checker.check_model(model)
        out: onnx.ModelProto = inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelError(
            f"the model's local functions can't be written out ({reason(error)})", hint="Export it without functions."
        ) from error
    return out


# -- branches ----------------------------------------------------------------------------------------------------------


def _take_branches(graph: onnx.GraphProto) -> None:
    """Write out the branch that a constant condition takes; others stay, and are refused by name."""
    for _ in range(_DEEPEST):
        known = {t.name: t for t in graph.initializer}
        known |= {
            n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
        }
        nodes: list[onnx.NodeProto] = []
        taken = 0
        for node in graph.node:
            condition = known.get(node.input[0]) if node.op_type == "If" and len(node.input) == 1 else None
            if (
                condition is None
                or list(condition.dims) not in ([], [1])
                or condition.data_type != onnx.TensorProto.BOOL
            ):
                nodes.append(node)
                continue
            yes = bool(read_tensor(condition).reshape(-1)[0])
            branch = next((a.g for a in node.attribute if a.name == ("then_branch" if yes else "else_branch")), None)
            if branch is None or len(branch.output) != len(node.output):
                raise ModelError(f"If {shown(node.name)} lacks a branch")
            taken += 1
            nodes += _branch(graph, branch, node, f"{node.output[0]}.")
        if not taken:
            return
        del graph.node[:]
        graph.node.extend(nodes)
    raise ModelError(f"branches are nested more than {_DEEPEST} deep")


def _branch(graph: onnx.GraphProto, branch: onnx.GraphProto, node: onnx.NodeProto, prefix: str) -> list[onnx.NodeProto]:
    """A branch's nodes under names of their own; its tensors join the graph's."""
    own = [o for n in branch.node for o in n.output if o] + [t.name for t in branch.initializer]
    names = {o: prefix + o for o in own}
    moved = {b.name: o for b, o in zip(branch.output, node.output, strict=True) if b.name in names and o}
    made = {o for n in branch.node for o in n.output}
    out = [onnx.NodeProto() for _ in branch.node]
    names |= {b: o for b, o in moved.items() if b in made}
    for copy, inner in zip(out, branch.node, strict=True):
        copy.CopyFrom(inner)
        _rename(copy, names)
    for tensor in branch.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = names[tensor.name]
    for value, target in zip(branch.output, node.output, strict=True):
        if target and names.get(value.name) != target:
            out.append(helper.make_node("Identity", [names.get(value.name, value.name)], [target]))
    return out


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Give a node's values other names, also where graphs within read them."""
    node.input[:] = [names.get(i, i) for i in node.input]
    node.output[:] = [names.get(o, o) for o in node.output]
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                _rename(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)


# -- group norms -------------------------------------------------------------------------------------------------------


def _per_group(graph: onnx.GraphProto) -> None:
    """GroupNormalization of opsets 18 to 20, which scales by group, as an instance norm: it was withdrawn since."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "GroupNormalization" or node.domain not in ("", "ai.onnx") or len(node.input) != 3:
            nodes.append(node)
            continue
        x, scale, bias = node.input
        stem = f"{node.output[0]}.group"
        target = np.array([0, int(attrs.get("num_groups", 0)), -1], np.int64)
        graph.initializer.append(numpy_helper.from_array(target, f"{stem}_target"))
        nodes += [
            helper.make_node("Reshape", [x, f"{stem}_target"], [f"{stem}_apart"]),
            helper.make_node(
                "InstanceNormalization",
                [f"{stem}_apart", scale, bias],
                [f"{stem}_normal"],
                epsilon=attrs.get("epsilon", 1e-5),
            ),
            helper.make_node("Shape", [x], [f"{stem}_shape"]),
            helper.make_node("Reshape", [f"{stem}_normal", f"{stem}_shape"], [node.output[0]]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
