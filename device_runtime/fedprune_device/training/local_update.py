"""What a board does around training for an offer.

Before: the weights that training begins with. After: the update for the server, the model that serves, and the state
for the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError
from fedprune.model import step_contract
from fedprune.model.element_mask import apply_mask, pack_active, unpack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.secure_aggregation.vector_form import MaskedForm
from fedprune.updates import Codec, encode
from fedprune.updates.clipped_noise import GaussianNoise, add_noise
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState, RoundState
from fedprune_device.storage.state_store import StateStore
from fedprune_device.training.carried_state import (
    ReadBlob,
    blended_average,
    carried_arrays,
    carried_optimizer_state,
    updated_average,
)
from fedprune_device.training.evaluation import PROBE_SAMPLES
from fedprune_device.training.received_weights import unpack_drift, unpack_weights
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingResult

_LOG = logging.getLogger("fedprune.device")


@dataclass(frozen=True)
class ServingAverage:
    """The board's own average, blended with a share `received_share` of the received weights, as it predicts; at 1 the
    received model, which predicts without the board's own labels as prior. `loss` is as in `UpdateFiles`."""

    tensors: Tensors
    received_share: float
    loss: float | None


@dataclass(frozen=True)
class UpdateFiles:
    """The files that training leaves, in memory that outlives its graph.

    `trained_tensors` is the trained model as it predicts, None if it is the file `update`. The first of `averages`
    serves, unless validation samples prefer another; without any the trained model serves. `local_state` is what the
    board keeps. `loss` is what the training graph computed for the trained model that is to serve, None if training and
    inference differ by design.
    """

    update: BlobRef
    trained_tensors: Tensors | None
    averages: tuple[ServingAverage, ...]
    local_state: LocalState | None
    loss: float | None


class LocalUpdate:
    """A board's training for an offer.

    `tensors` are what training begins with: what was received, with the board's personal tensors in it. `mask` tells
    which elements are active, None for all; `drift` is added to gradients; `round_state` is None where the recipe keeps
    nothing. Raises `BundleError` if the files don't fit each other, `TrainingError` if they don't fit the graph.
    """

    def __init__(
        self,
        offer: Offer,
        recipe: Recipe,
        weights: bytes,
        mask: bytes | None,
        drift: bytes | None,
        trainer: Trainer,
        states: StateStore,
        device: str,
        data: LocalData,
        noise: Callable[[], GaussianNoise],
    ) -> None:
        self._offer, self._recipe, self._trainer, self._device, self._data = offer, recipe, trainer, device, data
        self._personal = frozenset(n for n in trainer.names if any(fnmatchcase(n, p) for p in recipe.personal))
        self._encoder = UpdateEncoder(offer, recipe, trainer.trainable, noise)
        keeps_state = recipe.average or self._personal or self._encoder.leaves_residual or recipe.keep_optimizer_state
        self.round_state = RoundState(states, offer) if keeps_state else None
        self._calibrates = recipe.calibrate and trainer.has_batch_norm
        maskable = {*trainer.trainable, *trainer.frozen}
        received, self.mask = unpack_weights(weights, mask, recipe, trainer.axes, offer.widths, maskable)
        trained = {n: v for n, v in received.items() if n in trainer.trainable}
        self.drift = unpack_drift(drift, recipe, self.mask, trained)
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

    def optimizer_state(self, read: ReadBlob) -> tuple[Tensors, int]:
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
        read: ReadBlob,
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
        has_other_tensors = bool(self.mask or trainer.frozen or self._personal or recipe.report_squares)
        sends_trained = self._encoder.keeps_values and not has_other_tensors
        predicting = trained if sends_trained and not self._calibrates else self._predicting_tensors(trained)
        base = None if self.round_state is None else self.round_state.base
        update, residual = self._encoder.encode(
            self._update_tensors(result, predicting), trained, base, self.mask, read
        )
        update_ref = put(update)
        del update
        average: Tensors = {}
        shares: list[float] = []
        if recipe.average:
            average = updated_average(base, self._offer, trained, recipe.average, axes=trainer.axes, mask=self.mask)
            shares = self._blend_shares(base, evaluates=evaluates)
        del base
        local_state = self._next_state(result, average, residual)
        averages: list[ServingAverage] = []
        for share in shares:
            tensors = blended_average(average, self._received, share, mask=self.mask) if share else average
            loss = self._probe_loss(tensors) if compares else None
            averages.append(ServingAverage(self._predicting_tensors(tensors), share, loss))
        self._received = {}
        loss = self._probe_loss(trained) if compares and not averages else None
        trained_tensors = None
        if predicting is not trained:  # most of these arrays are in the memory of the training graph
            trained_tensors = {n: np.array(v) if v is trained[n] else v for n, v in predicting.items()}
        return UpdateFiles(update_ref, trained_tensors, tuple(averages), local_state, loss)

    def _next_state(self, result: TrainingResult, average: Tensors, residual: Tensors) -> LocalState | None:
        """What the board keeps for its next round; what it kept from the last one is released."""
        if self.round_state is None:
            return None
        personal = {n: np.array(v) for n, v in result.tensors.items() if n in self._personal}
        mask, optimizer_fields = self.mask if average else ALL_ACTIVE, self._optimizer_fields(result)
        local_state = LocalState.of(self._offer, average, personal, mask, residual=residual, **optimizer_fields)
        self.round_state.release()
        return local_state

    def _blend_shares(self, base: LocalState | None, *, evaluates: bool) -> list[float]:
        """The shares of the received weights in the averages that may serve, that of the round before first."""
        blend = self._recipe.blend
        if not self._recipe.validate_blend or not len(self._data.y_val):
            return [blend]
        kept = None if base is None else base.received_share
        first = kept if kept in (0.0, 1.0) else blend  # another one is the blend of an earlier recipe
        return list(dict.fromkeys((first, blend, 0.0, 1.0))) if evaluates else [first]

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
