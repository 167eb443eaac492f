"""The board's own moving average of trained weights (from round to round), which may serve predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.wire.messages import Offer
from fedprune_device.storage.local_state import LocalState

Array = npt.NDArray[Any]


def updated_average(
    base: LocalState | None,
    offer: Offer,
    trained: Mapping[str, npt.NDArray[np.float32]],
    decay: float,
    *,
    axes: TensorAxes | None = None,
    mask: ElementMask = ALL_ACTIVE,
) -> Tensors:
    """The average after a round, a ← decay · a + (1 − decay) · w, in arrays of their own.

    It reduces the noise of few local steps and of each round's averaging in a personal model, without traffic. If the
    selection has changed but not the order of channels, the channels that both have are averaged; if the order has
    changed, the average starts over. So does an element that was masked before.
    """
    out = {n: np.array(v, np.float32) for n, v in trained.items()}
    if base is None or not base.average:
        return out
    if base.selection == offer.selection:
        if {n: v.shape for n, v in base.average.items()} == {n: v.shape for n, v in trained.items()}:
            # Mixed into the new weights, in their place: boards have no memory to waste.
            for name, value in out.items():
                was_active = base.mask.get(name)
                newcomers = None if was_active is None else value[~was_active]
                _moving_average(base.average[name], value, decay)
                if was_active is not None:
                    value[~was_active] = newcomers
                if name in mask:
                    value[~mask[name]] = 0
    elif base.ranking is not None and base.ranking == offer.ranking and not (axes is None or mask or base.mask):
        _mix_common_channels(base, offer, out, decay, axes)
    return out


def blended_average(
    average: Mapping[str, npt.NDArray[np.float32]],
    received: Mapping[str, npt.NDArray[np.float32]],
    share: float,
    *,
    mask: ElementMask = ALL_ACTIVE,
) -> Tensors:
    """The model that serves with an average: (1 − share) · average + share · received; 0 where masked. Tensors that are
    not received are the average's own arrays."""
    out = dict(average)
    for name, value in received.items():
        mixed = np.float32(share) * value
        mixed += np.float32(1 - share) * average[name]
        if name in mask:
            mixed[~mask[name]] = 0
        out[name] = mixed
    return out


def _mix_common_channels(base: LocalState, offer: Offer, out: Tensors, decay: float, axes: TensorAxes) -> None:
    """Mix the part that both widths have into the new weights."""
    if len(base.widths) != len(offer.widths):
        return
    common = tuple(map(min, base.widths, offer.widths))
    differing = {g for g, (a, b) in enumerate(zip(base.widths, offer.widths, strict=True)) if a != b}
    if not differing <= axes.narrowable_groups or set(base.average) != set(out):
        return
    try:
        axes.check(base.average, base.widths)
        axes.check(out, offer.widths)
    except BundleError:
        return  # the stored tensors are no average of this model, so that the average starts over
    old = axes.narrow(base.average, base.widths, common)
    new = {n: v.copy() for n, v in axes.narrow(out, offer.widths, common).items()}
    for name in new:
        _moving_average(old[name], new[name], decay)
    axes.write_back(out, new, offer.widths, common)


def _moving_average(old: Array, new: Array, decay: float) -> None:
    """Replace `new` by decay · old + (1 − decay) · new."""
    new *= np.float32(1 - decay)
    new += np.float32(decay) * old
