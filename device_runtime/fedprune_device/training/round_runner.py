"""One round of an offer whose blobs are complete: evaluate, train, evaluate, check, swap the serving model."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.disk import file_digest, storage_errors
from fedprune.core.errors import DivergedError, StorageError
from fedprune.core.metrics import BLEND
from fedprune.model.recipe import Recipe
from fedprune.runtime.bundle import BASE
from fedprune.runtime.precision_files import served_files
from fedprune.updates.privacy import GaussianNoise
from fedprune.wire.messages import Offer, Update
from fedprune_device.data.dataset import SampleSource
from fedprune_device.data.labels import LogitAdjustment
from fedprune_device.hardware.readings import restart_peak
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.serving.model_slots import ModelSlots, Serving
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.local_state import MemoryStateStore, RoundState, StateStore
from fedprune_device.training.evaluation import MEASURED, Evaluation, clearly_better, training_metrics
from fedprune_device.training.local_update import Average, LocalUpdate, decoded
from fedprune_device.training.trainer import (
    TrainerCache,
    TrainingControl,
    TrainingResult,
    TrainingStoppedError,
    TrainingTask,
)

__all__ = ["MEASURED", "DamagedBlobError", "RoundResult", "RoundRunner", "TrainerCache"]

_LOG = logging.getLogger("fedprune.device")

_Bytes = TypeVar("_Bytes", bytes, memoryview)
Report = Callable[[str, int, int], None]  # takes the phase, units done and units in all


class DamagedBlobError(StorageError):
    """A blob on the disk is not what its name says, and must be downloaded again.

    Only the loop deletes it, which knows whether it is being downloaded already.
    """

    sha256 = ""


@dataclass(frozen=True)
class RoundResult:
    """The result of an offer, which lasts only after `RoundRunner.commit`; `own` is the board's own state, staged."""

    update: Update
    model: Serving
    metrics: Mapping[str, float]
    own: RoundState | None = None

    def keep(self) -> None:
        """Make the board's own state after the round the current one."""
        if self.own is not None:
            self.own.commit()


