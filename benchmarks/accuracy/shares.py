"""Shares of elements that weigh what submodels of some widths weigh."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedprune.model.architecture import Architecture, widths_at
from fedprune.strategies.importance.element_ranking import prunable


def shares(architecture: Architecture, densities: Sequence[float]) -> list[float]:
    """Shares of a model's elements whose values and mask weigh what submodels of these densities weigh.

    A round sends values both ways, and a mask, a bit for each element that could be masked, to the device. With v
    values of a share, s values of a submodel and m elements that could be masked, 2 · 4 · v + m / 8 = 2 · 4 · s bytes.
    Raises `ValueError` if a submodel weighs less than a mask and the tensors that can't be masked."""
    sizes = {name: math.prod(shape) for name, shape in architecture.shapes(architecture.sizes).items()}
    names = prunable(architecture)
    masked = sum(sizes[n] for n in names)
    mask_bytes = sum(-(-sizes[n] // 8) for n in names)
    out = []
    for density in densities:
        widths = widths_at(architecture, density)
        values = sum(math.prod(shape) for shape in architecture.shapes(widths).values()) - mask_bytes / 8
        share = (values - (sum(sizes.values()) - masked)) / masked
        if widths == architecture.sizes:
            share = 1.0  # nothing is masked, so there is no mask
        if share <= 0:
            raise ValueError(f"a submodel of density {density:g} weighs less than a mask and what can't be masked")
        out.append(round(share, 4))
    return out
