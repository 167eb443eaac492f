"""What an encoded update left out, on its way to the next one (error feedback), in the submodel's coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.errors import BundleError
from fedprune.ordered_dropout import TensorAxes
from fedprune.selection import Tensors
from fedprune.wire.messages import Offer
from fedprune_device.own import Own


def carried(
    base: Own | None, offer: Offer, tensors: Mapping[str, npt.NDArray[Any]], axes: TensorAxes | None = None
) -> Tensors:
    """What the last update left out of tensors that are trained now.

    In another selection of the same order of channels it is that of the channels that both have, where the training
    graph says how they lie; of a selection of another order nothing is known to be the same, and nothing is left.

    Args:
        base: What the round before left; None where there is none.
        offer: The offer: where the tensors lie.
        tensors: The submodel's tensors, with all elements in their places.
        axes: How channels lie on the tensors' axes.

    Returns:
        Arrays of the tensors' shapes, for some of them.
    """
    if base is None or not base.residual:
        return {}
    if base.selection == offer.selection:
        return {n: v for n, v in base.residual.items() if n in tensors and tensors[n].shape == v.shape}
    if base.ranking is None or base.ranking != offer.ranking or axes is None or len(base.widths) != len(offer.widths):
        return {}
    common = tuple(map(min, base.widths, offer.widths))
    differing = {g for g, (a, b) in enumerate(zip(base.widths, offer.widths, strict=True)) if a != b}
    if not differing <= axes.prefixed or not set(base.residual) <= set(tensors):
        return {}
    out = {n: np.zeros_like(tensors[n]) for n in base.residual}
    try:
        axes.check(base.residual, base.widths)
        axes.check(out, offer.widths)
    except BundleError:
        return {}  # whatever it is, it is nothing of this model
    axes.write_back(out, axes.narrowed(base.residual, base.widths, common), offer.widths, common)
    return out
