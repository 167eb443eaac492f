"""What an operator is told besides its inputs, and where operators are registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Node

Tensor = torch.Tensor


@dataclass
class Context:
    """One run of a graph.

    Attributes:
        training: Whether batch normalisations take the batch's statistics.
        statistics: Names of all batch-norm statistics.
        moving: Those that a training run measures; batch normalisations of others use them as they are.
        present: 1 for every sample of the batch that counts, 0 for padding [N]; None where all count.
        measured: Filled by a training run: mean and unbiased variance of every moving statistic.
    """

    training: bool = False
    statistics: frozenset[str] = frozenset()
    moving: frozenset[str] = frozenset()
    present: Tensor | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)


Operator = Callable[..., Any]
"""Takes the run's context, the node and its inputs (None where left out); returns the output or a tuple of outputs."""

OPERATORS: dict[str, Operator] = {}
"""Operators by name."""


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register what these operators do."""

    def register(function: Operator) -> Operator:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


def unsupported(node: Node, what: str) -> ModelError:
    """An error for a use of an operator that torch is not told about here."""
    return ModelError(
        f"{node.op} {node.name}: {what} is not supported by the torch trainer",
        hint="Train with the trainer 'onnxruntime'.",
    )


def numbers(value: Tensor) -> list[Any]:
    """A small vector of numbers: shapes, axes, paddings. They never depend on the samples."""
    found: list[Any] = value.reshape(-1).tolist()
    return found