class RoundRunner:
    """Carries out offers, one at a time, on a board and in the simulator.

    By default states last as long as this runner, nothing is lowered, and the noise of private updates has a key that
    isn't kept; only simulations give another. `trainer` may be shared with other runners.

    A model is checked before it may serve: its inference graph has the training graph's loss, its outputs are finite.
    `agreeing` are pairs of the two graphs' digests whose agreement was seen, on other weights perhaps: there nothing is
    checked again and no latency measured, since no simulated model serves. A board gives none.
    """

    def __init__(
        self,
        device: str,
        blobs: BlobStore,
        slots: ModelSlots,
        data: SampleSource,
        trainer: TrainerCache | None = None,
        states: StateStore | None = None,
        lowering: ReducedPrecision | None = None,
        noise: Callable[[Offer], GaussianNoise] | None = None,
        agreeing: set[tuple[str, str]] | None = None,
    ) -> None:
        self._agreeing = agreeing
        self._device = device
        self._blobs = blobs
        self._slots = slots
        self._data = data
        self._trainer = trainer or TrainerCache()
        self._states = states or MemoryStateStore()
        self.lowering = lowering or ReducedPrecision()
        self._noise = noise or (lambda offer: GaussianNoise.secret())

    def commit(self, made: RoundResult) -> Update:
        """Commit the newest offer's result: own state and active model. Returns the update to send."""
        made.keep()
        self._slots.install(made.model)
        return made.update

    def make(
        self,
        offer: Offer,
        *,
        download_seconds: float = 0.0,
        report: Report = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> RoundResult:
        """Evaluate, train, evaluate, check. Nothing that lasts changes: a stopped round's result is dropped.

        The same offer always gives the same weights, so that an interrupted one can be repeated; only a private
        update's noise differs each time. A private update reports nothing else that was measured on samples, nor that
        training diverged. `report` gets phase, units done and units in all; `stop` is called between training steps and
        after them.

        Raises `DamagedBlobError` if a blob must be downloaded again, `ConfigError` for a recipe or codec, `BundleError`
        for weights or mask, `DataError` for local data, `TrainingError`, `TrainingStoppedError` if `stop` returned
        True, `ModelError` if a graph doesn't load or the new model fails its check, `StorageError`.
        """
        recipe = Recipe.from_dict(offer.recipe)
        # Damage is found out first, before a graph is loaded.
        weights = self._weights(offer)
        mask = None if offer.mask is None else self._blob(offer.mask)
        trainer = self._trainer.of(offer.training.sha256, lambda: self._blob(offer.training), self._base(offer))
        wanted = trainer.targets(recipe, offer.classes)
        data = self._data.snapshot(trainer.input_shape, wanted)
        work = LocalUpdate(
            offer, recipe, weights, mask, trainer, self._states, self._device, data, lambda: self._noise(offer)
        )
        data.check(wanted, trainer.input_shape, token_ids=trainer.token_ids)
        self._blob(offer.inference)
        kits = self.lowering.wanted(offer).lowered or {}
        for kit in kits.values():
            self._blob(kit)
        own = LogitAdjustment.of(data.y_train, recipe, offer.classes)
        evaluation = Evaluation(data, recipe, offer.classes, own, trainer.objective(recipe, offer.classes))
        evaluation.metrics["download_seconds"] = download_seconds

        evaluates = offer.round % recipe.evaluate_every == 0
        report("evaluate", 0, 2)
        if evaluates:
            evaluation.add(self._candidate(offer, work.before() or offer.weights), "before")
        del weights, mask
        moments, taken = work.optimizer_state(self._blob)
        task = TrainingTask(
            recipe, offer.classes, offer.seed, self._device, offer.round, offer.widths, work.mask, moments, taken
        )
        del moments
        began = time.monotonic()
        try:
            result = trainer.train(work.tensors, data, task, TrainingControl(partial(report, "train"), stop))
        except DivergedError as error:
            if not recipe.update_clip:
                raise
            # That it did is of the samples, too: the server gets noise alone, as from a board that learnt nothing.
            _LOG.warning("round %d of job %s: %s; the update is noise alone", offer.round, offer.job, error)
            result = TrainingResult.unmoved(
                work.tensors, recipe.steps(data.samples), data.samples, time.monotonic() - began
            )
        if stop():
            raise TrainingStoppedError("training was stopped after its last step")
        report("evaluate", 1, 2)
        # From here on there is memory for the new ones alone, besides the loaded model and what is blended in.
        work.tensors = {}
        graphs = offer.training.sha256, offer.inference.sha256
        checks = self._agreeing is None or graphs not in self._agreeing
        made, kept = work.made(result, self._blobs.put, self._blob, evaluates=evaluates, compares=checks), work.kept
        # Those of tensors and squares are in the loaded graph's memory.
        result = replace(result, tensors={}, last_squares={}, moments={})
        del work, trainer
        self._trainer.release()
        serves: BlobRef | bytes = made.sent if made.after is None else tensorfile.encode(made.after)
        made, loss = replace(made, after=None), made.loss
        when = "after"
        if made.averages:
            if evaluates:
                evaluation.add(self._candidate(offer, serves), when)
            (average, serves), when = self._chosen(offer, made.averages, evaluation), "average"
            made, loss = replace(made, averages=()), average.loss
            if recipe.validate_blend:
                evaluation.metrics[BLEND] = average.blend
                if made.own is not None:
                    made = replace(made, own=replace(made.own, alone=average.blend < recipe.blend))
            del average
        if checks or evaluates:
            model = self._candidate(offer, serves)
            if checks:
                evaluation.check(model, loss)
            if evaluates:
                evaluation.add(model, when)
            if checks:
                evaluation.latency(model)
            del model
        if self._agreeing is not None:
            self._agreeing.add(graphs)
        lower = {p: self._blob(kit) for p, kit in kits.items()}
        precision = self.lowering.staged(self._slots.staging, lower, data, recipe, wanted)
        evaluation.metrics |= training_metrics(result)
        if kept is not None and made.own is not None:
            kept.stage(made.own)
        metrics = evaluation.finite()
        told = {n: v for n, v in metrics.items() if n in MEASURED} if recipe.update_clip else metrics
        update = Update(
            self._device,
            offer.job,
            offer.round,
            offer.attempt,
            offer.weights.sha256,
            made.sent,
            result.samples,
            result.steps,
            told,
        )
        serving = Serving(
            job=offer.job,
            round=offer.round,
            classes=offer.classes,
            files=self._files(offer, serves, precision),
            offset=own.offset,
            loss=recipe.loss,
            present=own.present,
            precision=precision,
        )
        return RoundResult(update, serving, metrics, kept)

    def _files(self, offer: Offer, weights: BlobRef | bytes, precision: str) -> dict[str, str]:
        """Digests of the staged model's files: of what came, those that were offered."""
        files = {GRAPH: offer.inference.sha256} | ({} if offer.base is None else {BASE: offer.base.sha256})
        files[WEIGHTS] = weights.sha256 if isinstance(weights, BlobRef) else tensorfile.digest(weights)
        staging = self._slots.staging
        with storage_errors(f"can't read {staging}"):
            return files | {n: file_digest(staging / n) for n in served_files(precision) if n not in files}

    def _chosen(self, offer: Offer, averages: Sequence[Average], evaluation: Evaluation) -> tuple[Average, bytes]:
        """The average that serves, and its file: the first, unless the second is clearly better."""
        first, *others = averages
        other = None if not others else evaluation.of_each(self._candidate(offer, tensorfile.encode(others[0].tensors)))
        raw = tensorfile.encode(first.tensors)
        if other is None or not clearly_better(other, evaluation.of_each(self._candidate(offer, raw))):
            return first, raw
        _LOG.info("job %s: the average serves with %g of the received weights", offer.job, others[0].blend)
        del raw  # a small board has memory for one
        return others[0], tensorfile.encode(others[0].tensors)

    def _blob(self, ref: BlobRef) -> bytes:
        return self._read(ref.sha256)

    def _read(self, sha256: str) -> bytes:
        return self._intact(self._blobs.read, sha256)

    def _intact(self, read: Callable[[str], _Bytes], sha256: str) -> _Bytes:
        try:
            return read(sha256)
        except StorageError as error:
            damaged = DamagedBlobError(str(error))
            damaged.sha256 = sha256
            raise damaged from error

    def _weights(self, offer: Offer) -> bytes:
        """The received weights, decoded where they came so."""
        if offer.coded is not None and not self._blobs.has(offer.weights.sha256):
            raw = decoded(offer, self._read)
            if raw is None:
                damaged = DamagedBlobError("the weights that were decoded are not those that were offered")
                damaged.sha256 = offer.coded.sha256
                raise damaged
            self._blobs.put(raw)
        return self._blob(offer.weights)

    def _candidate(self, offer: Offer, weights: BlobRef | bytes) -> Predictor:
        source = self._blobs.path(weights.sha256) if isinstance(weights, BlobRef) else weights
        graph = self._blobs.path(offer.inference.sha256)
        return self._trainer.predictor(self._slots.stage(graph, source, self._base(offer)))

    def _base(self, offer: Offer) -> Path | None:
        """The file of the frozen base, which is mapped and never read as a whole."""
        if offer.base is None:
            return None
        self._intact(self._blobs.map, offer.base.sha256)
        return self._blobs.path(offer.base.sha256)


NICENESS = 19  # everything else on the board, predictions above all, has priority over training


class TrainingThread:
    """Carries out one offer in a thread, whose result the loop commits or drops. `status`: phase, done, in all."""

    def __init__(
        self,
        runner: RoundRunner,
        offer: Offer,
        download_seconds: float = 0.0,
        guard: ThermalGuard | None = None,
        *,
        offline: bool = False,
    ) -> None:
        self.runner, self.offer, self.offline = runner, offer, offline
        self.status: tuple[str, int, int] = ("train", 0, 0)
        self.result: RoundResult | None = None
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._guard = guard
        self._download_seconds = download_seconds
        self._thread = threading.Thread(target=self._run, name="fedprune-training", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called, so that its result is dropped."""
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait for its end, but no longer than `timeout` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        # Linux counts niceness by thread; those that onnxruntime starts for this one inherit it.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        restart_peak()
        try:
            self.result = self.runner.make(
                self.offer, download_seconds=self._download_seconds, report=self._report, stop=self._ended
            )
        except Exception as error:  # noqa: BLE001 - it is handed to the loop, which reports it
            self.error = error

    def _ended(self) -> bool:
        """Asked between two steps, which is where training may wait."""
        return self._stop.is_set() if self._guard is None else self._guard.pause(self._stop.is_set)

    def _report(self, phase: str, done: int, total: int) -> None:
        self.status = (phase, done, total)
