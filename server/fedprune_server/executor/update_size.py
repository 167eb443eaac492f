"""How large the update may be that answers an offer: what its maker writes into it, and its receiver goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.blobs.blob_ref import BlobRef

UPDATE_SIZE = "update_size"
"""Entry of an offer that no device is sent: how many bytes the update has that answers it."""

UPDATE_BOUND = "update_bound"
"""The same: the most that it has in the codec that is offered."""


def sent(offer: Mapping[str, Any]) -> dict[str, Any]:
    """What of an offer the device gets."""
    return {k: v for k, v in offer.items() if k not in (UPDATE_SIZE, UPDATE_BOUND)}


def misfit(offer: Mapping[str, Any] | None, ref: BlobRef) -> str:
    """What is wrong with the size of an update, if anything is.

    An update is as large as the weights that were offered, less those that are frozen, or it is no update: nothing of
    it is fetched. Where a codec is offered it may be that (a device may always send it plainly), or as small as the
    codec makes it.
    """
    offer = offer or {}
    expected = offer.get(UPDATE_SIZE, offer.get("weights", {}).get("size"))
    bound = offer.get(UPDATE_BOUND)
    if ref.size == expected or (bound is not None and ref.size <= bound):
        return ""
    other = "" if bound is None else f", or at most {bound} in its codec"
    return f"size of the update: expected {expected} bytes{other}, got {ref.size}"
