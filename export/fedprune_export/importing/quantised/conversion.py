"""Writes a quantised file as the file of the float model that it approximates."""

from __future__ import annotations

import json

import onnx

from fedprune_export.importing import metadata
from fedprune_export.importing.draws import rewrite_draws
from fedprune_export.importing.model_building import as_model_errors, parse_inlined
from fedprune_export.importing.quantised.clippings import LOST_CLIPS_NOTE, write_clippings
from fedprune_export.importing.quantised.proof import QuantisedProof
from fedprune_export.importing.quantised.rules import FloatWriter, refuse
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.model import ACTIVATION_RANGES_KEY

# How the names of operators on integers begin. Those without a rule, such as QLinearConv, are refused.
_QUANTISED = (
    *("ConvInteger", "DequantizeLinear", "DynamicQuantize", "GatherBlockQuantized", "MatMulBnb4", "MatMulInteger"),
    *("MatMulNBits", "QAttention", "QEmbedLayer", "QGemm", "QLinear", "QMoE", "QOrdered", "QuantizeLinear"),
)


@as_model_errors()
def float_file(raw: bytes) -> bytes:
    """The file of the float model that a quantised file approximates; the same bytes if it isn't quantised.

    Raises `ModelError` if it computes with integers in a way that has no float form here, or what was written doesn't
    compute what the file does, up to the file's own rounding.
    """
    # Names are in a file as they are. Most files have none of these, and needn't be read once more.
    if not any(name.encode() in raw for name in _QUANTISED):
        return raw
    file_notes = list[str]()
    # A draw has another number in each of two runs, and means what it does on floats.
    proto = parse_inlined(raw)
    file = Graph.from_proto(proto)
    rewrite_draws(file, file_notes)
    if not any(node.op.startswith(_QUANTISED) for node in file.nodes):
        return raw

    def write(graph: Graph) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(proto)
        model.graph.CopyFrom(graph.to_unlowered_proto().graph)
        return model

    writer = FloatWriter(file)
    floats = writer.graph
    if (left := next((n for n in floats.nodes if n.op.startswith(_QUANTISED)), None)) is not None:
        raise refuse(left, "computes with integers")
    roundings = {o: writer.roundings[o] for n in floats.nodes for o in n.outputs if o in writer.roundings}
    proof = QuantisedProof(file, floats, roundings, write)
    clippings = write_clippings(floats, roundings, proof.least_numbers())
    proof.check()
    passed = [(n, r.range) for n in floats.nodes if (r := roundings.get(n.outputs[0])) and r.range is not None]
    ranges = {(n.inputs if n.op == "Identity" else n.outputs)[0]: bounds for n, bounds in passed}
    summary = (
        "The file is quantised, and trained in float32: tensors that were dequantised: "
        f"{len(writer.weights)}; roundings that were left out: {len(roundings)}. --precision int8 (precisions) makes "
        "boards predict with 8 bits again"
        f"{'' if ranges else ', with samples (--data) for the ranges that the file lacks'}."
    )
    model = write(floats)
    notes = [*metadata.training_notes(metadata.read_properties(model)), summary, *clippings, *file_notes]
    texts = dict(floats.metadata)
    if ranges:
        notes.append(LOST_CLIPS_NOTE)
        texts[ACTIVATION_RANGES_KEY] = json.dumps(ranges)
    texts[metadata.TRAINING_NOTES_KEY] = json.dumps(notes)
    metadata.write_properties(model, texts)
    out: bytes = model.SerializeToString(deterministic=True)
    return out
