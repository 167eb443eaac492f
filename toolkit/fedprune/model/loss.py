"""The interface of a loss for recipes, planners and the compiler. Each loss is a file of `fedprune.model.losses`.

Losses write themselves into training graphs through `LossGraphWriter`. So a loss is one file, although boards, which
have no compiler, need its labels and its setting.
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


class LossGraphWriter(Protocol):
    """The compiler's training graph, to which a loss adds operators; values are known by their names."""

    def emit(self, op: str, *inputs: str, attrs: Mapping[str, Any] | None = None, out: str | None = None) -> str:
        """Append an operator of ONNX (opset 17), and return its output."""

    def scalar(self, value: float) -> str: ...

    def ints(self, *values: int) -> str: ...

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str: ...

    def add_input(self, name: str, shape: tuple[int | str, ...] = (), dtype: npt.DTypeLike = np.float32) -> None: ...

    def add_output(self, name: str, shape: tuple[int | str, ...] = (), dtype: npt.DTypeLike = np.float32) -> None: ...


class LossTerms(Protocol):
    """The features of a training graph that a loss writes itself; see `fedprune.model.features.Features`."""

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
        divisor: The value that divides the sum, or empty for the number of labels.
    """

    row: str
    gradient: Callable[[str], str]
    weight: str = ""
    divisor: str = ""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss.

    Attributes:
        labels: The kind of its labels: `classes` (class numbers), `multi`, `values`, or its `own`.
        write: Writes it for logits [N, K, ...], whose shape without N is the third argument.
        value: The mean loss in float64 of outputs and a step's feeds, with equal class weights, with which `verify`
            compares the graph's; None if there is nothing to compare with.
        copies: The number of arrays of the output's size that it needs in addition, for outputs with positions; one row
            of outputs per sample is too small to count. Measured on training graphs of U-Nets with 2 to 40 classes.
        reads_logits: Whether it applies a sigmoid or softmax itself.
        setting: The number in the recipe that its graph reads, by the same name.
        terms: Settings of the recipe that only this loss and some others support.
        can_mix: Whether labels of two samples can be mixed.
    """

    labels: str
    write: Callable[[LossGraphWriter, str, Shape, LossTerms], LossParts]
    value: Callable[[Outputs, Feeds], float] | None = None
    copies: float = 0.0
    reads_logits: bool = False
    setting: str = ""
    terms: frozenset[str] = frozenset()
    can_mix: bool = True


def along_classes(g: LossGraphWriter, vector: str, outputs: Shape) -> str:
    """A vector over classes [K] as [K, 1, ...], which broadcasts along axis 1 of the outputs."""
    trailing_axes = range(1, len(outputs))
    return g.emit("Unsqueeze", vector, g.ints(*trailing_axes)) if trailing_axes else vector


def class_numbers(g: LossGraphWriter, outputs: Shape) -> str:
    """The class numbers 0 to K − 1 along axis 1 of the outputs."""
    return g.constant(np.arange(outputs[0]).reshape(1, -1, *[1] * (len(outputs) - 1)), np.int64)


def sample_means(g: LossGraphWriter, losses: str, slope: str, outputs: Shape) -> LossParts:
    """A loss that is the mean over each sample's outputs, from the loss of each output and its derivative."""
    row = g.emit("ReduceMean", losses, attrs={"axes": list(range(1, len(outputs) + 1)), "keepdims": 1})
    return LossParts(row, partial(g.emit, "Mul", g.emit("Mul", slope, g.scalar(1 / math.prod(outputs)))))


def count_hits(g: LossGraphWriter, is_right: str) -> None:
    """Add an output with the number of correct labels."""
    g.emit("ReduceSum", g.emit("Cast", is_right, attrs={"to": 7}), attrs={"keepdims": 0}, out=HITS)
    g.add_output(HITS, (), np.int64)
