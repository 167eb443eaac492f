"""Writes a quantised file as the file of the float model that it approximates."""

from __future__ import annotations

import json

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune_export.importing import metadata
from fedprune_export.importing.draws import rewrite_draws
from fedprune_export.importing.model_building import parse_inlined
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.importing.quantised.integer_products import PRODUCT_RULES, scaled_sum
from fedprune_export.importing.quantised.numbers import refuse
from fedprune_export.importing.quantised.operators import OPERATOR_RULES
from fedprune_export.importing.quantised.proof import prove
from fedprune_export.importing.quantised.rewriter import Rewriter, Rule
from fedprune_export.pruning.model import ACTIVATION_RANGES_KEY

RULES: dict[str, Rule] = {**OPERATOR_RULES, **PRODUCT_RULES}
# Operators on integers without a rule.
_REFUSED = frozenset(
    {"QEmbedLayerNormalization", "QLinearReduceMin", "QMoE", "QOrderedMatMul"}
    | {"QLinearConvTranspose", "GatherBlockQuantized", "MatMulBnb4", "BiasDequantizeLinear"}
)
_DOMAINS = ("", "ai.onnx", "com.microsoft")


def float_file(raw: bytes) -> bytes:
    """The file of the float model that a quantised file approximates; the same bytes if it isn't quantised.

    Raises `ModelError` if it computes with integers in a way that has no float form here, or what was written doesn't
    compute what the file does, up to the file's own rounding.
    """
    if not _is_quantised(parse_model(raw, run_checker=False)):
        return raw
    file_notes = list[str]()
    # A draw has another number in each of two runs, and means what it does on floats.
    proto, _ = rewrite_draws(parse_inlined(raw, file_notes), raw, file_notes)
    state = Rewriter(proto)
    _rewrite(state)
    floats = state.write(state.graph)
    prove(state, floats)
    ranges = _activation_ranges(state)
    texts = {metadata.TRAINING_NOTES_KEY: json.dumps([*_notes(state, floats, has_ranges=bool(ranges)), *file_notes])}
    if ranges:
        texts[ACTIVATION_RANGES_KEY] = json.dumps(ranges)
    metadata.write_properties(floats, texts)
    out: bytes = floats.SerializeToString(deterministic=True)
    return out


def _is_quantised(file: onnx.ModelProto) -> bool:
    operators = RULES.keys() | _REFUSED
    pending = [file.graph.node, *(f.node for f in file.functions)]
    while pending:
        for node in pending.pop():
            if node.op_type in operators and node.domain in _DOMAINS:
                return True
            pending += [graph.node for graph in inner_graphs(node)]
    return False


def _rewrite(state: Rewriter) -> None:
    for node in list(state.file.nodes):
        is_known = node.domain in _DOMAINS
        if is_known and node.op in _REFUSED:
            raise refuse(node, "has no float form here")
        rule = RULES.get(node.op) if is_known else None
        if rule is not None:
            rule(state, node)
        elif not scaled_sum(state, node):
            state.keep(node)
    for port in state.graph.outputs:
        if port.name in state.quantisations:
            number = state.number(port.name, state.quantisations[port.name])
            state.emit("Identity", number, out=port.name)
            port.dtype = np.dtype(np.float32)
    state.graph.prune()
    _check_complete(state)


def _check_complete(state: Rewriter) -> None:
    """Make sure that nothing reads integers that have become numbers."""
    graph = state.graph
    written = {p.name for p in graph.inputs} | graph.initializers.keys() | {o for n in graph.nodes for o in n.outputs}
    for node in graph.nodes:
        if not written.issuperset(filter(None, node.inputs)):
            raise refuse(node, "reads what only the quantised file computes")
    for port in graph.outputs:
        if port.name not in written:
            raise ModelError(f"the file is quantised, and its output {value_text(port.name)} is a sum of integers")


def _activation_ranges(state: Rewriter) -> dict[str, tuple[float, float]]:
    """What numbers the file has for activations, at most; an export with 8 bits may begin with them."""
    ranges = {}
    for rounding in state.roundings:
        if rounding.quantisation is None or rounding.bounds is None:
            continue
        scale, zero = (state.constant(n) for n in (rounding.quantisation.scale, rounding.quantisation.zero))
        if scale is None or scale.size != 1 or rounding.value in state.graph.initializers:
            continue
        offset = 0.0 if zero is None else float(zero.reshape(-1)[0])
        low, high = (float(scale.reshape(-1)[0]) * (bound - offset) for bound in rounding.bounds)
        ranges[rounding.value] = low, high
    return ranges


def _notes(state: Rewriter, floats: onnx.ModelProto, *, has_ranges: bool) -> list[str]:
    tensors, roundings = len(state.weights), len(state.roundings)
    summary = (
        "The file is quantised, and trained in float32: tensors that were dequantised: "
        f"{tensors}; roundings that were left out: {roundings}. --precision int8 (precisions) makes boards predict "
        f"with 8 bits again{'' if has_ranges else ', with samples (--data) for the ranges that the file lacks'}."
    )
    notes = [*metadata.training_notes(metadata.read_properties(floats)), summary]
    if state.clippings:
        ends = sorted({f"Clip to {c.end:g}" if c.end is not None else "Relu" for c in state.clippings})
        places = first_few(list(dict.fromkeys(c.maker for c in state.clippings)), max_names=3)
        notes.append(
            f"The ranges of the file's quantisation begin at 0 behind {places}, where quantisers leave out a Relu or "
            f"Clip: it is written again ({', '.join(ends)})."
        )
    return notes
