"""A normalised graph as a function in torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from fedprune.core.errors import ModelError
from fedprune_export.eager import arithmetic, layers, movement, recurrent
from fedprune_export.eager.context import OPERATORS, Context, Operator, Tensor
from fedprune_export.ir.graph import Graph, Node

__all__ = ["Context", "Program", "Tensor"]

_OPERATOR_MODULES = (arithmetic, layers, movement, recurrent)
"""They register their operators."""


class Program:
    """A graph at given widths, without its weights: `cut.at_widths`.

    Arrays of constants wait on the device, single numbers and whole ones (shapes, axes, indices) on the CPU.

    Args:
        graph: The graph.
        tensors: Names of the weights and statistics that every run brings.
        device: Where it runs: `cpu` or `cuda`.
        scaled: Names of values that are multiplied by a run's scale as soon as they are computed.

    Raises:
        ModelError: The graph has an operator that torch is not told about here; the message names it.
    """

    def __init__(
        self, graph: Graph, tensors: Collection[str], device: torch.device, *, scaled: Collection[str] = ()
    ) -> None:
        self._input, self._output = graph.inputs[0].name, graph.outputs[0].name
        self._tensors = frozenset(tensors)
        self._scaled = frozenset(scaled)
        self._nodes: list[tuple[Operator, Node]] = []
        for node in graph.nodes:
            function = OPERATORS.get(node.op) if node.domain in ("", "ai.onnx") else None
            if function is None:
                name = f"{node.domain}::{node.op}" if node.domain else node.op
                raise ModelError(
                    f"operator {name} (node {node.name}) is not supported by the torch trainer",
                    expected=f"one of {len(OPERATORS)} operators",
                    hint="Train with the trainer 'onnxruntime'.",
                )
            self._nodes.append((function, node))
        self._constants: dict[str, Any] = {}
        for name, value in graph.initializers.items():
            if name in self._tensors:
                continue
            constant = torch.from_numpy(np.array(value))
            if constant.is_floating_point():
                # A single number fits values on every device, and operators that read it need not wait for a GPU.
                constant = constant.to(device if constant.ndim else "cpu", torch.float32)
            self._constants[name] = constant

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor, run: Context, scale: Tensor | None = None) -> Tensor:
        """The logits [N, K].

        Args:
            tensors: Weights and statistics, all of them, on the device.
            x: Samples [N, ...].
            run: How it is run; a training run's statistics are left there.
            scale: What the outputs of scaled layers are multiplied by (shape []), if anything.
        """
        values: dict[str, Any] = {**self._constants, **tensors, self._input: x}
        for function, node in self._nodes:
            out = function(run, node, *(values[name] if name else None for name in node.inputs))
            outputs = out if isinstance(out, tuple) else (out,)
            if scale is not None and node.outputs[0] in self._scaled:
                outputs = (outputs[0] * scale, *outputs[1:])
            values.update(zip(node.outputs, outputs, strict=False))
        logits: Tensor = values[self._output]
        return logits
