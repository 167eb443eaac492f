"""Whether a normalised graph still computes what the model computed, and has the shapes that were inferred for it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.runtime.session import Session
from fedprune.training.step_contract import LOGITS, X
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import inferred, sample_feeds

_TOLERANCE = 1e-4
_BATCHES = (2, 1, 8)
"""Batch sizes at which results are compared: one sample, and even batches. At the first, shapes are compared too."""

_LARGE = 2**22
"""Numbers of all values of one sample from which on the last batch size is left out: it would take seconds."""

_SHAPE = "shape~of~"


def compare(before: Session, name: str, graph: Graph, softmax: str) -> None:
    """Compare outputs before and after on random numbers, and shapes with what was inferred.

    Args:
        before: The model as it came; it is fed by the order of its inputs.
        name: Its output.
        graph: The normalised graph.
        softmax: The operator that was removed from the end, if any.

    Raises:
        ModelError: They differ, or the output is not finite.
    """
    known = inferred(graph, _BATCHES[0])
    values = [o for n in graph.nodes for o in n.outputs if o]
    probe = graph.copy()
    for value in values:
        probe.emit("Shape", value, out=_SHAPE + value)
        probe.outputs.append(Port(_SHAPE + value, np.dtype(np.int64), (len(known.shapes[value]),)))
    after = Session(probe.to_bytes())
    large = sum(math.prod(known.shapes[v]) for v in values) > _BATCHES[0] * _LARGE
    for batch in _BATCHES[:2] if large else _BATCHES:
        x = sample_feeds(graph, batch, seed=batch)[X]
        old = before.run({next(iter(before.inputs)): x}, [name])[name]
        wanted = [LOGITS, *(_SHAPE + v for v in values)] if batch == _BATCHES[0] else [LOGITS]
        found = after.run({X: x}, wanted)
        _check_close(old, found[LOGITS], softmax, batch)
        for value in values if len(wanted) > 1 else ():
            shape = tuple(found[_SHAPE + value].tolist())
            if shape != known.shapes[value]:
                raise ModelError(f"shape of value {value}", expected=known.shapes[value], got=shape)


def _check_close(old: npt.NDArray[np.float32], new: npt.NDArray[np.float32], softmax: str, batch: int) -> None:
    if old.dtype.kind != "f" or not np.isfinite(old).all():
        raise ModelError("the model's output is not finite for random inputs", expected="finite numbers")
    if softmax and new.shape == old.shape:
        new = new - new.max(-1, keepdims=True)
        new = new - np.log(np.exp(new).sum(-1, keepdims=True))
        new = np.exp(new) if softmax == "Softmax" else new
    scale = max(float(np.abs(old).max(initial=0)), 1e-6)
    worst = float(np.abs(old - new).max(initial=0)) / scale if old.shape == new.shape else float("inf")
    if not worst <= _TOLERANCE:
        raise ModelError(
            "the model computes something else after normalisation",
            expected=f"outputs equal to {_TOLERANCE:g} for {batch} samples",
            got=f"{worst:.2g}",
            hint="Please report this with the model.",
        )
