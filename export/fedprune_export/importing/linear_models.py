"""Writes the linear models of scikit-learn's exporter (`ai.onnx.ml`) with operators that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.graph_writer import GraphWriter
from fedprune_export.ir.graph import NORMAL_OPSET, Array, read_opset

ML_DOMAIN = "ai.onnx.ml"
# No operator of them has weights whose gradient could be taken.
_UNTRAINABLE = {
    **dict.fromkeys(("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"), "decision trees"),
    **dict.fromkeys(("SVMClassifier", "SVMRegressor"), "stored training samples"),
}
LINEAR_OPERATORS = frozenset({"LinearClassifier", "LinearRegressor", "Scaler", *_UNTRAINABLE})
# Scores are what these make of weighted sums; the others (SOFTMAX_ZERO, PROBIT) have no operator of ONNX.
_TRANSFORMS = {"NONE": "Identity", "SOFTMAX": "Softmax", "LOGISTIC": "Sigmoid"}


def without_linear_models(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model whose linear models and scalers are Gemm, Softmax or Sigmoid, ArgMax, Sub and Mul.

    Raises `ModelError` if one has attributes that don't fit each other or a transform without such an operator, and for
    estimators that no gradient trains.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    opset = read_opset(out)
    if not opset:  # a file of a linear model alone
        out.opset_import.append(helper.make_opsetid("", NORMAL_OPSET))
    _LinearModels(out, opset or NORMAL_OPSET).write()
    return out


class _LinearModels(GraphWriter):
    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        super().__init__(model, opset)
        self._probabilities = set[str]()  # values whose rows sum to 1

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        rules = {"LinearClassifier": self._classifier, "LinearRegressor": self._regressor, "Scaler": self._scaler}
        if node.domain != ML_DOMAIN:
            return [node]
        if node.op_type in _UNTRAINABLE:
            raise ModelError(
                f"{node.op_type} {value_text(node.name or node.output[0])} is made of {_UNTRAINABLE[node.op_type]}",
                expected="a model that gradient descent trains",
                hint="Fit a linear model or a network (such as MLPClassifier) to the same data, and export that.",
            )
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Normalizer" and node.input[0] in self._probabilities and attrs.get("norm") == b"L1":
            return [helper.make_node("Identity", node.input, node.output)]
        return rules[node.op_type](node, attrs) if node.op_type in rules else [node]

    def _classifier(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> list[onnx.NodeProto]:
        names = [bytes(name).decode() for name in attrs.get("classlabels_strings", [])]
        labels = np.array(names, object) if names else np.array(attrs.get("classlabels_ints", []), np.int64)
        attrs = _of_two_classes(attrs)
        sums, nodes = self._weighted_sums(node, attrs, len(labels))
        label, scores = [*node.output, ""][:2]
        if scores:
            nodes.append(self._transformed(node, attrs, sums, scores))
            if attrs.get("post_transform") == b"SOFTMAX":
                self._probabilities.add(scores)
        if label:
            # Scores keep the order of the sums, so the likeliest class is that of the largest sum.
            best, listed = self._names.fresh(f"{label}.best"), self._tensor(labels, f"{label}.classes")
            nodes.append(helper.make_node("ArgMax", [sums], [best], axis=1, keepdims=0))
            nodes.append(helper.make_node("Gather", [listed, best], [label], axis=0))
        return nodes

    def _regressor(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> list[onnx.NodeProto]:
        sums, nodes = self._weighted_sums(node, attrs, int(attrs.get("targets", 1)))
        return [*nodes, self._transformed(node, attrs, sums, node.output[0])]

    def _scaler(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> list[onnx.NodeProto]:
        stem, centred = node.output[0], self._names.fresh(f"{node.output[0]}.centred")
        offset, scale = (self._tensor(np.array(attrs[k], np.float32), f"const~{stem}.{k}") for k in ("offset", "scale"))
        value, cast = self._floats(node)
        return [
            cast,
            helper.make_node("Sub", [value, offset], [centred]),
            helper.make_node("Mul", [centred, scale], [stem]),
        ]

    def _weighted_sums(
        self, node: onnx.NodeProto, attrs: dict[str, Any], rows: int
    ) -> tuple[str, list[onnx.NodeProto]]:
        """The sums of a node's inputs with its coefficients, [n, rows], and the node that computes them."""
        coefficients = np.array(attrs.get("coefficients", []), np.float32)
        intercepts = np.array(attrs.get("intercepts", [0] * rows), np.float32)
        if not rows or not coefficients.size or coefficients.size % rows or len(intercepts) != rows:
            raise ModelError(
                f"{node.op_type} {value_text(node.name)}",
                expected="a row of coefficients and an intercept for each class or target",
                got=f"{coefficients.size} coefficients and {len(intercepts)} intercepts for {rows}",
            )
        stem = node.name or node.op_type
        weight = self._tensor(coefficients.reshape(rows, -1), f"{stem}.weight")
        bias = self._tensor(intercepts, f"{stem}.bias")
        sums = self._names.fresh(f"{stem}.sums")
        value, cast = self._floats(node)
        return sums, [cast, helper.make_node("Gemm", [value, weight, bias], [sums], name=stem, transB=1)]

    def _floats(self, node: onnx.NodeProto) -> tuple[str, onnx.NodeProto]:
        """A node's input as float32, and the node that makes it: linear models read whole numbers, too."""
        value = self._names.fresh(f"{node.output[0]}.floats")
        return value, helper.make_node("Cast", [node.input[0]], [value], to=onnx.TensorProto.FLOAT)

    def _transformed(self, node: onnx.NodeProto, attrs: dict[str, Any], sums: str, target: str) -> onnx.NodeProto:
        transform = bytes(attrs.get("post_transform", b"NONE")).decode()
        if transform not in _TRANSFORMS:
            raise ModelError(
                f"post_transform of {node.op_type} {value_text(node.name)}",
                expected=", ".join(_TRANSFORMS),
                got=value_text(transform),
                hint="Export the classifier with raw scores.",
            )
        axis: dict[str, Any] = {"axis": 1} if transform == "SOFTMAX" else {}
        return helper.make_node(_TRANSFORMS[transform], [sums], [target], **axis)

    def _tensor(self, value: Array, name: str) -> str:
        name = self._names.fresh(name)
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def _of_two_classes(attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a classifier of two opposite sums with LOGISTIC as those of the equal one with SOFTMAX.

    1 / (1 + e^-z) is the softmax of -z/2 and z/2: so all numbers of classes have one loss.
    """
    coefficients, intercepts = (np.array(attrs.get(k, []), np.float32) for k in ("coefficients", "intercepts"))
    halves = [np.split(values, 2) for values in (coefficients, intercepts) if values.size % 2 == 0]
    is_opposite = len(halves) == 2 and len(intercepts) == 2 and all(np.array_equal(a, -b) for a, b in halves)
    if attrs.get("post_transform") != b"LOGISTIC" or not is_opposite:
        return attrs
    return {**attrs, "coefficients": coefficients / 2, "intercepts": intercepts / 2, "post_transform": b"SOFTMAX"}
