"""A board's own moving average of its trained weights: a ← decay · a + (1 − decay) · w, in the submodel's coordinates.

It reduces the noise of few local steps and of each round's averaging in a personal model, without traffic. The active
model may blend it with the received weights, which carry other boards' data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.element_mask import ElementMask
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.selection import Tensors
from fedprune.wire.messages import Offer
from fedprune_device.storage.local_state import LocalState

Array = npt.NDArray[Any]


def averaged(
    base: LocalState | None,
    offer: Offer,
    trained: Mapping[str, npt.NDArray[np.float32]],
    decay: float,
    *,
    axes: TensorAxes | None = None,
    mask: ElementMask | None = None,
) -> Tensors:
    """The average after a round, in arrays of their own.

    In another selection of the same order of channels, the common part is carried over; of another order nothing is, so
    that the average starts over. So does an element that was masked before.
    """
    out = {n: np.array(v, np.float32) for n, v in trained.items()}
    if base is None or not base.average:
        return out
    if base.selection == offer.selection:
        if {n: v.shape for n, v in base.average.items()} == {n: v.shape for n, v in trained.items()}:
            for name in out:
                _mix(out[name], base, name, decay, mask)
    elif base.ranking is not None and base.ranking == offer.ranking and not (axes is None or mask or base.mask):
        _carry(base, offer, out, decay, axes)
    return out


def blended(
    average: Mapping[str, npt.NDArray[np.float32]],
    received: Mapping[str, npt.NDArray[np.float32]],
    share: float,
    *,
    mask: ElementMask | None = None,
) -> Tensors:
    """The model that serves with an average: (1 − share) · average + share · received; 0 where masked.

    Tensors that are not received are the average's own arrays.
    """
    out = dict(average)
    for name, value in received.items():
        mixed = np.float32(share) * value
        mixed += np.float32(1 - share) * average[name]
        if mask is not None and name in mask.active:
            mixed[~mask.active[name]] = 0
        out[name] = mixed
    return out


def _mix(value: npt.NDArray[np.float32], base: LocalState, name: str, decay: float, mask: ElementMask | None) -> None:
    """Mix the old average into new weights, in their place: boards have no memory to waste."""
    fresh = None
    if base.mask is not None and name in base.mask.active:
        fresh = value[~base.mask.active[name]]
    _mean(base.average[name], value, decay)
    if fresh is not None and base.mask is not None:
        value[~base.mask.active[name]] = fresh
    if mask is not None and name in mask.active:
        value[~mask.active[name]] = 0


def _carry(base: LocalState, offer: Offer, out: Tensors, decay: float, axes: TensorAxes) -> None:
    """Mix the part that both widths have into the new weights."""
    if len(base.widths) != len(offer.widths):
        return
    common = tuple(map(min, base.widths, offer.widths))
    differing = {g for g, (a, b) in enumerate(zip(base.widths, offer.widths, strict=True)) if a != b}
    if not differing <= axes.prefixed or set(base.average) != set(out):
        return
    try:
        axes.check(base.average, base.widths)
        axes.check(out, offer.widths)
    except BundleError:
        return  # whatever it is, it is no average of this model
    old = axes.narrowed(base.average, base.widths, common)
    new = {n: v.copy() for n, v in axes.narrowed(out, offer.widths, common).items()}
    for name in new:
        _mean(old[name], new[name], decay)
    axes.write_back(out, new, offer.widths, common)


def _mean(old: Array, new: Array, decay: float) -> None:
    """decay · old + (1 − decay) · new, in the place of the new."""
    new *= np.float32(1 - decay)
    new += np.float32(decay) * old
