"""What tests of cut models measure: random submodels and their distance from the masked whole model."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import widths_at
from fedprune.model.selection import Selection
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.masked_reference import masked_graph
from fedprune_export.pruning.model import Model

Array = npt.NDArray[Any]


def random_selection(model: Model, density: float, seed: int) -> Selection:
    """Random channels, in random order."""
    rng = np.random.default_rng(seed)
    ranks = [rng.permutation(g.size) for g in model.architecture.groups]
    return Selection.of(model.architecture, widths_at(model.architecture, density), ranks)


def inputs(model: Model, batch: int, seed: int = 5) -> Array:
    """Random samples."""
    shape = (batch, *model.architecture.input_shape)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(graph: Graph, x: Array) -> Array:
    """A graph's logits."""
    return OnnxSession(graph.to_bytes()).run({"x": x})["logits"]


def distance(a: Array, b: Array) -> float:
    """Largest difference, relative to the largest number of `b`."""
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(float(np.abs(b).max()), np.finfo(np.float32).tiny))


def cut_error(model: Model, selection: Selection, batch: int = 7) -> float:
    """How far a cut graph is from the masked whole one."""
    x = inputs(model, batch)
    return distance(outputs(cut(model, selection), x), outputs(masked_graph(model, selection), x))
