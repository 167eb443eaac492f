"""Carries out one round of an offer whose blobs are complete: evaluate, train, evaluate, check, stage the new model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
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
from fedprune.model.scaling import BOARD
from fedprune.runtime.bundle import BASE
from fedprune.runtime.precision_files import served_files
from fedprune.updates.clipped_noise import GaussianNoise
from fedprune.wire.messages import Offer, UpdateAnnouncement
from fedprune_device.data.dataset import LocalData, SampleSource
from fedprune_device.data.labels import LogitAdjustment, Targets
from fedprune_device.data.scaling import Scaling, scale_samples
from fedprune_device.serving.model_slots import ModelSlots, ServingRecord
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.local_state import RoundState
from fedprune_device.storage.state_store import MemoryStateStore, StateStore
from fedprune_device.training.evaluation import MACHINE_METRICS, Evaluation, is_clearly_better, training_metrics
from fedprune_device.training.local_update import LocalUpdate, ServingAverage, UpdateFiles
from fedprune_device.training.received_weights import decode_weights
from fedprune_device.training.trainer import Trainer, TrainerCache
from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingStoppedError, TrainingTask

_LOG = logging.getLogger("fedprune.device")

_Bytes = TypeVar("_Bytes", bytes, memoryview)
Report = Callable[[str, int, int], None]  # takes the phase, units done and units in all


class DamagedBlobError(StorageError):
    """A blob on the disk doesn't match the digest in its name, and must be downloaded again. Only the agent's loop
    deletes it, because only the loop knows whether it is being downloaded already."""

    sha256 = ""


@dataclass(frozen=True)
class TrainedRound:
    """The result of an offer, which lasts only after `RoundRunner.commit`; `round_state` is the staged local state."""

    update: UpdateAnnouncement
    model: ServingRecord
    metrics: Mapping[str, float]
    round_state: RoundState | None = None

    def commit_state(self) -> None:
        """Make the board's own state after the round the current one."""
        if self.round_state is not None:
            self.round_state.commit()


@dataclass(frozen=True)
class _RoundInputs:
    """The samples of a round, scaled, the labels that its graph takes, and the graphs that lower its model, by
    precision."""

    data: LocalData
    targets: Targets
    scaling: Scaling
    lowering: Mapping[str, BlobRef]


