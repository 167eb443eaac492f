"""Trains a model on local data with a compiled training graph, without any training framework."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.median import median
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, Tensors
from fedprune.runtime.onnx_subgraph import Subgraphs
from fedprune.runtime.placed_runs import GpuLostError
from fedprune_device.data.batches import Batches, MicroBatch, Rows, even_chunks
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.stored_array import Inputs
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.step_graph import StepGraph
from fedprune_device.training.training_run import TrainingRun
from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingStoppedError, TrainingTask

Array = npt.NDArray[Any]

RunGraph = Callable[[dict[str, Array], Sequence[str]], Mapping[str, Array]]  # takes feeds and names of outputs

# An old value so large that a batch's is negligible beside it: the share of it that is kept is exact to the last bit.
_HUGE_STATISTIC = np.float32(2.0**40)


class Trainer(StepGraph):
    """A loaded training graph, with what a round needs of it; arguments and errors are those of `StepGraph`."""

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are batch-norm statistics that move."""
        return bool(self.statistics)

    def train(
        self, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask, control: TrainingControl | None = None
    ) -> TrainingResult:
        """Train on local data. `tensors` are weights and statistics as received, which are the proximal term's anchors,
        too. Raises `TrainingError` if graph, weights and recipe don't fit each other, `DivergedError` if a loss or
        weight is not finite, `TrainingStoppedError` if `control.stop` returned True, `DataError` if labels or shapes of
        the data don't fit."""
        control = control or TrainingControl()
        try:
            return self._train(tensors, data, task, control)
        except GpuLostError as error:  # a training depends on its arguments alone, so that it may begin again
            self.leave_gpu(error)
            return self._train(tensors, data, task, control)
        finally:
            self.release()

    def _train(
        self, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask, control: TrainingControl
    ) -> TrainingResult:
        began = time.monotonic()
        run = TrainingRun(self, tensors, data, task)
        steps = run.batches.steps
        for number, (_, rows) in enumerate(run.batches.rows(task.round, task.device, seed=task.seed), 1):
            if control.stop():
                raise TrainingStoppedError(f"training was stopped before step {number} of {steps}")
            run.step(number, rows)
            control.progress(number, steps)
            if run.stops_early(number) or control.enough():
                break
        return run.result(time.monotonic() - began)

    def calibrate(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, *, seed: int, device: str
    ) -> Tensors:
        """Batch-norm statistics of the local training samples at these weights, which stay as they are.

        One pass in training mode, in batches of as many samples as a step works on at once: every statistic becomes the
        mean of the batches', as torch's BatchNorm has it with momentum=None. Layers' outputs aren't scaled; frozen
        statistics stay. Seed and device decide which samples share a batch.
        """
        names = self.statistics
        if not names:
            return dict(tensors)
        self.check(tensors)
        order = keyed_generator(seed, "calibration", device).permutation(data.samples)
        batches = even_chunks(order, recipe.micro_batch)
        feeds = {n: np.asarray(v, order="C") for n, v in tensors.items() if n not in names}
        feeds |= self.mask_inputs(tensors, replace(recipe, scale=1.0, mask_threshold=0.0), ALL_ACTIVE)
        return dict(tensors) | batch_norm_statistics(self.run_forward, names, feeds, data.x_train, batches, tensors)

    def loss(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, classes: int, samples: int = 32
    ) -> float:
        """Data loss of the first training samples at these weights, which don't change, without masks and scaler."""
        self.check(tensors)
        y = self.targets(recipe, classes)(data.y_train)
        feeds = self.constant_inputs(tensors, y, replace(recipe, scale=1.0, mask_threshold=0.0), classes)
        feeds |= {n: np.asarray(v, order="C") for n, v in tensors.items()}
        feeds |= {n: np.zeros_like(feeds[n.partition("::")[0]]) for n in self.optimizer_states}
        rows = np.arange(min(samples, len(y)))
        # Half of a micro-batch: nothing takes a step's outputs here, and beside all of its activations they would make
        # onnxruntime's arena grow by up to an activation.
        halves = recipe.with_micro_batches(2 * recipe.accumulate)
        batches = Batches(data.samples, halves, normalised=self.has_batch_norm)
        micro_batches = [MicroBatch.of(data.x_train, y, p) for p in batches.micro_batches(rows)]
        steps = [micro_batches] if self.accumulates else [[micro_batch] for micro_batch in micro_batches]
        losses = [self.run_step(feeds, step, 1).loss for step in steps]
        self.release()
        if self.accumulates:
            return losses[0]
        weights = [self.divisor(micro_batch.y, feeds) for micro_batch in micro_batches]
        return float(np.average(losses, weights=weights)) if any(weights) else 0.0  # all labels may be ignored


