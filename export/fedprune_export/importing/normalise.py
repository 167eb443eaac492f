"""Any ONNX model as a graph of few operators: one input `x`, one output `logits`, opset 17, constants folded.

The rest of the compiler then needn't handle names that clash with reserved ones, shape arithmetic, operators that do
nothing at inference, and forms of an operator that differ between opsets. Weights keep their names and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.core.errors import ModelError
from fedprune.core.text import first_few
from fedprune.model.step_contract import LOGITS, RESERVED_NAMES, X
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.activations import replace_activations
from fedprune_export.importing.checks import check_indices, check_nodes, compare_with_original
from fedprune_export.importing.constants import copy_fills, guard_zero_norms, narrow_constants, store_as_float32
from fedprune_export.importing.dropout import read_dropouts
from fedprune_export.importing.lengths import compute_lengths
from fedprune_export.importing.metadata import shown_names
from fedprune_export.importing.norms import replace_norms
from fedprune_export.importing.original import Original
from fedprune_export.importing.packing import pack_inputs, pack_outputs
from fedprune_export.importing.parameter_roles import (
    CONSTANT_PREFIX,
    constants_of,
    find_kinds,
    is_sole_bias,
    name_constants,
    note_scalars,
    untie,
)
from fedprune_export.importing.refusals import (
    RANDOM_OPERATORS,
    check_not_quantised,
    check_output,
    check_random,
    check_trainable,
)
from fedprune_export.importing.simplification import bypass, drop_identities, simplify
from fedprune_export.importing.translation import translate, upgrade_model
from fedprune_export.importing.transpositions import merge_transpositions
from fedprune_export.ir.dropout import is_dropout, remove_dropouts
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.shape_arithmetic import size_marks
from fedprune_export.ir.trace import Trace, check_batch, refuse_fixed_batch, sample_input, trace_graph

Array = npt.NDArray[Any]

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Clip", "Max", "Min"})
# Bounds of probabilities this near to 0 and 1 guard a logarithm; well below checks._TOLERANCE.
_PROBABILITY_MARGIN = 1e-5


@dataclass
class Normalised:
    """A graph in the compiler's form.

    Attributes:
        parameters: The kind of every weight and statistic (a `TensorKind` value), in the order of first use.
        notes: Changes that a user may want to know.
        names: The new names of values and tensors that were renamed, by the old ones.
    """

    graph: Graph
    parameters: dict[str, str]
    trace: Trace
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def normalise(
    model: onnx.ModelProto,
    parameters: frozenset[str] | None,
    raw: bytes,
    *,
    own_loss: bool = False,
) -> Normalised:
    """Bring a model into the compiler's form and check that it still computes the same.

    Several inputs are packed into one; the mask and lengths of padded samples are computed. Raises `ModelError` if the
    model has several outputs, a fixed batch, control flow, numbers in other types than float32, or operators that opset
    17 has no form of.

    Args:
        parameters: Names of the trainable initialisers where the source knows them; then initialisers shared by several
            nodes are truly tied. Otherwise parameters are recognised by their use.
        raw: The file that the model was read from. The graph has to compute what onnxruntime computes by it.
        own_loss: Whether the model has a loss of its own, which takes outputs as they are: several are packed into one
            instead of being refused, and a softmax at the end stays.
    """
    if not model.graph.node:
        raise ModelError("the model has no operators")
    # Read one input and one output, and the constants that the file declares.
    model = upgrade_model(model)
    graph = Graph.from_proto(model)
    notes: list[str] = []
    check_nodes(graph)
    check_not_quantised(graph)
    store_as_float32(graph)
    constants = constants_of(model, graph, notes if parameters is None else [])
    file_inputs, file_outputs = [p.name for p in graph.inputs], [p.name for p in graph.outputs]
    compute_lengths(graph, notes)
    pack_inputs(graph, notes)
    if own_loss:
        pack_outputs(graph, notes)
    _check_ports(graph)
    constants |= {n for n in graph.initializers if n.startswith(CONSTANT_PREFIX)}
    _name_nodes(graph)
    # At this point the graph begins with the packing of inputs: `Original` takes the file's inputs from it.
    row_graph = graph.copy()
    graph.prune()
    read_dropouts(graph, notes)
    drop_identities(graph)
    plain = _plain_numbers(graph)
    scalars = {n for n in plain - constants if parameters is None and graph.initializers[n].dtype == np.float32}
    constants |= plain
    if parameters is not None:
        constants = {n for n in graph.initializers if n not in parameters}
    names = _rename(graph, constants, notes)
    listed = set(graph.initializers) - constants if parameters is not None else None
    graph.prune()
    # Check sizes before anything is run: the trace refuses values that would fill the memory.
    graph_trace = trace_graph(graph)
    check_indices(graph, graph_trace)
    if graph_trace.dims(LOGITS)[:1] != (None,):
        refuse_fixed_batch(graph)
    check_output(graph, graph_trace, {new: old for old, new in names.items()})
    softmax = "" if own_loss else _drop_output_softmax(graph, graph_trace, notes)
    # onnxruntime allocates whatever a file asks for, so it loads the file only after the trace has bounded all sizes.
    original = Original(raw, file_inputs, file_outputs, row_graph)
    # After this each operator has one form, and constants are folded.
    composites = _simplify(graph, graph_trace, constants, notes, LOGITS)
    if composites:
        notes.append(
            "A norm or activation that was written out in primitives is one operator."
            if composites == 1
            else f"{composites} norms and activations that were written out in primitives are one operator each."
        )
    check_random(graph)
    guard_zero_norms(graph, constants)
    constants |= {n for n in graph.initializers if n.startswith(CONSTANT_PREFIX)}
    if parameters is None:
        # A list of parameters says that shared tensors are truly tied; without one, exporters may have merged equal
        # values.
        untie(graph, constants, notes)
    copy_fills(graph, constants)
    narrow_constants(graph, graph_trace, constants)
    # Only now is every use of a tensor in the form by which roles are recognised.
    kinds = find_kinds(graph, constants, listed, notes)
    note_scalars(graph, {names.get(s, s) for s in scalars}, notes)
    check_trainable(graph, kinds)
    _check_finite(graph, kinds)
    name_constants(graph, kinds)
    _name_nodes(graph)
    graph_trace = trace_graph(graph)
    _check_types(graph, graph_trace)
    compare_with_original(original, graph, softmax)
    return Normalised(graph, kinds, graph_trace, notes, names)


def simplify_graph(graph: Graph, constants: set[str], notes: list[str], *, output: str) -> None:
    """Bring a graph without weights into the compiler's form. Raises `ModelError` if it computes in other types than
    float32, or with operators that opset 17 has no form of."""
    check_nodes(graph)
    _name_nodes(graph)
    remove_dropouts(graph)
    drop_identities(graph)
    graph.prune()
    graph_trace = trace_graph(graph)
    check_indices(graph, graph_trace)
    _simplify(graph, graph_trace, constants, notes, output)
    _name_nodes(graph)
    _check_types(graph, trace_graph(graph))


def _simplify(graph: Graph, trace: Trace, constants: set[str], notes: list[str], output: str) -> int:
    """Fold constants and write each operator in one form. Returns the number of composites that were recognised."""
    _drop_casts(graph, trace)
    _fold(graph, trace, constants, output)
    translate(graph, trace, notes)
    simplify(graph, trace, constants)
    merge_transpositions(graph, trace)
    drop_identities(graph)
    graph.prune()
    constants |= {n for n in graph.initializers if n.startswith(CONSTANT_PREFIX)}
    return replace_activations(graph, trace, constants) + replace_norms(graph, trace, constants)


def _plain_numbers(graph: Graph) -> set[str]:
    """Initialisers that are constants by their kind: integers, and single numbers that scale, shift or bound.

    The bias of a product with one output is a single number, too, but it trains.
    """
    readers, producers = graph.consumers(), graph.producers()

    def is_plain(name: str) -> bool:
        uses = [n for n, _ in readers.get(name, [])]
        # Anything but arithmetic, such as a PRelu, may train a single number.
        return all(n.op in _ARITHMETIC and not n.domain for n in uses) and not any(
            is_sole_bias(graph, producers, n, name) for n in uses
        )

    return {
        name
        for name, value in graph.initializers.items()
        if value.dtype != np.float32 or (value.size == 1 and is_plain(name))
    }


def _check_ports(graph: Graph) -> None:
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        names = [p.name for p in (graph.inputs if len(graph.inputs) != 1 else graph.outputs)]
        raise ModelError(
            "the model's inputs and outputs",
            expected="one input and one output",
            got=f"{len(graph.inputs)} and {len(graph.outputs)} ({shown_names(names)})",
            hint="Give a loss of your own, which takes all of them (loss=, or --loss), or say which output gives the "
            "logits (output=, or --output)."
            if len(graph.inputs) == 1 and graph.outputs
            else "Export a model that maps one tensor to logits.",
        )
    port = graph.inputs[0]
    if port.dtype not in (np.float32, np.int64):
        raise ModelError(f"type of input {port.name}", expected="float32, or int64 for identifiers", got=port.dtype)
    check_batch(port)
    sample_input(port, 1)


def _drop_casts(graph: Graph, trace: Trace) -> None:
    """Remove casts to the type that a value has already, and write each CastLike as a Cast."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.domain or node.op not in ("Cast", "CastLike"):
            continue
        before, after = trace.dtypes[node.inputs[0]], trace.dtypes[node.outputs[0]]
        if before == after:
            bypass(graph, node, outputs)
        elif node.op == "CastLike":
            node.op, node.inputs = "Cast", node.inputs[:1]
            node.attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(after))}