class RoundRunner:
    """Carries out offers, one at a time, on a board and in the simulator.

    By default states last as long as this runner, nothing is lowered, and the noise of private updates has a key that
    isn't kept; only simulations give another. `trainer` may be shared with other runners.

    A model is checked before it may serve: its inference graph has the training graph's loss, its outputs are finite.
    `checked_graphs` are pairs of digests of training and inference graphs whose agreement has been checked, perhaps on
    other weights. Only a simulator gives them: as no simulated model serves, it checks a pair once and measures no
    latency.
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
        checked_graphs: set[tuple[str, str]] | None = None,
    ) -> None:
        self._checked_graphs = checked_graphs
        self._device = device
        self._blobs = blobs
        self._slots = slots
        self._data = data
        self._trainer = trainer or TrainerCache()
        self._states = states or MemoryStateStore()
        self.lowering = lowering or ReducedPrecision()
        self._noise = noise or (lambda offer: GaussianNoise.from_system())

    def commit(self, result: TrainedRound) -> UpdateAnnouncement:
        """Commit the newest offer's result: own state and active model. Returns the update to send."""
        result.commit_state()
        self._slots.install(result.model)
        return result.update

    def carry_out(
        self,
        offer: Offer,
        *,
        download_seconds: float = 0.0,
        report: Report = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> TrainedRound:
        """Evaluate, train, evaluate, check. Nothing that lasts changes: a stopped round's result is dropped.

        The same offer always gives the same weights, so that an interrupted one can be repeated; only a private
        update's noise differs each time. A private update reports nothing else that was measured on samples, nor that
        training diverged. `report` gets phase, units done and units in all; `stop` is called between training steps and
        after them. Raises `DamagedBlobError` if a blob must be downloaded again, `ConfigError` for a recipe or codec,
        `BundleError` for weights, mask or drift, `DataError` for local data, `TrainingError`, `TrainingStoppedError` if
        `stop` returned True, `ModelError` if a graph doesn't load or the new model fails its check, `StorageError`.
        """
        recipe = Recipe.from_dict(offer.recipe)
        work, trainer, evaluation, inputs = self._prepare(offer, recipe)
        evaluation.metrics["download_seconds"] = download_seconds
        # A board without samples for a measurement opens no model for it: that may take longer than a step.
        evaluates = evaluation.has_samples and offer.round % recipe.evaluate_every == 0
        report("evaluate", 0, 2)
        if evaluates:
            evaluation.measure(self._received_candidate(offer, work.received_model()), "before")
        result = self._train(offer, recipe, work, trainer, inputs, TrainingControl(partial(report, "train"), stop))
        report("evaluate", 1, 2)
        # From here on a small board has memory only for the new tensors, the loaded model and what is blended in.
        work.tensors, work.drift = {}, {}
        graphs = offer.training.sha256, offer.inference.sha256
        checks = self._checked_graphs is None or graphs not in self._checked_graphs
        files = work.make_files(result, self._blobs.put, self._read_blob, evaluates=evaluates, compares=checks)
        state = work.round_state
        # The arrays of tensors and squares are in the loaded graph's memory, which `release` gives back.
        result = replace(result, tensors={}, last_squares={}, moments={})
        del work, trainer
        self._trainer.release()
        trained_tensors, loss = files.trained_tensors, files.loss
        serving: BlobRef | bytes = files.update if trained_tensors is None else tensorfile.encode(trained_tensors)
        files = replace(files, trained_tensors=None)
        del trained_tensors
        when = "after"
        if files.averages:
            if evaluates:
                evaluation.measure(self._stage_candidate(offer, serving), when)
            (files, serving, loss), when = self._take_average(offer, recipe, files, evaluation), "average"
        if checks or evaluates:
            candidate = self._stage_candidate(offer, serving)
            if checks:
                evaluation.check(candidate, loss)
            if evaluates:
                evaluation.measure(candidate, when)
            if checks:
                evaluation.measure_latency(candidate)
        if self._checked_graphs is not None:
            self._checked_graphs.add(graphs)
        model = self._lower(offer, recipe, inputs, serving, evaluation.adjustment)
        evaluation.metrics |= training_metrics(result)
        if state is not None and files.local_state is not None:
            state.stage(files.local_state)
        metrics = evaluation.finite_metrics()
        return TrainedRound(self._update(offer, recipe, files.update, result, metrics), model, metrics, state)

    def _prepare(self, offer: Offer, recipe: Recipe) -> tuple[LocalUpdate, Trainer, Evaluation, _RoundInputs]:
        """Read all of an offer's blobs and the samples of the round."""
        # Damaged weights are found first, before a graph is loaded.
        weights = self._load_weights(offer)
        mask, drift = (None if ref is None else self._read_blob(ref) for ref in (offer.mask, offer.drift))
        base = self._base_path(offer)
        trainer = self._trainer.of(offer.training.sha256, lambda: self._read_blob(offer.training), base)
        targets = trainer.targets(recipe, offer.classes)
        # A scale that the board has taken of its own samples stays until the job ends: the model has learnt with it.
        served = self._slots.current() if recipe.scaling == (BOARD,) else None
        has_scale = served is not None and served.job == offer.job and served.scaling.inputs is not None
        fitted = served.scaling if served is not None and has_scale else None
        snapshot = self._data.snapshot(trainer.input_shape, targets, trainer.input_type)
        data, scaling = scale_samples(snapshot, recipe, fitted)
        if recipe.scaling == (BOARD,) and fitted is None:
            _LOG.info("job %s: samples are scaled by the mean and deviation of those for training", offer.job)
        work = LocalUpdate(
            offer,
            recipe,
            weights,
            mask,
            drift,
            trainer,
            states=self._states,
            device=self._device,
            data=data,
            noise=lambda: self._noise(offer),
        )
        data.check(targets, trainer.input_shape, input_type=trainer.input_type)
        # Only read to be verified, so that a damaged blob is downloaded again before minutes of training.
        self._read_blob(offer.inference)
        lowering = self.lowering.needed_graphs(offer).lowered or {}
        for graph in lowering.values():
            self._read_blob(graph)
        adjustment = LogitAdjustment.of(data.y_train, recipe, offer.classes)
        objective = trainer.objective(recipe, offer.classes)
        evaluation = Evaluation(data, recipe, offer.classes, adjustment, objective)
        return work, trainer, evaluation, _RoundInputs(data, targets, scaling, lowering)

    def _train(
        self,
        offer: Offer,
        recipe: Recipe,
        work: LocalUpdate,
        trainer: Trainer,
        inputs: _RoundInputs,
        control: TrainingControl,
    ) -> TrainingResult:
        data = inputs.data
        moments, optimizer_steps = work.optimizer_state(self._read_blob)
        task = TrainingTask(
            recipe=recipe,
            classes=offer.classes,
            seed=offer.seed,
            device=self._device,
            round=offer.round,
            widths=offer.widths,
            mask=work.mask,
            drift=work.drift,
            moments=moments,
            optimizer_steps=optimizer_steps,
        )
        del moments
        began = time.monotonic()
        try:
            result = trainer.train(work.tensors, data, task, control)
        except DivergedError as error:
            if not recipe.update_clip:
                raise
            # Divergence tells of the samples, too: the server gets noise alone, as from a board that learnt nothing.
            _LOG.warning("round %d of job %s: %s; the update is noise alone", offer.round, offer.job, error)
            result = TrainingResult.without_change(
                work.tensors, recipe.steps(data.samples), data.samples, time.monotonic() - began
            )
        if control.stop():
            raise TrainingStoppedError("training was stopped after its last step")
        return result

    def _take_average(
        self, offer: Offer, recipe: Recipe, files: UpdateFiles, evaluation: Evaluation
    ) -> tuple[UpdateFiles, bytes, float | None]:
        """The files without averages, the average that is to serve as a file, and its loss in the training graph."""
        average, serving = self._choose_average(offer, recipe, files.averages, evaluation)
        files = replace(files, averages=())
        if recipe.validate_blend:
            evaluation.metrics[BLEND] = average.received_share
            evaluation.adjustment = _adjustment(average, evaluation, recipe)
            if files.local_state is not None:
                local_state = replace(files.local_state, received_share=average.received_share)
                files = replace(files, local_state=local_state)
        return files, serving, average.loss

    def _update(
        self, offer: Offer, recipe: Recipe, sent: BlobRef, result: TrainingResult, metrics: Mapping[str, float]
    ) -> UpdateAnnouncement:
        # A private update tells of the machine alone: all other metrics were measured on samples, without noise.
        sent_metrics = {n: v for n, v in metrics.items() if not recipe.update_clip or n in MACHINE_METRICS}
        return UpdateAnnouncement(
            device=self._device,
            job=offer.job,
            round=offer.round,
            attempt=offer.attempt,
            base=offer.weights.sha256,
            weights=sent,
            samples=result.samples,
            steps=result.steps,
            metrics=sent_metrics,
        )

    def _lower(
        self, offer: Offer, recipe: Recipe, inputs: _RoundInputs, weights: BlobRef | bytes, adjustment: LogitAdjustment
    ) -> ServingRecord:
        """Make the lower precisions of the staged model; returns the record of the one that is to serve."""
        graphs = {precision: self._read_blob(ref) for precision, ref in inputs.lowering.items()}
        staging = self._slots.staging
        precision = self.lowering.lower_staged(staging, graphs, inputs.data, recipe, inputs.targets)
        # The digests of received files are the offer's and not computed again.
        files = {GRAPH: offer.inference.sha256} | ({} if offer.base is None else {BASE: offer.base.sha256})
        files[WEIGHTS] = weights.sha256 if isinstance(weights, BlobRef) else tensorfile.sha256_hex(weights)
        with storage_errors(f"can't read {staging}"):
            files |= {n: file_digest(staging / n) for n in served_files(precision) if n not in files}
        return ServingRecord(
            job=offer.job,
            round=offer.round,
            classes=offer.classes,
            files=files,
            offset=adjustment.offset,
            loss=recipe.loss,
            present=adjustment.present,
            precision=precision,
            scaling=inputs.scaling,
        )

    def _choose_average(
        self, offer: Offer, recipe: Recipe, averages: Sequence[ServingAverage], evaluation: Evaluation
    ) -> tuple[ServingAverage, bytes]:
        """The average that is to serve, and its file: the first one, unless another one is clearly better."""
        best, best_values = averages[0], None
        for average in averages if len(averages) > 1 else ():  # one file at a time: a small board has memory for one
            values = evaluation.metric_per_sample(
                self._stage_candidate(offer, tensorfile.encode(average.tensors)),
                _adjustment(average, evaluation, recipe),
            )
            if best_values is None or is_clearly_better(values, best_values):
                best, best_values = average, values
        if best is not averages[0]:
            _LOG.info("job %s: the average serves with %g of the received weights", offer.job, best.received_share)
        return best, tensorfile.encode(best.tensors)

    def _read_blob(self, ref: BlobRef) -> bytes:
        return self._read_digest(ref.sha256)

    def _read_digest(self, sha256: str) -> bytes:
        return self._with_damage_error(self._blobs.read, sha256)

    def _with_damage_error(self, read: Callable[[str], _Bytes], sha256: str) -> _Bytes:
        try:
            return read(sha256)
        except StorageError as error:
            damaged = DamagedBlobError(str(error))
            damaged.sha256 = sha256
            raise damaged from error

    def _load_weights(self, offer: Offer) -> bytes:
        """The received weights, decoded if they were sent encoded."""
        if offer.encoded and not self._blobs.has(offer.weights.sha256):
            files = decode_weights(offer, self._read_digest)
            if not files:
                damaged = DamagedBlobError("the weights that were decoded are not those that were offered")
                damaged.sha256 = offer.encoded[0].sha256
                raise damaged
            for file in files:
                self._blobs.put(file)
        return self._read_blob(offer.weights)

    def _received_candidate(self, offer: Offer, changed: bytes | None) -> Predictor:
        """The offered model, or what it is `changed` into on this board."""
        if changed is not None:
            return self._stage_candidate(offer, changed)
        digests = (offer.inference.sha256, offer.weights.sha256)
        return self._trainer.received_predictor(digests, lambda: self._stage_candidate(offer, offer.weights))

    def _stage_candidate(self, offer: Offer, weights: BlobRef | bytes) -> Predictor:
        source = self._blobs.path(weights.sha256) if isinstance(weights, BlobRef) else weights
        graph = self._blobs.path(offer.inference.sha256)
        return self._trainer.predictor(self._slots.stage(graph, source, self._base_path(offer)))

    def _base_path(self, offer: Offer) -> Path | None:
        """The file of the frozen base, which is mapped and never read as a whole."""
        if offer.base is None:
            return None
        self._with_damage_error(self._blobs.map, offer.base.sha256)
        return self._blobs.path(offer.base.sha256)


def _adjustment(average: ServingAverage, evaluation: Evaluation, recipe: Recipe) -> LogitAdjustment:
    # A recipe that blends with nothing but the received weights has not compared them: its board's labels count.
    return LogitAdjustment() if average.received_share == 1 > recipe.blend else evaluation.adjustment