class TrainerCache:
    """The training graph that was used last, which another runner's round usually needs again.

    A board doesn't `keep` it after training, nor the model that it received: the new model needs their memory, and
    loading the graph takes less than two steps.
    The subgraphs that were cut from it stay until another graph is used.
    """

    def __init__(self, threads: int = 1, *, keep: bool = False, cuda: bool = False) -> None:
        self.threads = threads
        self._cuda = cuda
        self._keep = keep
        self._loaded: tuple[tuple[str, Path | None], Trainer] | None = None
        self._subgraphs = ("", Subgraphs())
        self._received: tuple[tuple[str, str], Predictor] | None = None

    def of(self, sha256: str, read: Callable[[], bytes], base: Path | None = None) -> Trainer:
        """A trainer for a graph and the frozen base that it reads; `read` gives its bytes if they are needed."""
        key = (sha256, base)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two loaded models are more than a small board has memory for
            if self._subgraphs[0] != sha256:
                self._subgraphs = (sha256, Subgraphs())
            trainer = Trainer(
                read(),
                threads=self.threads,
                cuda=self._cuda,
                base=base,
                subgraphs=self._subgraphs[1],
                keeps_arrays=self._keep,
            )
            self._loaded = (key, trainer)
        return self._loaded[1]

    def predictor(self, model: Path) -> Predictor:
        """Open a staged model."""
        return Predictor(model, threads=self.threads, cuda=self._cuda)

    def received_predictor(self, digests: tuple[str, str], open_model: Callable[[], Predictor]) -> Predictor:
        """The predictor of a received model, by the digests of its graph and weights. If it is to be kept, the last one
        stays open: in a simulation many boards are offered the same model."""
        if not self._keep:
            return open_model()
        if self._received is None or self._received[0] != digests:
            self._received = (digests, open_model())
        return self._received[1]

    def release(self) -> None:
        """Unload the graph after a training, unless it is to be kept."""
        if not self._keep:
            self._loaded = None


def batch_norm_statistics(
    run: RunGraph,
    names: Collection[str],
    feeds: Mapping[str, Array],
    x: Inputs,
    batches: Sequence[Rows],
    old: Mapping[str, Array],
) -> Tensors:
    """Statistics of some samples: the mean over all batches, as torch's BatchNorm has it with momentum=None.

    The dozen steps of a round hardly move running statistics; one pass over the local samples corrects that. A
    statistic's next value is linear in its old one, next = kept · old + (1 − kept) · (the batch's), so that feeding 0
    gives the batch's. `feeds` are all other inputs except the samples. A statistic that the graph leaves alone, or that
    isn't finite afterwards, keeps its `old` value.
    """
    outputs = [step_contract.next_name(n) for n in names]
    zeros = {n: np.zeros_like(old[n]) for n in names}
    huge_outputs = run(
        {**feeds, **{n: np.full_like(v, _HUGE_STATISTIC) for n, v in zeros.items()}, step_contract.X: x[batches[0]]},
        outputs,
    )
    totals: dict[str, npt.NDArray[np.float64]] = {n: np.zeros(old[n].shape, np.float64) for n in names}
    for rows in batches:
        outputs_of_batch = run({**feeds, **zeros, step_contract.X: x[rows]}, outputs)
        for name in names:
            totals[name] += np.asarray(outputs_of_batch[step_contract.next_name(name)], np.float64)
    result: Tensors = {}
    for name in names:
        huge_median = median(np.asarray(huge_outputs[step_contract.next_name(name)]))
        batch_share = 1.0 - huge_median / float(_HUGE_STATISTIC)
        mean = totals[name] / (len(batches) * batch_share) if batch_share > 0 else totals[name] * np.nan
        result[name] = np.asarray(mean if np.isfinite(mean).all() else old[name], np.float32)
    return result
