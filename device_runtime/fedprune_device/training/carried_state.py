"""Carries the board's arrays of an earlier round over to the channels that are trained now.

They are the residual (what the encoded update left out) and the optimiser's state. If the channels have changed, the
server sends a relocation (`fedprune.updates.relocation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.model import step_contract
from fedprune.model.selection import Tensors
from fedprune.updates.relocation import relocate
from fedprune.wire.messages import Offer
from fedprune_device.storage.local_state import LocalState

# Reads a file that the board has received.
ReadBlob = Callable[[BlobRef], bytes]


def carried_arrays(
    arrays: Tensors, base: LocalState, offer: Offer, tensors: Mapping[str, npt.NDArray[Any]], read: ReadBlob
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
    base: LocalState | None, optimizer: str, offer: Offer, tensors: Mapping[str, npt.NDArray[Any]], read: ReadBlob
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