def _rename(graph: Graph, constants: set[str], notes: list[str]) -> dict[str, str]:
    """Give input and output the contract's names, and rename everything that clashes with a reserved name."""
    used_names = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs), graph.inputs[0].name}
    names: dict[str, str] = {}
    renamed: list[str] = []
    for old in [*graph.initializers, *(o for n in graph.nodes for o in n.outputs)]:
        new = old.replace("::", "__")
        while old and (new in RESERVED_NAMES or new == "__metadata__" or (new != old and new in used_names)):
            new += "_"
        if new != old:
            names[old] = new
            used_names.add(new)
            if old in graph.initializers and old not in constants:
                renamed.append(f"{old} is called {new}")
    if renamed:
        notes.append(f"Tensors with reserved names were renamed: {first_few(renamed, max_names=3)}.")
    output = graph.outputs[0].name
    names.pop(output, None)
    names[graph.inputs[0].name] = X
    if output == graph.inputs[0].name or output in graph.initializers:
        raise ModelError("the model's output is not computed from its input", got=output)
    names[output] = LOGITS
    graph.inputs[0].name = X
    graph.inputs[0].shape = ("N", *graph.inputs[0].shape[1:])
    graph.outputs[0].name = LOGITS
    graph.rename(names)
    constants.update(names[c] for c in list(constants) if c in names)
    return names


