"""A normalised graph run by torch, in any precision: an oracle for gradients of graphs that no torch module computes.

A cut graph has no module behind it. Its values are known to be right (they equal the masked whole model's), so torch's
own differentiation of the same operators, in float64, says what its gradients are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedprune_export.ir.graph import Graph
from support.oracles import torch_layers  # noqa: F401 (registers its operators)
from support.oracles.torch_operators import OPERATORS

Tensor = torch.Tensor


def run(graph: Graph, tensors: Mapping[str, Tensor], x: Tensor, *, training: bool) -> Tensor:
    """The logits of a normalised graph; the type of weights and statistics is the precision of everything.

    With `training` batch normalisations take the batch's statistics.
    """
    dtype = next(iter(tensors.values())).dtype
    values: dict[str, Any] = {graph.inputs[0].name: x if x.dtype == torch.int64 else x.to(dtype)}
    for name, constant in graph.initializers.items():
        if name not in tensors:
            value = torch.from_numpy(np.array(constant))
            values[name] = value.to(dtype) if value.is_floating_point() else value
    values.update(tensors)
    for node in graph.nodes:
        function = OPERATORS.get(node.op)
        if function is None or node.domain:
            raise NotImplementedError(f"{node.domain}::{node.op}")
        attributes = {**node.attrs, "_training": training, "_dtype": dtype, "_outputs": len(node.outputs)}
        out = function(attributes, *(values[i] if i else None for i in node.inputs))
        values.update(zip(node.outputs, out if isinstance(out, tuple) else (out,), strict=False))
    logits: Tensor = values[graph.outputs[0].name]
    return logits
