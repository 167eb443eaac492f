"""The work on one accepted offer: its input weights, the board's own average, and the files that training produces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ConfigError, ProtocolError
from fedprune.model import step_contract
from fedprune.model.element_mask import apply_mask, mask_from_bits, pack_active, unpack_active
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.secure_aggregation.vector_form import MaskedForm
from fedprune.updates import Codec, encode, weights
from fedprune.updates.clipped_noise import GaussianNoise, add_noise
from fedprune.updates.remap import relocate
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState, RoundState
from fedprune_device.storage.state_store import StateStore
from fedprune_device.training.evaluation import PROBE_SAMPLES
from fedprune_device.training.trainer import Trainer, TrainingResult


def carried_arrays(
    arrays: Tensors,
    base: LocalState,
    offer: Offer,
    tensors: Mapping[str, npt.NDArray[Any]],
    read: Callable[[BlobRef], bytes],
) -> Tensors:
    """Arrays of an earlier round for the tensors that are trained now, or for their optimiser's state.

    If `base` is of another selection, the channels that both selections have are copied, and the others are 0.
    """
    if arrays and base.selection != offer.selection:
        if offer.moved is None or offer.moved_from != base.selection:
            return {}
        try:
            arrays = relocate(arrays, read(offer.moved), 2 * max(v.nbytes for v in tensors.values()) + 2**20)
        except ProtocolError:
            return {}
    shapes = {n: v.shape for n, v in tensors.items()}
    return {n: v for n, v in arrays.items() if shapes.get(n.partition("::")[0]) == v.shape}


def carried_optimizer_state(
    base: LocalState | None,
    optimizer: str,
    offer: Offer,
    tensors: Mapping[str, npt.NDArray[Any]],
    read: Callable[[BlobRef], bytes],
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


_LOG = logging.getLogger("fedprune.device")


@dataclass(frozen=True)
class ServingAverage:
    """The tensors that predict for the board's own average, with a share `received_share` of the received weights.

    `loss` is as in `UpdateFiles`.
    """

    tensors: Tensors
    received_share: float
    loss: float | None


@dataclass(frozen=True)
class UpdateFiles:
    """The files that training leaves, in memory that outlives its graph.

    `trained_tensors` is the trained model as it predicts, None if it is the file `update`. The first of `averages`
    serves, unless validation samples prefer the second; without any the trained model serves. `local_state` is what the
    board keeps. `loss` is the training graph's for the trained model that is to serve, None if training and inference
    differ by design.
    """

    update: BlobRef
    trained_tensors: Tensors | None
    averages: tuple[ServingAverage, ...]
    local_state: LocalState | None
    loss: float | None


class LocalUpdate:
    """A board's training for an offer.

    `tensors` are what training begins with: what was received, with the board's personal tensors in it. `mask` tells
    which elements are active, None for all; `round_state` is None where the recipe keeps nothing between rounds. Raises
    `BundleError` if the files don't fit each other, `TrainingError` if they don't fit the graph.
    """

    def __init__(
        self,
        offer: Offer,
        recipe: Recipe,
        weights: bytes,
        mask: bytes | None,
        trainer: Trainer,
        states: StateStore,
        device: str,
        data: LocalData,
        noise: Callable[[], GaussianNoise],
    ) -> None:
        self._noise = noise
        self._offer, self._recipe, self._trainer, self._device, self._data = offer, recipe, trainer, device, data
        self._personal = frozenset(n for n in trainer.names if any(fnmatchcase(n, p) for p in recipe.personal))
        self._codec = None if offer.codec is None else Codec.parse(offer.codec, "offer: codec")
        self._form = None if offer.secure is None else MaskedForm.from_json(offer.secure)
        coded = self._codec is not None or (self._form is not None and self._form.has_codes)
        keeps = recipe.average or self._personal or coded or recipe.keep_optimizer_state
        self.round_state = RoundState(states, offer) if keeps else None
        self._calibrates = recipe.calibrate and trainer.has_batch_norm
        maskable = {*trainer.trainable, *trainer.frozen}
        received, self.mask = unpack_weights(weights, mask, recipe, trainer.axes, offer.widths, maskable)
        self.tensors = received
        unblended = {*self._personal, *trainer.frozen}
        self._received = {n: v for n, v in received.items() if n not in unblended} if recipe.blend else {}
        if self.round_state is not None and self.round_state.base is not None:
            personal = {n: v for n, v in received.items() if n in self._personal}
            personal = self.round_state.base.with_personal(offer, personal)
            self.tensors = received | apply_mask(self.mask, personal)
        trainer.check(self.tensors)

    def received_model(self) -> bytes | None:
        """The file of the offered model as it predicts here; None where it is the one that was received."""
        has_personal = self.round_state is not None and self.round_state.base is not None and bool(self._personal)
        changed = has_personal or bool(self.mask) or self._calibrates
        return tensorfile.encode(self._predicting_tensors(self.tensors)) if changed else None

    def optimizer_state(self, read: Callable[[BlobRef], bytes]) -> tuple[Tensors, int]:
        """The optimiser's state of the round before, and the steps behind it, as far as they are kept."""
        if self.round_state is None or not self._recipe.keep_optimizer_state:
            return {}, 0
        state = carried_optimizer_state(self.round_state.base, self._recipe.optimizer, self._offer, self.tensors, read)
        if self.round_state.base is not None:
            # One copy is enough: on a small board the optimiser's state is up to twice as large as the weights.
            self.round_state.base = replace(self.round_state.base, moments={})
        return state

    def make_files(
        self,
        result: TrainingResult,
        put: Callable[[bytes], BlobRef],
        read: Callable[[BlobRef], bytes],
        *,
        evaluates: bool = True,
        compares: bool = True,
    ) -> UpdateFiles:
        """The files that follow from a training.

        `put` takes the file that the server gets; `read` gives the received weights once more, where the update is
        their difference to the trained ones. `evaluates`: the board measures models in this round. `compares`: the
        training graph's losses are wanted. Raises `TrainingError` if the update is not finite.
        """
        trained, recipe, trainer = result.tensors, self._recipe, self._trainer
        leaves_out = trainer.frozen or self._personal or recipe.report_squares or self._codec is not None
        leaves_out = leaves_out or recipe.update_clip > 0 or self._form is not None
        sends_trained = not self.mask and not leaves_out
        predicting = trained if sends_trained and not self._calibrates else self._predicting_tensors(trained)
        private = self._add_privacy(self._update_tensors(result, predicting), read)
        if self._form is None:
            update, residual = self._encode(private, trained, read)
        else:
            update, residual = self._encode_vector(self._form, private, trained, read)
        del private
        update_ref = put(update)
        del update
        average: Tensors = {}
        shares: list[float] = []
        if recipe.average:
            base = None if self.round_state is None else self.round_state.base
            average = updated_average(base, self._offer, trained, recipe.average, axes=trainer.axes, mask=self.mask)
            shares = self._blend_shares(base, evaluates=evaluates)
            del base
        local_state = None
        if self.round_state is not None:
            personal = {n: np.array(v) for n, v in trained.items() if n in self._personal}
            mask, optimizer_fields = self.mask if average else ALL_ACTIVE, self._optimizer_fields(result)
            local_state = LocalState.of(self._offer, average, personal, mask, residual=residual, **optimizer_fields)
            self.round_state.release()
        averages = tuple(self._blended_average(average, share, compares=compares) for share in shares)
        self._received = {}
        loss = self._probe_loss(trained) if compares and not averages else None
        served = None
        if predicting is not trained:  # most of these arrays are in the memory of the training graph
            served = {n: np.array(v) if v is trained[n] else v for n, v in predicting.items()}
        return UpdateFiles(update_ref, served, averages, local_state, loss)

    def _blend_shares(self, base: LocalState | None, *, evaluates: bool) -> list[float]:
        """The shares of the received weights in the averages that may serve, that of the round before first."""
        blend = self._recipe.blend
        if not self._recipe.validate_blend or not len(self._data.y_val):
            return [blend]
        shares = [0.0, blend] if base is not None and base.alone else [blend, 0.0]
        return shares if evaluates else shares[:1]

    def _blended_average(self, average: Tensors, share: float, *, compares: bool) -> ServingAverage:
        tensors = blended_average(average, self._received, share, mask=self.mask) if share else average
        loss = self._probe_loss(tensors) if compares else None
        return ServingAverage(self._predicting_tensors(tensors), share, loss)

    def _probe_loss(self, tensors: Tensors) -> float | None:
        if self._trainer.has_batch_norm:
            return None
        model, classes = self._apply_threshold(tensors), self._offer.classes
        return self._trainer.loss(model, self._data, self._recipe, classes, PROBE_SAMPLES)

    def _optimizer_fields(self, result: TrainingResult) -> dict[str, Any]:
        """The optimiser's part of a local state; empty if it has overflowed and would never move again."""
        moments = result.moments if self._recipe.keep_optimizer_state else {}
        if not moments or not all(np.isfinite(v).all() for v in moments.values()):
            return {}
        return {"moments": moments, "optimizer": self._recipe.optimizer, "steps": result.optimizer_steps}

    def _update_tensors(self, result: TrainingResult, predicting: Tensors) -> Tensors:
        """The tensors for the server: those that were trained, without frozen ones, which it has, and personal ones."""
        tensors, trainer = result.tensors, self._trainer
        if self._calibrates:  # the running statistics after a few steps are mostly those of the received weights
            tensors = {n: v if n in trainer.trainable else predicting[n] for n, v in tensors.items()}
        sent = {n: v for n, v in tensors.items() if n not in self._personal and n not in trainer.frozen}
        squares = {n: result.last_squares[n] for n in sent if n in result.last_squares}
        sent, squares = pack_active(self.mask, sent), pack_active(self.mask, squares)
        return sent | {step_contract.squares_name(n): v for n, v in squares.items()}

    def _add_privacy(self, update: Tensors, read: Callable[[BlobRef], bytes]) -> Tensors:
        """The update with clipping and noise; before it is encoded, so that no codec sees more than the server may."""
        recipe = self._recipe
        if not recipe.update_clip:
            return update
        received: Tensors = tensorfile.decode(read(self._offer.weights))
        clip, multiplier = recipe.update_clip, recipe.update_noise
        return add_noise(update, received, self._trainer.trainable, clip, multiplier, self._noise())

    def _encode(self, update: Tensors, trained: Tensors, read: Callable[[BlobRef], bytes]) -> tuple[bytes, Tensors]:
        """The encoded update, and the remainder that encoding leaves out, with all elements in their places."""
        if self._codec is None:
            return tensorfile.encode(update), {}
        received: Tensors = tensorfile.decode(read(self._offer.weights))
        residual = self._residual(trained, read)
        packed = pack_active(self.mask, residual)
        try:
            raw, remainder = encode(self._codec, update, received, self._trainer.trainable, packed)
        except ProtocolError as error:
            _LOG.warning("the update is sent plainly: %s", error)
            return tensorfile.encode(update), {}
        return raw, unpack_active(self.mask, remainder)

    def _encode_vector(
        self, form: MaskedForm, update: Tensors, trained: Tensors, read: Callable[[BlobRef], bytes]
    ) -> tuple[bytes, Tensors]:
        """The update as the vector that is to be masked, and the remainder that its codes leave out."""
        received: Tensors = tensorfile.decode(read(self._offer.weights))
        vector, remainder = form.vector.encode(update, received, self._residual(trained, read))
        return vector.to_bytes(), remainder

    def _residual(self, trained: Tensors, read: Callable[[BlobRef], bytes]) -> Tensors:
        """The residual of earlier updates."""
        base = None if self.round_state is None else self.round_state.base
        return {} if base is None else carried_arrays(base.residual, base, self._offer, trained, read)

    def _predicting_tensors(self, tensors: Tensors) -> Tensors:
        """The weights that predict: thresholded, with batch-norm statistics of the board's own if it measures them."""
        tensors = self._apply_threshold(tensors)
        if not self._calibrates:
            return tensors
        seed = self._offer.seed
        return self._trainer.calibrate(tensors, self._data, self._recipe, seed=seed, device=self._device)

    def _apply_threshold(self, tensors: Tensors) -> Tensors:
        """The weights that a forward pass sees: with FIARSE's threshold, small elements of masked tensors are 0."""
        out = dict(tensors)
        if self._recipe.mask == "threshold":
            threshold = np.float32(self._recipe.mask_threshold)
            for name in self.mask.keys() & set(self._trainer.trainable):
                out[name] = np.where(np.abs(out[name]) >= threshold, out[name], np.float32(0))
        return out


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

    It reduces the noise of few local steps and of each round's averaging in a personal model, without traffic.

    If the selection has changed but not the order of channels, the channels that both have are averaged; if the order
    has changed, the average starts over. So does an element that was masked before.
    """
    out = {n: np.array(v, np.float32) for n, v in trained.items()}
    if base is None or not base.average:
        return out
    if base.selection == offer.selection:
        if {n: v.shape for n, v in base.average.items()} == {n: v.shape for n, v in trained.items()}:
            for name in out:
                _mix_average(out[name], base, name, decay, mask)
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
    """The model that serves with an average: (1 − share) · average + share · received; 0 where masked.

    Tensors that are not received are the average's own arrays.
    """
    out = dict(average)
    for name, value in received.items():
        mixed = np.float32(share) * value
        mixed += np.float32(1 - share) * average[name]
        if name in mask:
            mixed[~mask[name]] = 0
        out[name] = mixed
    return out


def _mix_average(value: npt.NDArray[np.float32], base: LocalState, name: str, decay: float, mask: ElementMask) -> None:
    """Mix the old average into new weights, in their place: boards have no memory to waste."""
    was_active = base.mask.get(name)
    newcomers = None if was_active is None else value[~was_active]
    _moving_average(base.average[name], value, decay)
    if was_active is not None:
        value[~was_active] = newcomers
    if name in mask:
        value[~mask[name]] = 0


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


def unpack_weights(
    weights: bytes,
    mask: bytes | None,
    recipe: Recipe,
    axes: TensorAxes | None,
    widths: Sequence[int],
    maskable: Collection[str],
) -> tuple[Tensors, ElementMask]:
    """All tensors in full, 0 where masked, and which elements are active.

    `axes`, the channel groups of the tensors' axes, are needed with a mask; only `maskable` tensors may have one.
    Raises `BundleError` if the files are invalid or don't fit each other or the model.
    """
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


def decode_weights(offer: Offer, read: Callable[[str], bytes]) -> bytes | None:
    """The weights file of an offer, decoded; None if the digest is another, so that it must be downloaded as it is."""
    if offer.coded is None:
        return None
    raw = read(offer.coded.sha256)
    base = None if offer.held is None else read(offer.held)
    try:
        codec = Codec.parse(offer.weights_codec, "offer: weights_codec")
        if codec is None:
            return None
        base_weights = None if base is None else tensorfile.decode(base)
        if base_weights is not None and offer.moved is not None:
            base_weights = relocate(base_weights, read(offer.moved.sha256), 2 * offer.weights.size + 2**20)
        file = tensorfile.encode(weights.decode(codec, raw, base_weights, offer.weights.size))
    except (BundleError, ConfigError, ProtocolError):
        return None
    return file if tensorfile.sha256_hex(file) == offer.weights.sha256 else None