def _drop_output_softmax(graph: Graph, trace: Trace, notes: list[str]) -> str:
    """Remove a softmax over classes at the end, which the loss contains; the order of the classes stays the same.

    Operators that only rearrange or clip its numbers may follow it.

    Returns the operator that was removed, empty if none.
    """
    makers, readers = graph.producers(), graph.consumers()
    followers: list[Node] = []
    last, name = makers.get(LOGITS), LOGITS
    while last is not None and not last.domain and last.op in REARRANGEMENTS | {"Cast", "Clip"}:
        if trace.dtypes[last.outputs[0]].kind != "f":
            return ""
        followers.append(last)
        name = last.inputs[0]
        last = makers.get(name) if len(readers[name]) == 1 else None
    if last is None or last.domain or last.op not in ("Softmax", "LogSoftmax") or LOGITS in readers:
        return ""
    # Without a node before the softmax the input itself would be the logits.
    if last.inputs[0] not in makers or not trace.shapes[name]:
        return ""
    axis: int | None = int(last.attrs.get("axis", -1)) % len(trace.shapes[name])
    clips = [node for node in followers if node.op == "Clip"]
    # A clip that cuts more than the margin of a logarithm changes predictions.
    if any(not _keeps_probabilities(graph, clip) for clip in clips) or (clips and last.op == "LogSoftmax"):
        return ""
    for node in reversed(followers):
        axis = _axis_after(node, axis, trace) if axis is not None else None
    if axis != 1:
        return ""
    notes.append(f"The {last.op} at the end was removed: the output is logits.")
    for node in (last, *clips):
        bypass(graph, node, {LOGITS})
    return last.op


