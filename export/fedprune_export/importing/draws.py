"""Lets random numbers of a file be drawn by boards: each draw becomes a Dropout whose metadata says how it is drawn.

The Dropout's input is what evaluation takes instead: the mean, or the likelier value of a Bernoulli variable whose
probability is computed. So a model's predictions are the same from run to run, which a draw's would not be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.text import first_few, quantity
from fedprune.model.random_inputs import NORMAL, UNIFORM, Draw
from fedprune_export.importing import metadata
from fedprune_export.importing.graph_writer import GraphWriter, value_types
from fedprune_export.importing.translation import upgrade_model
from fedprune_export.ir.dropout import DRAWS_KEY, read_draws
from fedprune_export.ir.graph import NORMAL_OPSET, Array

# Operators that are drawn, with the names and defaults of what says how.
_NORMAL_ATTRIBUTES = {"mean": 0.0, "scale": 1.0}
_UNIFORM_ATTRIBUTES = {"low": 0.0, "high": 1.0}
_KINDS: dict[str, tuple[str, dict[str, float]]] = {
    "RandomNormal": (NORMAL, _NORMAL_ATTRIBUTES),
    "RandomNormalLike": (NORMAL, _NORMAL_ATTRIBUTES),
    "RandomUniform": (UNIFORM, _UNIFORM_ATTRIBUTES),
    "RandomUniformLike": (UNIFORM, _UNIFORM_ATTRIBUTES),
    "Bernoulli": (UNIFORM, _UNIFORM_ATTRIBUTES),
}


def rewrite_draws(proto: onnx.ModelProto, raw: bytes, notes: list[str]) -> tuple[onnx.ModelProto, bytes]:
    """Let a file's random numbers be inputs of a training step. Returns the model and the file that it is compared
    with, whose draws are at their means, too; `notes` gets a sentence on it."""
    if not any(node.op_type in _KINDS and node.domain in ("", "ai.onnx") for node in proto.graph.node):
        return proto, raw
    model = onnx.ModelProto()
    model.CopyFrom(upgrade_model(proto))
    writer = _Draws(model)
    writer.write()
    before = {name: draw.to_json() for name, draw in read_draws(metadata.read_properties(model)).items()}
    metadata.write_properties(model, {DRAWS_KEY: json.dumps(before | writer.draws)})
    notes.append(
        f"Boards train with {quantity(len(writer.drawn), 'draw')} of random numbers "
        f"({first_few(list(dict.fromkeys(writer.drawn)))}), as the model has them. Predictions and evaluation take the "
        "mean of each instead, so that they can be repeated."
    )
    return model, model.SerializeToString()


class _Draws(GraphWriter):
    """Replaces draws of random numbers.

    Attributes:
        draws: How each Dropout with random numbers of its own is drawn, by its name.
        drawn: The operator of each draw that was replaced.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model, NORMAL_OPSET)
        self._types = value_types(model)
        self.draws: dict[str, Any] = {}
        self.drawn: list[str] = []

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        if node.op_type not in _KINDS or node.domain not in ("", "ai.onnx"):
            return [node]
        self.drawn.append(node.op_type)
        kind, defaults = _KINDS[node.op_type]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        numbers = (float(attributes.get(name, default)) for name, default in defaults.items())
        # Attributes are float32, which is meant as the decimal number that it is nearest to.
        draw = Draw(kind, *(float(f"{number:.6g}") for number in numbers))
        is_bernoulli = node.op_type == "Bernoulli"
        # The only probability of a Bernoulli variable; None if it has several, or they are computed.
        filling = self._filling(node.input[0]) if is_bernoulli else None
        shares = np.unique([] if filling is None else filling.astype(np.float64))
        share = float(f"{shares[0]:.6g}") if shares.size == 1 and 0 <= shares[0] <= 1 else None
        target = node.output[0]
        value = self._names.fresh(f"{target}.drawn")
        nodes = self._shape_nodes(node, attributes.get("shape"), f"{value}.shape")
        mean = numpy_helper.from_array(np.array([draw.mean if share is None else share], np.float32))
        nodes.append(helper.make_node("ConstantOfShape", [f"{value}.shape"], [f"{value}.mean"], value=mean))
        if share is None:
            nodes.append(helper.make_node("Dropout", [f"{value}.mean"], [value], name=value))
            self.draws[value] = draw.to_json()
        else:
            # A dropout of the mean gives 0 or 1.
            ratio = self._constant(np.array(1 - share, np.float32), f"{value}.ratio")
            nodes += [ratio, helper.make_node("Dropout", [f"{value}.mean", ratio.output[0]], [value], name=value)]
        if is_bernoulli and share is None:
            nodes.append(helper.make_node("Less", [value, node.input[0]], [f"{value}.is_less"]))
            value = f"{value}.is_less"
        element_type = attributes.get("dtype") or self._types.get(next(iter(node.input), ""), onnx.TensorProto.FLOAT)
        return [*nodes, helper.make_node("Cast", [value], [target], to=element_type)]

    def _shape_nodes(self, node: onnx.NodeProto, shape: Sequence[int] | None, target: str) -> list[onnx.NodeProto]:
        """Nodes that compute the shape of a draw: that of its input, or a constant one.

        A file with a fixed batch has it in constant shapes, too: there it is that of the input, so that every sample
        has random numbers of its own.
        """
        if shape is None:
            shape = self._filled_shape(node.input[0])
        if shape is None:
            return [helper.make_node("Shape", [node.input[0]], [target])]
        samples = self._graph.input[0].name
        if len(shape) < 2 or self._size(samples, 0) != shape[0]:
            constant = self._constant(np.array(shape, np.int64), target)
            constant.output[0] = target
            return [constant]
        rest = self._constant(np.array(shape[1:], np.int64), f"{target}.rest")
        whole = helper.make_node("Shape", [samples], [f"{target}.samples"])
        first = self._constant(np.array([0], np.int64), f"{target}.first")
        batch = helper.make_node("Gather", [f"{target}.samples", first.output[0]], [f"{target}.batch"])
        return [rest, whole, first, batch, helper.make_node("Concat", [*batch.output, *rest.output], [target], axis=0)]

    def _filled_shape(self, name: str) -> Sequence[int] | None:
        """The shape of a value that is filled with a constant, if it depends on no free size."""
        while (maker := self._maker(name)) is not None and maker.op_type in ("Cast", "CastLike"):
            name = maker.input[0]
        if maker is None or maker.op_type not in ("Expand", "ConstantOfShape"):
            filling = self._filling(name)
            return None if filling is None else filling.shape
        filling, sizes = self._filling(name), self._constant_value(maker.input[-1])
        if filling is None or sizes is None:
            return None
        return np.broadcast_shapes(filling.shape, [*map(int, sizes)])

    def _filling(self, name: str) -> Array | None:
        """What a value is filled with, before it gets its shape; None if it is computed from data."""
        while name not in self._tensors:
            maker = self._maker(name)
            if maker is None or maker.op_type not in ("Constant", "ConstantOfShape", "Cast", "CastLike", "Expand"):
                return None
            if maker.op_type.startswith("Constant"):
                value = next((helper.get_attribute_value(a) for a in maker.attribute), 0.0)
                return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
            name = maker.input[0]
        return numpy_helper.to_array(self._tensors[name])
