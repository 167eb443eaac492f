"""What of a trained tensor takes part in a step: all of it, what a mask lets, or what is above a threshold."""

from __future__ import annotations

import numpy as np

from fedprune.model import step_contract
from fedprune.model.recipe import Features
from fedprune_export.ir.graph import Graph

_TINY = float(np.finfo(np.float32).tiny)
"""Least denominator of the surrogate: where weight and threshold are both 0 there is nothing to divide."""


def used(g: Graph, name: str, features: Features) -> str:
    """The value that the forward pass reads: w · mask, and with a threshold w · 1[|w| ≥ θ]."""
    value = name
    if features.element_mask:
        value = g.emit("Mul", value, step_contract.mask(name))
    if features.threshold:
        value = g.emit("Where", _active(g, name), value, g.scalar(0))
    return value


def passed(g: Graph, name: str, gradient: str, features: Features) -> str:
    """The gradient by a tensor, of that by what the forward pass read, where the data loss alone is concerned.

    With a threshold, the step 1[|w| ≥ θ] is taken to rise by 2θ/(|w| + θ)² per unit of |w| where it is 1, and not at
    all where it is 0 (FIARSE, Wu et al., NeurIPS 2024), so that ∂L/∂w = g · 1[|w| ≥ θ] · (1 + 2θ|w|/(|w| + θ)²). A
    mask is left to the code that sums the gradients.
    """
    if not features.threshold:
        return gradient
    size = g.emit("Abs", name)
    theta = step_contract.threshold(name)
    whole = g.emit("Max", g.emit("Add", size, theta), g.scalar(_TINY))
    # Two quotients, since the square of the sum of two small numbers would be 0.
    rise = g.emit("Mul", g.emit("Div", size, whole), g.emit("Div", g.emit("Mul", theta, g.scalar(2)), whole))
    slope = g.emit("Add", rise, g.scalar(1))
    return g.emit("Where", _active(g, name), g.emit("Mul", gradient, slope), g.scalar(0))


def _active(g: Graph, name: str) -> str:
    return g.emit("GreaterOrEqual", g.emit("Abs", name), step_contract.threshold(name))
