"""What a device does for an offer once all is there: evaluate, train, evaluate, check, swap the serving model."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step, tensorfile
from fedprune.blobs import BlobStore
from fedprune.errors import BundleError, StorageError
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.messages import Offer, Update
from fedprune_device.data import LocalData
from fedprune_device.labels import log_prior, targets
from fedprune_device.losses import data_loss, hits, loss_terms
from fedprune_device.predictor import Predictor
from fedprune_device.slots import Serving, Slots
from fedprune_device.trainer import Trainer, TrainingResult

PROBE_SAMPLES = 32
"""Local samples with which a new model is checked before it serves."""

_MOST_AT_ONCE = 64
"""Samples that are predicted at once, where a training step takes as many: the planner counts a step's memory."""

_PREDICTIONS = 7
"""Predictions of one sample that are timed in a round."""

Report = Callable[[str, int, int], None]
"""Takes the phase, units done and units in all."""


class DamagedBlobError(StorageError):
    """A blob on the disk is not what its name says. It has been deleted, so that it can be pulled again."""


MEASURED = frozenset(
    {
        "download_seconds",
        "evaluate_seconds",
        "train_seconds",
        "step_seconds",
        "latency_seconds",
        "peak_memory_bytes",
    }
)
"""Metrics that tell of the machine; all others are the same wherever an offer is carried out."""


@dataclass(frozen=True)
class Trained:
    """What came of an offer.

    Attributes:
        update: What the server gets; its weights are in the store.
        model: What may serve now; it is staged and has passed its check.
    """

    update: Update
    model: Serving


class LoadedTrainer:
    """The training graph that was used last: another bench's round usually needs it again.

    Args:
        threads: Threads inside an operator.
        keep: Whether it stays loaded after training. A board lets it go: its memory is needed for the new model, and
            loading it again takes less than a step or two.
    """

    def __init__(self, threads: int = 1, *, keep: bool = False) -> None:
        self.threads = threads
        self._keep = keep
        self._loaded: tuple[str, Trainer] | None = None

    def of(self, sha256: str, read: Callable[[], bytes]) -> Trainer:
        """A trainer for a graph.

        Args:
            sha256: The graph.
            read: Gives its bytes, if they are needed.

        Raises:
            ModelError: onnxruntime doesn't accept the graph.
            TrainingError: It is not a training graph.
        """
        if self._loaded is None or self._loaded[0] != sha256:
            self._loaded = None  # two loaded graphs are more than a small board has memory for
            self._loaded = (sha256, Trainer(read(), threads=self.threads))
        return self._loaded[1]

    def release(self) -> None:
        """Training is over."""
        if not self._keep:
            self._loaded = None


