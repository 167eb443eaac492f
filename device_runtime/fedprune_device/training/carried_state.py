"""Carries the board's arrays of an earlier round over to the channels that are trained now.

They are the residual (what the encoded update left out), the optimiser's state, and the board's own moving average of
trained weights, which may serve predictions. For the first two, the server sends a relocation if the channels have
changed (`fedprune.updates.relocation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model import step_contract
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.updates.relocation import relocate
from fedprune.wire.messages import Offer
from fedprune_device.storage.local_state import LocalState

Array = npt.NDArray[Any]

# Reads a file that the board has received.
ReadBlob = Callable[[BlobRef], bytes]


def carried_arrays(
    arrays: Tensors, base: LocalState, offer: Offer, tensors: Mapping[str, Array], read: ReadBlob
) -> Tensors:
    """Arrays of an earlier round for the tensors that are trained now, or for their optimiser's state. If `base` is of
    another selection, the channels that both selections have are copied, and the others are 0."""
    if arrays and base.selection != offer.selection:
        if offer.moved is None or offer.moved_from != base.selection:
            return {}
        try:
            max_bytes = 2 * max(v.nbytes for v in tensors.values()) + 2**20  # one that unpacks to more is refused
            arrays = relocate(arrays, read(offer.moved), max_bytes)
        except ProtocolError:
            return {}
    shapes = {n: v.shape for n, v in tensors.items()}
    return {n: v for n, v in arrays.items() if shapes.get(n.partition("::")[0]) == v.shape}


def carried_optimizer_state(
    base: LocalState | None, optimizer: str, offer: Offer, tensors: Mapping[str, Array], read: ReadBlob
) -> tuple[Tensors, int]:
    """The optimiser's state that a round begins with, and the steps that led to it; empty if it begins at zero.

    Adam's correction of its means counts all steps. For new channels, whose means are 0, the first steps would be
    several times too long (up to (1 − β1^t)/√(1 − β2^t) · lr, 6.5 · lr by default), so their mean square is that of the
    tensor's other elements.
    """
    if base is None or base.optimizer != optimizer:
        return {}, 0
    moments = carried_arrays(base.moments, base, offer, tensors, read)
    if base.selection != offer.selection:
        for name in moments.keys() & set(map(step_contract.second_moment_name, tensors)):
            is_known = moments[name] > 0
            if is_known.any():
                mean = moments[name][is_known].mean(dtype=np.float64).astype(np.float32)
                moments[name] = np.where(is_known, moments[name], mean)
    return moments, base.steps if moments else 0


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
    not received are the average's own arrays; at a share of 1 the others are those received."""
    if share == 1 and not mask:
        return {**average, **received}
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
