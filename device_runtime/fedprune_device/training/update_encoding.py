"""Encodes a board's update for its server: clips it and adds noise, and packs it as the offer says."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError
from fedprune.model.element_mask import pack_active, unpack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ElementMask, Tensors
from fedprune.secure_aggregation.vector_form import MaskedForm
from fedprune.updates import Codec, encode
from fedprune.updates.clipped_noise import GaussianNoise, add_noise
from fedprune.wire.messages import Offer
from fedprune_device.storage.local_state import LocalState
from fedprune_device.training.carried_state import ReadBlob, carried_arrays

_LOG = logging.getLogger("fedprune.device")


class UpdateEncoder:
    """Encodes the update for an offer: as a plain tensor file, by a codec, or as the vector of secure aggregation."""

    def __init__(
        self, offer: Offer, recipe: Recipe, trainable: tuple[str, ...], noise: Callable[[], GaussianNoise]
    ) -> None:
        self._offer, self._recipe, self._trainable, self._noise = offer, recipe, trainable, noise
        self._codec = None if offer.codec is None else Codec.parse(offer.codec, "offer: codec")
        self._form = None if offer.secure is None else MaskedForm.from_json(offer.secure)

    @property
    def leaves_residual(self) -> bool:
        """Whether encoding leaves out a remainder, which the next update makes up for."""
        return self._codec is not None or (self._form is not None and self._form.has_codes)

    @property
    def keeps_values(self) -> bool:
        """Whether the server gets the very numbers that were trained."""
        return self._codec is None and self._form is None and self._recipe.update_clip <= 0

    def encode(
        self, update: Tensors, trained: Tensors, base: LocalState | None, mask: ElementMask, read: ReadBlob
    ) -> tuple[bytes, Tensors]:
        """The file for the server, and the remainder that encoding leaves out, with all elements in their places.

        `read` gives the received weights once more, where the update is their difference to the trained ones.
        """
        if self.keeps_values:
            return tensorfile.encode(update), {}
        received: Tensors = tensorfile.decode(read(self._offer.weights))
        if self._recipe.update_clip:  # before it is encoded, so that no codec sees more than the server may
            clip, multiplier = self._recipe.update_clip, self._recipe.update_noise
            update = add_noise(update, received, self._trainable, clip, multiplier, self._noise())
        if self._form is not None:
            vector, remainder = self._form.vector.encode(update, received, self._residual(trained, base, read))
            return vector.to_bytes(), remainder
        if self._codec is None:
            return tensorfile.encode(update), {}
        residual = pack_active(mask, self._residual(trained, base, read))
        try:
            raw, remainder = encode(self._codec, update, received, self._trainable, residual)
        except ProtocolError as error:
            _LOG.warning("the update is sent plainly: %s", error)
            return tensorfile.encode(update), {}
        return raw, unpack_active(mask, remainder)

    def _residual(self, trained: Tensors, base: LocalState | None, read: ReadBlob) -> Tensors:
        return {} if base is None else carried_arrays(base.residual, base, self._offer, trained, read)
