"""Built-in losses that are graphs of outputs and labels, differentiated as a model is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedprune.model.architecture import Architecture
from fedprune.model.step_contract import LOGITS, LOSS, Y
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model

_SMOOTH = 1.0
"""Added to both sides of an overlap, so that a class without any place has none to lose."""


def focal(outputs: tuple[int, ...]) -> Model:
    """Focal loss of every label, from logits: (p − y)² times the cross-entropy, the mean over a sample's labels.

    For labels 0 and 1 it is that of Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 4, with γ = 2;
    in between that of Li et al., "Generalized focal loss", NeurIPS 2020, eq. 6.
    """
    g = _begun(outputs)
    far = g.emit("Sub", g.emit("Sigmoid", LOGITS), Y)
    # −log of a sigmoid is a softplus, which keeps its digits where the sigmoid is 1.
    present = g.emit("Mul", Y, g.emit("Softplus", g.emit("Neg", LOGITS)))
    absent = g.emit("Mul", g.emit("Sub", g.scalar(1), Y), g.emit("Softplus", LOGITS))
    return _ended(g, g.emit("Mul", g.emit("Mul", far, far), g.emit("Add", present, absent)), outputs)


def dice(outputs: tuple[int, ...]) -> Model:
    """1 − the overlap of masks, from logits, the mean over classes: (2 Σ p·y + 1) / (Σ p + Σ y + 1), with sums over a
    sample's places (Milletari et al., "V-Net", 3DV 2016, with sums in place of squares)."""
    g = _begun(outputs)
    share, places = g.emit("Sigmoid", LOGITS), list(range(2, len(outputs) + 1))

    def total(value: str) -> str:
        return g.emit("ReduceSum", value, g.ints(*places), attrs={"keepdims": 0}) if places else value

    both = g.emit("Add", g.emit("Mul", total(g.emit("Mul", share, Y)), g.scalar(2)), g.scalar(_SMOOTH))
    either = g.emit("Add", g.emit("Add", total(share), total(Y)), g.scalar(_SMOOTH))
    lost = g.emit("Sub", g.scalar(1), g.emit("Div", both, either))
    return _ended(g, lost, outputs[:1], outputs)


LOSS_GRAPHS: dict[str, Callable[[tuple[int, ...]], Model]] = {"focal": focal, "dice": dice}


def _begun(outputs: tuple[int, ...]) -> Graph:
    g = Graph(name="loss")
    g.inputs = [Port(name, np.dtype(np.float32), ("N", *outputs)) for name in (LOGITS, Y)]
    return g


def _ended(g: Graph, each: str, shape: tuple[int, ...], outputs: tuple[int, ...] | None = None) -> Model:
    """The mean of losses [N, *shape] over all axes but the first."""
    g.emit("ReduceMean", each, attrs={"axes": list(range(1, len(shape) + 1)), "keepdims": 0}, out=LOSS)
    g.outputs = [Port(LOSS, np.dtype(np.float32), ("N",))]
    return Model(g, Architecture("loss", (), (), (), (), outputs or shape, ()))
