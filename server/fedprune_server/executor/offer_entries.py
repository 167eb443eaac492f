"""Reads the entries of an offer: the blobs that it names, what its device is sent, and which update may answer it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.blobs.blob_ref import BlobRef
from fedprune.jobs.blob_references import offer_digests

# Entry of an offer that isn't sent: bytes of the update that answers it.
UPDATE_SIZE = "update_size"

# Another one: the most bytes that the update has in the offered codec.
UPDATE_BOUND = "update_bound"


def offer_graphs(offer: Mapping[str, Any]) -> set[str]:
    """Digests of the graphs that an offer names."""
    refs = [offer[name] for name in ("training", "inference", "base") if name in offer]
    return {ref["sha256"] for ref in (*refs, *offer.get("lowered", {}).values())}


def blobs_of_offer(offer: Mapping[str, Any]) -> set[str]:
    """Digests of all blobs that an offer names."""
    return offer_digests(offer) | ({offer["ranking"]} if offer.get("ranking") else set())


def device_offer(offer: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an offer that its device is sent."""
    return {k: v for k, v in offer.items() if k not in (UPDATE_SIZE, UPDATE_BOUND)}


def update_misfit(offer: Mapping[str, Any] | None, ref: BlobRef) -> str:
    """Why an update of this size can't answer an offer; empty if it can.

    An update is as large as the offered weights without those that are frozen; an update of another size isn't fetched.
    With a codec it may also be smaller, since a device may send it either way.
    """
    offer = offer or {}
    expected = offer.get(UPDATE_SIZE, offer.get("weights", {}).get("size"))
    bound = offer.get(UPDATE_BOUND)
    if ref.size == expected or (bound is not None and ref.size <= bound):
        return ""
    alternative = "" if bound is None else f", or at most {bound} in its codec"
    return f"size of the update: expected {expected} bytes{alternative}, got {ref.size}"
