"""Reads what a board was sent: the weights of an offer, in a codec or with a mask, as tensors in full."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ConfigError, ProtocolError
from fedprune.model.element_mask import mask_from_bits, unpack_active
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.updates import Codec, increments, weights
from fedprune.updates.relocation import relocate
from fedprune.wire.messages import Offer


def unpack_weights(
    weights: bytes,
    mask: bytes | None,
    recipe: Recipe,
    axes: TensorAxes | None,
    widths: Sequence[int],
    maskable: Collection[str],
) -> tuple[Tensors, ElementMask]:
    """All tensors in full, 0 where masked, and which elements are active. `axes`, the channel groups of the tensors'
    axes, are needed with a mask; only `maskable` tensors may have one. Raises `BundleError` if the files are invalid or
    don't fit each other or the model."""
    tensors: Tensors = tensorfile.decode(weights)
    # The inference graph finds its weights at offsets that only the canonical form has.
    if not weights.startswith(tensorfile.header_for_tensors(tensors)):
        raise BundleError("the weights are not a canonical tensor file", hint="The server must write them again.")
    if mask is None:
        return tensors, ALL_ACTIVE
    if recipe.mask == "none":
        raise BundleError("the offer has a mask", expected="recipe.mask 'hard' or 'threshold'", got="'none'")
    if axes is None:
        raise BundleError("the offer has a mask, but its training graph doesn't give its tensors' axes")
    try:
        bits = tensorfile.decode(mask)
        for name in bits:
            if name not in maskable or name not in tensors:
                raise BundleError(f"mask of {name}", expected="no mask", got="one")
        for name, value in tensors.items():
            if value.dtype != np.float32:
                raise BundleError(f"type of {name}", expected="float32", got=value.dtype)
        active = mask_from_bits(bits, axes.shapes(widths))
        return unpack_active(active, tensors), active
    except BundleError as error:
        raise BundleError(f"mask and weights of the offer don't fit each other: {error}") from error


def unpack_drift(file: bytes | None, recipe: Recipe, mask: ElementMask, trained: Tensors) -> Tensors:
    """What is added to gradients of the `trained` tensors, 0 where masked. Raises `BundleError` if the file is invalid
    or doesn't fit them."""
    if file is None:
        return {}
    drift = unpack_active(mask, tensorfile.decode(file))
    for name, value in drift.items():
        fits = recipe.drift and name in trained and value.dtype == np.float32 and value.shape == trained[name].shape
        if not (fits and np.isfinite(value).all()):
            expected = "with recipe.drift, finite float32 numbers for a tensor that trains, of its shape"
            raise BundleError(f"drift of {name}", expected=expected, got=f"{value.dtype} {value.shape}")
    return drift


def decode_weights(offer: Offer, read: Callable[[str], bytes]) -> tuple[bytes, ...]:
    """The files of an offer's weights and mask that its encoded blobs make, the weights last; none if a digest is
    another, so that they must be downloaded as they are."""
    refs = (offer.weights,) if offer.coded is not None or offer.mask is None else (offer.mask, offer.weights)
    try:
        files = _decoded_files(offer, read)
    except (BundleError, ConfigError, ProtocolError):
        return ()
    return files if [tensorfile.sha256_hex(file) for file in files] == [ref.sha256 for ref in refs] else ()


def _decoded_files(offer: Offer, read: Callable[[str], bytes]) -> tuple[bytes, ...]:
    if offer.coded is None:
        most_elements = max(2 * offer.weights.size, 8 * (offer.mask.size if offer.mask else 0))
        most_bytes = 2 * offer.weights.size + len(offer.increments) * most_elements // 8 + 2**16
        raw_increments = (read(ref.sha256) for ref in offer.increments)
        weights_file, mask_file = increments.decode(raw_increments, most_bytes, most_elements)
        return (mask_file, weights_file) if mask_file else (weights_file,)
    raw = read(offer.coded.sha256)
    base = None if offer.held is None else read(offer.held)
    codec = Codec.parse(offer.weights_codec, "offer: weights_codec")
    if codec is None:
        return ()
    base_weights = None if base is None else tensorfile.decode(base)
    if base_weights is not None and offer.moved is not None:
        base_weights = relocate(base_weights, read(offer.moved.sha256), 2 * offer.weights.size + 2**20)
    return (tensorfile.encode(weights.decode(codec, raw, base_weights, offer.weights.size)),)