def _keeps_probabilities(graph: Graph, clip: Node) -> bool:
    """Whether a clip leaves probabilities as they are, but for a margin that protects a logarithm."""
    low, high = ([*clip.inputs, "", ""][i] for i in (1, 2))
    are_constant = all(name in graph.initializers for name in (low, high) if name)
    bottom, top = graph.initializers.get(low, np.zeros(1)), graph.initializers.get(high, np.ones(1))
    return are_constant and bool((bottom <= _PROBABILITY_MARGIN).all() and (top >= 1 - _PROBABILITY_MARGIN).all())


def _axis_after(node: Node, axis: int, trace: Trace) -> int | None:
    """The index of an axis after a node that rearranges values; None if the node merges or splits it."""
    if node.op == "Transpose":
        rank = len(trace.shapes[node.inputs[0]])
        return list(node.attrs.get("perm", range(rank)[::-1])).index(axis)
    before, after = trace.shapes[node.inputs[0]], trace.shapes[node.outputs[0]]
    ahead = math.prod(before[:axis])
    candidates = [i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == ahead]
    return candidates[-1] if candidates else None


def _fold(graph: Graph, trace: Trace, constants: set[str], output: str) -> None:
    """Compute values that depend neither on data nor on weights, and store them as constants.

    That includes shape arithmetic that doesn't depend on the batch; it has full widths, also in a cut graph.
    """
    constant_values = {n: graph.initializers[n] for n in constants if n in graph.initializers}
    for name, marks in size_marks(graph, trace, constant_values, trace.batched).items():
        if name in trace.integers and not marks.any():
            constant_values[name] = trace.integers[name]
    static: set[str] = set()
    for node in graph.nodes:
        reads = [i for i in node.inputs if i]
        if (
            # Folding would freeze one draw of random numbers, or remove a dropout.
            node.op not in RANDOM_OPERATORS
            and not is_dropout(node)
            and all(i in constant_values or i in static for i in reads)
            and not all(o in constant_values for o in node.outputs if o)
        ):
            static.update(o for o in node.outputs if o)
    if static:
        constant_values.update(_evaluate(graph, constant_values, static, trace))
    folded = {o for n in graph.nodes for o in n.outputs if o in constant_values and o != output}
    graph.nodes = [n for n in graph.nodes if not all(o in folded for o in n.outputs if o)]
    for name in folded:
        graph.initializers[name] = np.array(constant_values[name], order="C")
        constants.add(name)


def _evaluate(graph: Graph, constant_values: Mapping[str, Array], static: set[str], trace: Trace) -> dict[str, Array]:
    names = sorted(static)
    static_graph = Graph(
        outputs=[Port(n, trace.dtypes[n], trace.shapes[n]) for n in names],
        nodes=[n for n in graph.copy().nodes if any(o in static for o in n.outputs)],
        initializers=dict(constant_values),
        opset=graph.opset,
    )
    static_graph.prune()
    return OnnxSession(static_graph.to_bytes()).run({}, names)


def _name_nodes(graph: Graph) -> None:
    used_names: set[str] = set()
    for node in graph.nodes:
        if not node.name or node.name in used_names:
            node.name = node.outputs[0]
        while node.name in used_names:
            node.name += "_"
        used_names.add(node.name)


def _check_types(graph: Graph, trace: Trace) -> None:
    for node in graph.nodes:
        for name in node.outputs:
            if name and trace.dtypes[name] in (np.dtype(np.float16), np.dtype(np.float64)):
                raise ModelError(
                    f"{node.op} {node.name} computes in {trace.dtypes[name]}",
                    expected="float32",
                    hint="Convert the model to float32 before exporting it.",
                )


def _check_finite(graph: Graph, kinds: Mapping[str, str]) -> None:
    """Refuse NaN in any tensor, and infinite weights, with a `ModelError`. Bounds and masks may be infinite."""
    for name, value in graph.initializers.items():
        if value.dtype.kind == "f" and (np.isnan(value).any() or (name in kinds and np.isinf(value).any())):
            raise ModelError(
                f"tensor {name}",
                expected="finite numbers",
                got="NaN" if np.isnan(value).any() else "an infinite number",
                hint="The training that made this model has failed; take an earlier state of it.",
            )
