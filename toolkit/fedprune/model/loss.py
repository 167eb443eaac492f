"""A loss: what a recipe, a planner and a compiler ask of it. Each is a file of `fedprune.model.losses`.

Losses are written into training graphs by way of `GraphWriter`, so that a loss is one file, although boards read its
labels and the number that it takes without having a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Outputs = npt.NDArray[np.float64]
Feeds = Mapping[str, Array]  # what a step is fed, by name of input
Shape = tuple[int, ...]

BATCH = "N"
Y = "y"
Y_PARTNER = "y_partner"
Y_SHARE = "y_share"
CLASS_WEIGHT = "class_weight"
LABEL_SMOOTHING = "label_smoothing"
HITS = "hits"


class GraphWriter(Protocol):
    """The training graph, as a loss adds to it; values go by their names."""

    def emit(self, op: str, *inputs: str, attrs: Mapping[str, Any] | None = None, out: str | None = None) -> str:
        """Append an operator of ONNX (opset 17), and return its output."""

    def scalar(self, value: float) -> str: ...

    def ints(self, *values: int) -> str: ...

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str: ...

    def add_input(self, name: str, shape: tuple[int | str, ...] = (), dtype: npt.DTypeLike = np.float32) -> None: ...

    def add_output(self, name: str, shape: tuple[int | str, ...] = (), dtype: npt.DTypeLike = np.float32) -> None: ...


class LossTerms(Protocol):
    """Of a training graph's features those that a loss itself writes; see `fedprune.model.recipe.Features`."""

    @property
    def class_weight(self) -> bool: ...

    @property
    def label_smoothing(self) -> bool: ...

    @property
    def label_pairs(self) -> bool: ...

    @property
    def ignore_label(self) -> int | None: ...


@dataclass(frozen=True)
class LossParts:
    """A loss in a graph: Σ row·weight over the divisor.

    Attributes:
        row: Loss of every label [N, 1, ...], or of every sample: [N, 1, 1, ...], or [N] for the model's own.
        gradient: Its gradient by the logits [N, K, ...], times a number or weights of `row`'s shape, by their name.
        weight: Weights that go with `row`, or empty.
        divisor: What the sum is divided by, or empty for the number of labels.
    """

    row: str
    gradient: Callable[[str], str]
    weight: str = ""
    divisor: str = ""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """All that fedprune knows of a loss.

    Attributes:
        labels: What it compares with: `classes` (the number of one), `multi`, `values`, or its `own`.
        write: Write it for logits [N, K, ...], whose shape without N is the third argument.
        value: What `verify` compares a graph's loss with: its mean in float64, of outputs and what a step is fed,
            where all classes weigh the same; None where there is nothing to compare with.
        copies: Arrays of the size of a model's output that it needs in addition, where outputs are of places; one row
            of outputs per sample is too small to count. Counted in training graphs of U-Nets with 2 to 40 classes.
        reads_logits: It applies a sigmoid or softmax itself.
        setting: The number of the recipe that its graph reads, by the same name.
        terms: Settings of the recipe that have a meaning for this loss, and not for others.
        can_mix: Whether labels of two samples can be mixed.
    """

    labels: str
    write: Callable[[GraphWriter, str, Shape, LossTerms], LossParts]
    value: Callable[[Outputs, Feeds], float] | None = None
    copies: float = 0.0
    reads_logits: bool = False
    setting: str = ""
    terms: frozenset[str] = frozenset()
    can_mix: bool = True


def along_classes(g: GraphWriter, vector: str, outputs: Shape) -> str:
    """A vector over classes [K] as [K, 1, ...], which goes along axis 1 of the outputs."""
    further = range(1, len(outputs))
    return g.emit("Unsqueeze", vector, g.ints(*further)) if further else vector


def class_numbers(g: GraphWriter, outputs: Shape) -> str:
    """Numbers of the classes along axis 1 of the outputs."""
    return g.constant(np.arange(outputs[0]).reshape(1, -1, *[1] * (len(outputs) - 1)), np.int64)


def sample_means(g: GraphWriter, each: str, slope: str, outputs: Shape) -> LossParts:
    """The mean over each sample's outputs, of what each costs and of its slope."""
    row = g.emit("ReduceMean", each, attrs={"axes": list(range(1, len(outputs) + 1)), "keepdims": 1})
    return LossParts(row, partial(g.emit, "Mul", g.emit("Mul", slope, g.scalar(1 / math.prod(outputs)))))


def count_hits(g: GraphWriter, right: str) -> None:
    """Make the number of labels that are right an output."""
    g.emit("ReduceSum", g.emit("Cast", right, attrs={"to": 7}), attrs={"keepdims": 0}, out=HITS)
    g.add_output(HITS, (), np.int64)
