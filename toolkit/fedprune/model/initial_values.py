"""Tells by its values whether a model has never been trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture, TensorKind

Array = npt.NDArray[Any]

# The initial values of norms in all frameworks. Scales are 0 in residual blocks that start as the identity.
_INITIAL_VALUES = {
    TensorKind.NORM_SCALE: (1.0, 0.0),
    TensorKind.NORM_BIAS: (0.0,),
    TensorKind.STAT_MEAN: (0.0,),
    TensorKind.STAT_VAR: (1.0,),
}

# Layers whose weights torch draws from a uniform distribution.
_DRAWN_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

# Weights from which the largest one comes near the bound of the distribution that they were drawn from.
_MIN_DRAWN_WEIGHTS = 256


def is_untrained(architecture: Architecture, model: Mapping[str, Array]) -> bool:
    """Whether a model has never been trained.

    Training changes every number of a normalisation, so these decide. In a model without normalisations the layers'
    weights decide if they look as torch initialises them: 0, or uniform within ±1 / √(inputs), a bound that training
    exceeds. All other models count as trained, because nothing of a trained model may be lost.
    """
    norm_tensors = [s for s in architecture.tensors if s.kind in _INITIAL_VALUES]
    if norm_tensors:
        return all(np.isin(model[s.name], _INITIAL_VALUES[s.kind]).all() for s in norm_tensors)
    layers = [layer for layer in architecture.layers if layer.weight in model and layer.op in _DRAWN_OPERATORS]
    return any(model[n.weight].size >= _MIN_DRAWN_WEIGHTS for n in layers) and all(
        _is_as_drawn(model[n.weight], 0 if n.op == "ConvTranspose" else n.output_axis) for n in layers
    )


def _is_as_drawn(weights: Array, output_axis: int) -> bool:
    largest = float(np.abs(weights).max(initial=0.0))
    relative_bound = largest * math.sqrt(weights.size / weights.shape[output_axis])
    return largest == 0 or (relative_bound <= 1 + 1e-6 and (relative_bound > 0.98 or weights.size < _MIN_DRAWN_WEIGHTS))