class Workbench:
    """Carries out offers, one at a time. The simulator does it here, too.

    Args:
        device: The device's name.
        blobs: All blobs of an offer; trained weights are put there.
        slots: Where models are staged and serve.
        data: The device's samples.
        trainer: The loaded training graph; benches may share it.
    """

    def __init__(
        self, device: str, blobs: BlobStore, slots: Slots, data: LocalData, trainer: LoadedTrainer | None = None
    ) -> None:
        self._device = device
        self._blobs = blobs
        self._slots = slots
        self._data = data
        self._trainer = trainer or LoadedTrainer()

    def carry_out(self, offer: Offer, *, download_seconds: float, report: Report, stop: Callable[[], bool]) -> Update:
        """Do what an offer asks for, and let the new model serve; after any error the old one serves on.

        Args:
            offer: The offer; its blobs are in the store.
            download_seconds: How long they took to arrive, for the metrics.
            report: Told how far it is.
            stop: Asked between training steps.

        Returns:
            The update; its weights are in the store.

        Raises:
            FedpruneError: As `make`.
        """
        made = self.make(offer, download_seconds=download_seconds, report=report, stop=stop)
        self._slots.install(made.model)
        return made.update

    def make(
        self,
        offer: Offer,
        *,
        download_seconds: float = 0.0,
        report: Report = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Trained:
        """Evaluate, train, evaluate, check; what serves stays as it is.

        The same offer always gives the same weights, so that one that was cut off can be done again.

        Args:
            offer: The offer; its blobs are in the store.
            download_seconds: How long they took to arrive, for the metrics.
            report: Told how far it is.
            stop: Asked between training steps.

        Returns:
            The update and the staged model.

        Raises:
            DamagedBlobError: A blob must be pulled again.
            ConfigError: The recipe doesn't make sense.
            BundleError: The weights are not a canonical tensor file.
            DataError: The local data doesn't fit the model.
            TrainingError: Training failed.
            TrainingStoppedError: `stop` said so.
            ModelError: A graph doesn't load, or the new model fails its check.
            StorageError: The disk fails or is full.
        """
        recipe = Recipe.from_dict(offer.recipe)
        tensors = self._weights(offer.weights)
        trainer = self._trainer.of(offer.training.sha256, lambda: self._blob(offer.training))
        trainer.check(tensors)
        self._data.check(offer.classes, trainer.input_shape, loss=recipe.loss, token_ids=trainer.token_ids)
        self._blob(offer.inference)
        offset = log_prior(self._data.y_train, offer.classes) if recipe.logit_adjustment else None
        metrics = {"download_seconds": download_seconds, "samples_test": float(len(self._data.y_test))}

        report("evaluate", 0, 2)
        before = self._candidate(offer, offer.weights)
        self._evaluate(before, offset, recipe, offer.classes, metrics, "before")
        del before
        result = trainer.train(
            tensors,
            self._data,
            recipe,
            seed=offer.seed,
            device=self._device,
            round=offer.round,
            classes=offer.classes,
            widths=offer.widths,
            progress=lambda done, total: report("train", done, total),
            stop=stop,
        )
        report("evaluate", 1, 2)
        del tensors  # from here on there is memory for the new ones alone, beside the model that is loaded
        loss = None
        if not trainer.normalised:
            loss = trainer.loss(result.tensors, self._data, recipe, offer.classes, PROBE_SAMPLES)
        weights = self._blobs.put(tensorfile.encode(result.tensors))
        moved = {n: v.copy() for n, v in result.tensors.items() if n not in trainer.frozen} if trainer.frozen else {}
        result = replace(result, tensors={})  # arrays in the memory of the loaded graph, which goes, too
        del trainer
        self._trainer.release()
        after = self._candidate(offer, weights)
        self._check(after, loss, recipe, offer.classes)
        self._evaluate(after, offset, recipe, offer.classes, metrics, "after")
        metrics["latency_seconds"] = _latency(after, self._data.x_train[:1])
        update = Update(
            self._device,
            offer.job,
            offer.round,
            offer.attempt,
            offer.weights.sha256,
            self._sent(offer, weights, moved),
            result.samples,
            result.steps,
            _finite(metrics | _measured(result)),
        )
        model = Serving(
            job=offer.job,
            round=offer.round,
            classes=offer.classes,
            inference=offer.inference.sha256,
            weights=weights.sha256,
            offset=None if offset is None else tuple(map(float, offset)),
            loss=recipe.loss,
        )
        return Trained(update, model)

    def _sent(self, offer: Offer, weights: BlobRef, moved: Tensors) -> BlobRef:
        """What the server gets: the trained weights without those that are frozen, which it has.

        Args:
            offer: The offer.
            weights: All trained weights.
            moved: Those that aren't frozen, where some are; nothing else.
        """
        if not moved:
            return weights
        if weights != offer.weights:
            self._blobs.delete(weights.sha256)  # it is staged; the disk has room for one file of trained weights
        return self._blobs.put(tensorfile.encode(moved))

    def _weights(self, ref: BlobRef) -> Tensors:
        raw = self._blob(ref)
        tensors: Tensors = tensorfile.decode(raw)
        # The inference graph finds its weights at offsets that only the canonical form has.
        if tensorfile.encode(tensors) != raw:
            raise BundleError("the weights are not a canonical tensor file", hint="The server must write them anew.")
        return tensors

    def _blob(self, ref: BlobRef) -> bytes:
        try:
            return self._blobs.read(ref.sha256)
        except StorageError as error:
            self._blobs.delete(ref.sha256)
            raise DamagedBlobError(str(error)) from error

    def _candidate(self, offer: Offer, weights: BlobRef) -> Predictor:
        graph, path = self._blobs.path(offer.inference.sha256), self._blobs.path(weights.sha256)
        return Predictor(self._slots.stage(graph, path), threads=self._trainer.threads)

    def _check(self, candidate: Predictor, loss: float | None, recipe: Recipe, classes: int) -> None:
        y = targets(self._data.y_train, recipe.loss, classes)
        candidate.check(
            classes,
            self._data.x_train[:PROBE_SAMPLES],
            y[:PROBE_SAMPLES],
            loss=loss,
            terms=loss_terms(y, recipe, classes),
            kind=recipe.loss,
            batch=self._at_once(recipe),
        )

    def _at_once(self, recipe: Recipe) -> int:
        return min(_MOST_AT_ONCE, recipe.micro_batch, self._data.samples)

    def _evaluate(
        self,
        model: Predictor,
        offset: npt.NDArray[np.float32] | None,
        recipe: Recipe,
        classes: int,
        metrics: dict[str, float],
        when: str,
    ) -> None:
        """Loss and, where classes are predicted, accuracy on the device's own test samples."""
        if not len(self._data.y_test):
            return
        began = time.monotonic()
        y = targets(self._data.y_test, recipe.loss, classes)
        outputs = model.predict(self._data.x_test, self._at_once(recipe))
        if offset is not None:
            outputs = outputs + offset
        right = hits(recipe.loss, outputs, y)
        if right is not None:
            metrics[f"accuracy_{when}"] = float(np.mean(right))
        terms = {step.HUBER_DELTA: np.array(recipe.huber_delta)}
        metrics[f"loss_{when}"] = data_loss(recipe.loss, outputs, y, terms)
        metrics["evaluate_seconds"] = time.monotonic() - began


def _latency(model: Predictor, sample: npt.NDArray[Any]) -> float:
    """Median time of predicting one sample; the first prediction allocates and doesn't count."""
    times = []
    for _ in range(_PREDICTIONS + 1):
        began = time.perf_counter()
        model.predict(sample)
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def _measured(result: TrainingResult) -> dict[str, float]:
    hits = {} if result.train_accuracy is None else {"train_accuracy": result.train_accuracy}
    return hits | {
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "train_seconds": result.seconds,
        "step_seconds": result.step_seconds,
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> float:
    """The most memory that this process ever held, in bytes.

    getrusage also counts what a process was before it became this program: the size of whatever started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
