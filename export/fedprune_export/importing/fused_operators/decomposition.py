"""Writes the operators that each fused node of a graph stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune_export.importing.fused_operators import activations, attention, linear_layers, norms
from fedprune_export.importing.fused_operators.fused_node import RULES, FusedNode
from fedprune_export.importing.fused_operators.stand_ins import FUSED_DOMAIN
from fedprune_export.ir.drafts import NORMAL_OPSET
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.opset_lowering import lower_to_opset
from fedprune_export.ir.shape_inference import InferredShapes, ShapeError, infer_node, set_value
from fedprune_export.ir.trace import run_values

# The files whose rules are registered when they are imported.
RULE_FILES = (activations, attention, linear_layers, norms)

# Operators that are taken apart.
DECOMPOSED = frozenset(RULES)

# Of these onnxruntime has kernels for GPUs only, so that it can't run a file with them here.
_WITHOUT_CPU_KERNEL = frozenset(
    {"BiasAdd", "BiasDropout", "BiasSoftmax", "BiasSplitGelu", "GemmFastGelu", "GroupNorm", "NhwcConv", "NhwcFusedConv"}
    | {"NhwcMaxPool", "SkipGroupNorm"}
)

_BLOCKED_DOMAIN = "com.microsoft.nchwc"

# Batches for which the shapes before a fused node are inferred: the inside of a file may be made for one of them.
_TRIAL_BATCHES = (3, 1, 2, 4, 8, 16, 32, 64, 128)


def decompose_fused(graph: Graph, raw: bytes, notes: list[str]) -> tuple[Graph, bytes]:
    """A graph in which each fused node is the operators that it stands for, and the file to compare it with.

    The file stays as it is, unless onnxruntime can't run it on a CPU: then the operators without a kernel are taken
    apart in it, too. Raises `ModelError` if a node is in a form that can't be taken apart.
    """
    _check_layout(graph)
    counts = Counter(n.op for n in graph.nodes if _is_fused(n, DECOMPOSED))
    if not counts:
        return graph, raw
    unrunnable = sorted(counts.keys() & _WITHOUT_CPU_KERNEL)
    if unrunnable:
        raw = _decomposed(graph, _WITHOUT_CPU_KERNEL).to_bytes()
        notes.append(
            f"onnxruntime runs {first_few(unrunnable)} on GPUs only: the import was compared with what they stand for."
        )
    total = counts.total()
    operators = f"{total} fused operators" if total > 1 else "A fused operator"
    notes.append(f"{operators} ({first_few(sorted(counts))}) {'were' if total > 1 else 'was'} taken apart.")
    return _decomposed(graph, DECOMPOSED), raw


def _check_layout(graph: Graph) -> None:
    """Refuse weights that are stored in blocks of channels, as one kind of processor reads them (`ModelError`)."""
    node = next((n for n in graph.nodes if n.domain == _BLOCKED_DOMAIN), None)
    if node is not None:
        raise ModelError(
            f"{node.op} {value_text(node.name or node.outputs[0])} has its weights in blocks of channels: onnxruntime "
            "wrote the file for one kind of processor",
            hint="Write it with graph_optimization_level = ORT_ENABLE_EXTENDED, or give the file as it was before.",
        )


def _is_fused(node: Node, operators: frozenset[str]) -> bool:
    return node.domain == FUSED_DOMAIN and node.op in operators


def _decomposed(graph: Graph, operators: frozenset[str]) -> Graph:
    """A copy of a graph in which nodes with these operators are taken apart."""
    errors: list[ShapeError] = []
    for batch in _TRIAL_BATCHES:
        try:
            return _Decomposition(graph, batch).write(operators)
        except ShapeError as error:  # noqa: PERF203
            errors.append(error)
    raise errors[0]


class _Decomposition:
    """Writes a graph node by node, and infers the shapes that rules read."""

    def __init__(self, source: Graph, batch: int) -> None:
        self._source, self._batch = source, batch
        self._graph = source.copy_without_nodes()
        # Nodes of opsets 13 to 16 mean the same at 17, which has LayerNormalization.
        self._graph.opset = max(source.opset, NORMAL_OPSET)
        self._shapes = InferredShapes()
        self._read_values = frozenset({p.name for p in source.outputs} | {i for n in source.nodes for i in n.inputs})
        for port in source.inputs:
            self._shapes.shapes[port.name] = tuple(d if isinstance(d, int) else batch for d in port.shape)
            self._shapes.dtypes[port.name] = port.dtype
        self._add_constants(source)

    def write(self, operators: frozenset[str]) -> Graph:
        last = max((i for i, n in enumerate(self._source.nodes) if _is_fused(n, operators)), default=-1)
        for index, node in enumerate(self._source.nodes):
            if _is_fused(node, operators):
                self._append(self._operators_of(node))
            elif index < last:
                self._append([node.copy()])
            else:  # no rule reads the shapes of what follows
                self._graph.nodes.append(node.copy())
        return self._graph

    def _operators_of(self, node: Node) -> Sequence[Node]:
        """The nodes that replace a fused one, in the forms of the graph's opset."""
        # Rules write opset 17, whatever the file's is.
        draft = self._graph.copy_without_nodes()
        draft.opset = NORMAL_OPSET
        fused = FusedNode(node, draft, self._shapes, self._read_values)
        try:
            RULES[node.op](fused)
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, ModelError):
                raise
            fused.refuse("its inputs or attributes are none that the operator takes")
        if self._graph.opset != NORMAL_OPSET:
            draft = lower_to_opset(draft, self._graph.opset)
        written, nodes = self._graph.nodes, draft.nodes
        opset = self._graph.opset
        self._graph = draft.copy_without_nodes()
        self._graph.nodes, self._graph.opset = written, opset
        self._add_constants(self._graph)
        return nodes

    def _append(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            outputs = [o for o in node.outputs if o]
            infer_node(self._graph, self._shapes, node, outputs)
            self._graph.nodes.append(node)
            missing = [o for o in outputs if o not in self._shapes.shapes]
            if missing:
                for name, value in run_values(self._graph, missing, self._batch).items():
                    set_value(self._shapes, name, value)
                self._shapes.missing.clear()

    def _add_constants(self, graph: Graph) -> None:
        for name, value in graph.initializers.items():
            if name not in self._shapes.shapes:
                set_value(self._shapes, name, value)
