"""Normalises an ONNX model: a graph of few operators, with one input `x`, one output `logits`, opset 17.

The rest of the compiler then needn't handle names that clash with reserved ones, shape arithmetic, operators that do
nothing at inference, and forms of an operator that differ between opsets. Weights keep their names and values.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from fedprune.core.errors import ModelError
from fedprune.core.text import first_few, quantity
from fedprune.model.input_type import InputType
from fedprune.model.step_contract import LOGITS, RESERVED_NAMES, X
from fedprune_export.importing import parameter_roles
from fedprune_export.importing.batches import free_batch
from fedprune_export.importing.checks import Original, check_indices, check_nodes, compare_with_original
from fedprune_export.importing.constants import (
    fold_constants,
    guard_zero_norms,
)
from fedprune_export.importing.draws import merge_masks
from fedprune_export.importing.fused_operators import take_apart
from fedprune_export.importing.lengths import compute_lengths
from fedprune_export.importing.metadata import REPEATED_KEY
from fedprune_export.importing.number_types import store_weights
from fedprune_export.importing.packing import pack_inputs, pack_outputs
from fedprune_export.importing.pad_resize import drop_empty_scales
from fedprune_export.importing.patterns import replace_patterns
from fedprune_export.importing.refusals import check_output, check_random, check_trainable
from fedprune_export.importing.sample_shapes import check_sizes
from fedprune_export.importing.scatter_writes import rewrite_scatter_writes
from fedprune_export.importing.simplification import simplify
from fedprune_export.importing.spectral_norms import fold_spectral_norms
from fedprune_export.importing.translation import translate
from fedprune_export.importing.transpositions import merge_transpositions
from fedprune_export.importing.value_inference import graph_shapes
from fedprune_export.ir.bypass import bypass, drop_identities
from fedprune_export.ir.dropout import dropout_ratio, is_dropout, read_draws, remove_dropouts
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import Trace, trace_graph

_PRODUCT_OPERATORS = ("Gemm", "MatMul")


@dataclass
class Normalised:
    """A graph in the compiler's form.

    Attributes:
        parameters: The role of every weight and statistic (a `TensorKind` value), in the order of first use.
        notes: Changes that a user may want to know.
        names: The new names of values and tensors that were renamed, by the old ones.
    """

    graph: Graph
    parameters: dict[str, str]
    trace: Trace
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def normalise(graph: Graph, parameters: frozenset[str] | None, raw: bytes, *, own_loss: bool = False) -> Normalised:
    """Bring a file's graph, which may be changed, into the compiler's form and check that it still computes the same.

    Several inputs are packed into one; the mask and lengths of padded samples are computed. Raises `ModelError` if the
    model has several outputs, a batch that can't be made free, control flow that depends on data, or operators that
    opset 17 has no form of.

    Args:
        parameters: Names of the trainable initialisers where the source knows them; then initialisers shared by several
            nodes are truly tied. Otherwise parameters are recognised by their use.
        raw: The file that the graph was read from. The graph has to compute what onnxruntime computes by it.
        own_loss: Whether the model has a loss of its own, which takes outputs as they are: several are packed into one
            instead of being refused.
    """
    if not graph.nodes:
        raise ModelError("the model has no operators")
    notes: list[str] = []
    check_nodes(graph)
    drop_empty_scales(graph)
    store_weights(graph)
    check_sizes(graph)
    # Roles of weights, the free batch and all that follows read operators of the standard only.
    graph = take_apart(graph, graph_shapes, notes)
    constants = parameter_roles.constants_of(graph, notes if parameters is None else [])
    file_inputs, file_outputs = [p.name for p in graph.inputs], [p.name for p in graph.outputs]
    _name_nodes(graph)
    graph.prune()
    graph, layout = free_batch(graph, raw, notes)
    compute_lengths(graph, notes)
    pack_inputs(graph, notes)
    if own_loss:
        pack_outputs(graph, notes)
    _check_ports(graph, notes)
    constants |= {n for n in graph.initializers if n.startswith(parameter_roles.CONSTANT_PREFIX)}
    _name_nodes(graph)
    # At this point the graph begins with the packing of inputs: `Original` takes the file's inputs from it.
    row_graph = graph.copy()
    graph.prune()
    rewrite_dropouts(graph, notes)
    drop_identities(graph)
    plain = parameter_roles.plain_numbers(graph)
    scalars = {n for n in plain - constants if parameters is None and graph.initializers[n].dtype == np.float32}
    constants |= plain
    if parameters is not None:
        constants = {n for n in graph.initializers if n not in parameters}
    names = _rename(graph, constants, notes)
    repeated = {names.get(n, n) for n in graph.metadata.pop(REPEATED_KEY, "").split("\n")}
    listed = set(graph.initializers) - constants if parameters is not None else None
    graph.prune()
    # Check sizes before anything is run: the trace refuses values that would fill the memory.
    graph_trace = trace_graph(graph)
    check_indices(graph, graph_trace)
    check_output(graph, graph_trace, {new: old for old, new in names.items()})
    # onnxruntime allocates whatever a file asks for, so it loads the file only after the trace has bounded all sizes.
    original = Original(raw, file_inputs, file_outputs, row_graph, layout)
    # After this each operator has one form, and constants are folded.
    _simplify(graph, graph_trace, constants, notes, LOGITS)
    merge_masks(graph, graph_trace)
    fold_spectral_norms(graph, constants, listed, notes)
    drop_identities(graph)
    check_random(graph)
    guard_zero_norms(graph, constants)
    constants |= {n for n in graph.initializers if n.startswith(parameter_roles.CONSTANT_PREFIX)}
    if parameters is None:
        # A list of parameters says that shared tensors are truly tied; without one, exporters may have merged equal
        # values. All iterations of a loop read the same ones.
        parameter_roles.untie(graph, constants | repeated, notes)
        tie_tables(graph, constants, notes)
    roles = parameter_roles.find_roles(graph, constants, listed, notes)
    parameter_roles.note_scalars(graph, {names.get(s, s) for s in scalars}, notes)
    check_trainable(graph, roles)
    _check_finite(graph, roles)
    parameter_roles.name_constants(graph, roles)
    _name_nodes(graph)
    graph_trace = trace_graph(graph)
    # What reads the graph later sees how many classes there are.
    graph.outputs[0].shape = ("N", *graph_trace.dims(LOGITS)[1:])
    _check_types(graph, graph_trace)
    notes += compare_with_original(original, graph)
    return Normalised(graph, roles, graph_trace, notes, names)


def simplify_graph(graph: Graph, output: str) -> None:
    """Bring a graph without weights into the compiler's form. Raises `ModelError` if it computes in other types than
    float32, or with operators that opset 17 has no form of."""
    check_nodes(graph)
    _name_nodes(graph)
    remove_dropouts(graph)
    drop_identities(graph)
    graph.prune()
    graph_trace = trace_graph(graph)
    check_indices(graph, graph_trace)
    _simplify(graph, graph_trace, set(graph.initializers), [], output)
    _name_nodes(graph)
    _check_types(graph, trace_graph(graph))


def _simplify(graph: Graph, trace: Trace, constants: set[str], notes: list[str], output: str) -> None:
    """Fold constants, write each operator in one form, and recognise norms and activations in primitives."""
    _drop_casts(graph, trace)
    fold_constants(graph, trace, constants, output)
    translate(graph, trace, notes)
    rewrite_scatter_writes(graph, trace, constants, notes)
    simplify(graph, trace, constants)
    merge_transpositions(graph, trace)
    drop_identities(graph)
    graph.prune()
    constants |= {n for n in graph.initializers if n.startswith(parameter_roles.CONSTANT_PREFIX)}
    composites = replace_patterns(graph, trace, constants)
    if composites == 1:
        notes.append("A norm or activation that was written out in primitives is one operator.")
    elif composites:
        notes.append(f"{composites} norms and activations that were written out in primitives are one operator each.")


def _check_ports(graph: Graph, notes: list[str]) -> None:
    counts = f"{len(graph.inputs)} and {len(graph.outputs)}"
    if counts != "1 and 1":
        hint = "Export a model that maps a tensor to logits."
        raise ModelError("the model's inputs and outputs", expected="one input and one output", got=counts, hint=hint)
    port = graph.inputs[0]
    if port.dtype != np.float32 and port.dtype.kind not in "iub":
        raise ModelError(f"type of input {port.name}", expected="float32 or whole numbers", got=port.dtype)
    # Floats and int64 are what samples are anyway.
    if port.dtype not in (np.float32, np.int64):
        is_picture = port.dtype == np.uint8 and len(port.shape) == 4
        given = f": pictures are given as their pixels, {InputType(port.dtype)}" if is_picture else ""
        notes.append(f"The model takes samples of {port.dtype}, as the file does{given}.")


def _drop_casts(graph: Graph, trace: Trace) -> None:
    """Remove casts to the type that a value has already, and write each CastLike as a Cast."""
    idle = []
    for node in graph.nodes:
        if node.domain or node.op not in ("Cast", "CastLike"):
            continue
        before, after = trace.dtypes[node.inputs[0]], trace.dtypes[node.outputs[0]]
        if before == after:
            idle.append(node)
        elif node.op == "CastLike":
            node.op, node.inputs = "Cast", node.inputs[:1]
            node.attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(after))}
    bypass(graph, idle)


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


def _check_finite(graph: Graph, roles: Mapping[str, str]) -> None:
    """Refuse NaN in any tensor, and infinite weights, with a `ModelError`. Bounds and masks may be infinite."""
    for name, value in graph.initializers.items():
        if value.dtype.kind == "f" and (np.isnan(value).any() or (name in roles and np.isinf(value).any())):
            raise ModelError(
                f"tensor {name}",
                expected="finite numbers",
                got="NaN" if np.isnan(value).any() else "an infinite number",
                hint="The training that made this model has failed; take an earlier state of it.",
            )


def rewrite_dropouts(graph: Graph, notes: list[str]) -> None:
    """Write dropouts in the compiler's form, and remove those that drop nothing.

    If other operators read a dropout's mask, they get one that is all true. `notes` gets a sentence on what was done.
    """
    ratios: list[float] = []
    draws = read_draws(graph.metadata)
    outputs = {p.name for p in graph.outputs}
    readers = graph.consumers()
    nodes: list[Node] = []
    idle: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if not is_dropout(node) or node.name in draws:
            continue
        ratio = dropout_ratio(graph, node)
        mask = node.outputs[1] if len(node.outputs) > 1 else ""
        if mask and (mask in readers or mask in outputs):
            # The input equals itself, in the right shape at any batch size; only NaN doesn't.
            nodes.append(Node("Equal", [node.inputs[0], node.inputs[0]], [mask], {}, mask))
            notes.append(f"The mask of Dropout {node.name} is read by other operators: it is all true.")
        if ratio is None:
            notes.append(f"The ratio of Dropout {node.name} is computed: it drops nothing in training, either.")
        if ratio:
            ratios.append(ratio)
            node.inputs = [node.inputs[0], graph.scalar(ratio)]
        else:
            node.inputs = node.inputs[:1]
            idle.append(node)
        node.outputs, node.attrs = node.outputs[:1], {}
    graph.nodes = nodes
    bypass(graph, idle)
    if ratios:
        shares = ", ".join(f"{ratio:g}" for ratio in sorted(set(ratios)))
        notes.append(f"Boards train with {quantity(len(ratios), 'dropout')} of the model (ratio {shares}).")


def tie_tables(graph: Graph, constants: Container[str], notes: list[str]) -> None:
    """Let products read the table of an embedding where their weight has the same numbers, also transposed: exporters
    fold the transposition of a layer's weight, which makes a second tensor of a table that two layers share."""
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
