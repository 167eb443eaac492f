"""What an encoded update left out, on its way to the next one (error feedback), in the submodel's coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.model.selection import Tensors
from fedprune.updates.remap import relocated
from fedprune.wire.offer import Offer
from fedprune_device.storage.local_state import LocalState


def carried(
    base: LocalState | None, offer: Offer, tensors: Mapping[str, npt.NDArray[Any]], read: Callable[[BlobRef], bytes]
) -> Tensors:
    """What the last update left out of tensors that are trained now.

    In another selection it is that of the channels that both have, where the offer says how these have moved;
    otherwise nothing is known to be the same, and nothing is left.

    Args:
        base: What the round before left; None where there is none.
        offer: The offer: where the tensors lie.
        tensors: The submodel's tensors, with all elements in their places.
        read: Gives a blob of the offer.

    Returns:
        Arrays of the tensors' shapes, for some of them.

    Raises:
        StorageError: A blob can't be read.
    """
    found = {} if base is None else base.residual
    if base is not None and found and base.selection != offer.selection:
        if offer.moved is None or offer.moved_from != base.selection:
            return {}
        try:
            found = relocated(found, read(offer.moved), 2 * max(v.nbytes for v in tensors.values()) + 2**20)
        except ProtocolError:
            return {}
    return {n: v for n, v in found.items() if n in tensors and tensors[n].shape == v.shape}
