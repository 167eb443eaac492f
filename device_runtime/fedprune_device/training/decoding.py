"""Weights of an offer that came encoded: the very file that the server goes on from, or nothing."""

from __future__ import annotations

from collections.abc import Callable

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ConfigError, ProtocolError
from fedprune.updates import Codec, weights
from fedprune.updates.remap import relocated
from fedprune.wire.offer import Offer


def decoded(offer: Offer, read: Callable[[str], bytes]) -> bytes | None:
    """The weights file of an offer.

    Args:
        offer: The offer.
        read: Gives a blob by its digest.

    Returns:
        The file; None where what came doesn't make it, so that it must be pulled as it is.

    Raises:
        StorageError: A blob can't be read.
    """
    if offer.coded is None:
        return None
    raw = read(offer.coded.sha256)
    base = None if offer.held is None else read(offer.held)
    try:
        codec = Codec.parse(offer.weights_codec, "offer: weights_codec")
        if codec is None:
            return None
        held = None if base is None else tensorfile.decode(base)
        if held is not None and offer.moved is not None:
            held = relocated(held, read(offer.moved.sha256), 2 * offer.weights.size + 2**20)
        file = tensorfile.encode(weights.decode(codec, raw, held, offer.weights.size))
    except (BundleError, ConfigError, ProtocolError):
        return None
    return file if tensorfile.digest(file) == offer.weights.sha256 else None
