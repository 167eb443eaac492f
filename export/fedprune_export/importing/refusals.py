"""Refuses models that can't be trained, with the reason and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.model.architecture import TensorKind
from fedprune_export.ir.graph import Graph, node_label
from fedprune_export.ir.trace import Trace

RANDOM_OPERATORS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)

_KIND_NAMES = {"b": "booleans", "i": "whole numbers", "u": "whole numbers"}


def check_input_types(proto: onnx.ModelProto) -> None:
    """Refuse models of texts, with a `ModelError`."""
    for value in proto.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            raise ModelError(
                f"input {value_text(value.name)} consists of texts",
                expected="numbers, which boards can train on",
                hint="Turn the texts into numbers before the model, such as token ids, and export what follows that.",
            )


def check_random(graph: Graph) -> None:
    """Refuse graphs that draw random numbers, with a `ModelError`."""
    node = next((n for n in graph.nodes if n.op in RANDOM_OPERATORS and not n.domain), None)
    if node is not None:
        raise ModelError(
            f"{node_label(node)} draws random numbers, so that the model's output differs from run to run",
            hint="Export the model in evaluation mode (module.eval()), without what is random in it.",
        )


def check_output(graph: Graph, trace: Trace, names: Mapping[str, str]) -> None:
    """Refuse an output of integers or booleans, which has no gradient, with a `ModelError`. `names` are the names in
    the file of values that the import has renamed."""
    name, makers = graph.outputs[0].name, graph.producers()
    kind = _KIND_NAMES.get(trace.dtypes[name].kind)
    if kind is None:
        return
    maker = makers[name]
    # Back to the last value that still consists of floats: there the model has to end.
    while trace.dtypes[maker.inputs[0]].kind in _KIND_NAMES and maker.inputs[0] in makers:
        maker = makers[maker.inputs[0]]
    before = names.get(maker.inputs[0], maker.inputs[0])
    raise ModelError(
        f"the model's output consists of {kind}, which {node_label(maker)} makes",
        expected="numbers that a loss can follow, such as logits",
        hint=f"Let the model end before it: --output {before} (output={before!r}).",
    )


def check_trainable(graph: Graph, kinds: Mapping[str, str]) -> None:
    """Make sure that some tensor can be trained. Raises `ModelError` if none can."""
    if any(TensorKind(kind).is_trainable for kind in kinds.values()):
        return
    stored = [f"{n} ({v.dtype})" for n, v in graph.initializers.items() if v.size > 1]
    raise ModelError(
        "the model has no trainable tensor that its output depends on",
        expected="weights in float32",
        got=first_few(stored, max_names=3) if stored else "none",
        hint="Export the model with its weights, or list what is to be trained (--parameters FILE).",
    )
