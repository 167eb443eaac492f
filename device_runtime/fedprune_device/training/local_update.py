"""One offer in hand: what its weights are to the board that trains them, and what comes of them in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.updates import Codec, encode
from fedprune.updates.privacy import GaussianNoise, noised
from fedprune.updates.remap import relocated
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState, RoundState, StateStore
from fedprune_device.training.evaluation import PROBE_SAMPLES
from fedprune_device.training.moving_average import averaged, blended
from fedprune_device.training.received_weights import unpacked
from fedprune_device.training.trainer import Trainer, TrainingResult


def carried(
    base: LocalState | None, offer: Offer, tensors: Mapping[str, npt.NDArray[Any]], read: Callable[[BlobRef], bytes]
) -> Tensors:
    """What the last update left out of tensors that are trained now, in the tensors' shapes.

    In another selection it is carried over for the channels that both have, where the offer says how these have moved;
    otherwise nothing is left.
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


_LOG = logging.getLogger("fedprune.device")


@dataclass(frozen=True)
class UpdateFiles:
    """The files that training leaves, in memory that outlives its graph.

    `after` is the model as it predicts, None where that is the file `sent`; `average` the board's own, with what is
    blended into it. `own` is what the board keeps. `loss` is the training graph's for the model that is to serve, where
    it computes the same as inference.
    """

    sent: BlobRef
    after: Tensors | None
    average: Tensors | None
    own: LocalState | None
    loss: float | None


class LocalUpdate:
    """What a board trains for an offer.

    `tensors` are what training begins with: what was received, with the board's personal tensors in it. `mask` tells
    which elements are active, None for all; `kept` is None where the recipe keeps nothing between rounds. Raises
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
        feeds_back = self._codec is not None and self._codec.feedback
        self.kept = RoundState(states, offer) if recipe.average or self._personal or feeds_back else None
        self._calibrates = recipe.calibrate and trainer.normalised
        maskable = {*trainer.trainable, *trainer.frozen}
        received, self.mask = unpacked(weights, mask, recipe, trainer.axes, offer.widths, maskable)
        self.tensors = received
        stay = {*self._personal, *trainer.frozen}
        self._received = {n: v for n, v in received.items() if n not in stay} if recipe.blend else {}
        if self.kept is not None and self.kept.base is not None:
            mine = {n: v for n, v in received.items() if n in self._personal}
            mine = self.kept.base.personalised(offer, mine)
            self.tensors = received | (mine if self.mask is None else self.mask.applied(mine))
        trainer.check(self.tensors)

    def before(self) -> bytes | None:
        """The file of the offered model as it predicts here; None where it is the one that was received."""
        own = self.kept is not None and self.kept.base is not None and bool(self._personal)
        changed = own or self.mask is not None or self._calibrates
        return tensorfile.encode(self._predicting(self.tensors)) if changed else None

    def made(
        self, result: TrainingResult, put: Callable[[bytes], BlobRef], read: Callable[[BlobRef], bytes]
    ) -> UpdateFiles:
        """The files that follow from a training.

        `put` takes the file that the server gets; `read` gives the received weights once more, where the update is
        their difference to the trained ones. Raises `TrainingError` if the update is not finite.
        """
        trained, recipe, trainer = result.tensors, self._recipe, self._trainer
        other = trainer.frozen or self._personal or recipe.report_squares or self._codec is not None
        other = other or recipe.update_clip > 0
        whole = self.mask is None and not other
        after = trained if whole and not self._calibrates else self._predicting(trained)
        update, residual = self._encoded(self._private(self._sent(result, after), read), trained, read)
        sent = put(update)
        del update
        average: Tensors = {}
        if recipe.average:
            base = None if self.kept is None else self.kept.base
            average = averaged(base, self._offer, trained, recipe.average, axes=trainer.axes, mask=self.mask)
            del base
        own = None
        if self.kept is not None:
            personal = {n: np.array(v) for n, v in trained.items() if n in self._personal}
            own = LocalState.of(self._offer, average, personal, self.mask if average else None, residual)
            self.kept.release()
        served = average
        if recipe.blend:
            served, self._received = blended(average, self._received, recipe.blend, mask=self.mask), {}
        loss = None
        if not trainer.normalised:
            model = self._effective(served or trained)
            loss = trainer.loss(model, self._data, recipe, self._offer.classes, PROBE_SAMPLES)
        kept = None
        if after is not trained:  # most of these arrays are in the memory of the training graph
            kept = {n: np.array(v) if v is trained[n] else v for n, v in after.items()}
        return UpdateFiles(sent, kept, self._predicting(served) if served else None, own, loss)

    def _sent(self, result: TrainingResult, after: Tensors) -> Tensors:
        """What the server gets: what was trained, without what is frozen, which it has, and what is personal."""
        tensors, trainer = result.tensors, self._trainer
        if self._calibrates:  # those that training left are mostly of the weights that were received
            tensors = {n: v if n in trainer.trainable else after[n] for n, v in tensors.items()}
        sent = {n: v for n, v in tensors.items() if n not in self._personal and n not in trainer.frozen}
        squares = {n: result.last_squares[n] for n in sent if n in result.last_squares}
        if self.mask is not None:
            sent, squares = self.mask.pack(sent), self.mask.pack(squares)
        return sent | {step_contract.squares(n): v for n, v in squares.items()}

    def _private(self, update: Tensors, read: Callable[[BlobRef], bytes]) -> Tensors:
        """The update as it may leave the board, before any codec sees it."""
        recipe = self._recipe
        if not recipe.update_clip:
            return update
        received: Tensors = tensorfile.decode(read(self._offer.weights))
        return noised(update, received, self._trainer.trainable, recipe.update_clip, recipe.update_noise, self._noise())

    def _encoded(self, update: Tensors, trained: Tensors, read: Callable[[BlobRef], bytes]) -> tuple[bytes, Tensors]:
        """The update as it travels, and what that leaves out, with all elements in their places."""
        if self._codec is None:
            return tensorfile.encode(update), {}
        base = None if self.kept is None else self.kept.base
        missed = carried(base, self._offer, trained, read)
        received: Tensors = tensorfile.decode(read(self._offer.weights))
        packed = missed if self.mask is None else self.mask.pack(missed)
        try:
            raw, left = encode(self._codec, update, received, self._trainer.trainable, packed)
        except ProtocolError as error:
            _LOG.warning("the update is sent plainly: %s", error)
            return tensorfile.encode(update), {}
        return raw, left if self.mask is None else self.mask.unpack(left)

    def _predicting(self, tensors: Tensors) -> Tensors:
        """Weights as they predict, with statistics of the board's own where it measures them."""
        tensors = self._effective(tensors)
        if not self._calibrates:
            return tensors
        seed = self._offer.seed
        return self._trainer.calibrated(tensors, self._data, self._recipe, seed=seed, device=self._device)

    def _effective(self, tensors: Tensors) -> Tensors:
        """The weights that a forward pass sees: with FIARSE's threshold, small elements of masked tensors are 0."""
        out = dict(tensors)
        if self._recipe.mask == "threshold" and self.mask is not None:
            theta = np.float32(self._recipe.mask_threshold)
            for name in self.mask.active.keys() & set(self._trainer.trainable):
                out[name] = np.where(np.abs(out[name]) >= theta, out[name], np.float32(0))
        return out
