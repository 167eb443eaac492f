"""Local training: a compiled step graph, fed batch by batch, without any training framework."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step
from fedprune.chance import keyed
from fedprune.errors import ExitCode, FedpruneError, ModelError, TrainingError
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.session import Session
from fedprune_device.data import LocalData, class_presence, class_weights, log_prior

Array = npt.NDArray[Any]

_FAR = "The learning rate may be too high for this device's data: try a lower lr, or a smaller momentum."


class TrainingStoppedError(FedpruneError):
    """Training was told to stop, because its round is over or the process ends; nothing was wrong."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True)
class TrainingResult:
    """What local training gave.

    Attributes:
        tensors: The new weights and statistics, in the order in which they were given.
        steps: Optimiser steps that were taken.
        samples: Local training samples.
        loss_first: Mean loss over the first tenth of the steps (at least one).
        loss_last: Mean loss over the last tenth of the steps (at least one).
        train_accuracy: Share of correctly classified samples in the last epoch, as seen while training.
        seconds: Wall-clock time.
        step_seconds: Median time of a step.
    """

    tensors: Tensors
    steps: int
    samples: int
    loss_first: float
    loss_last: float
    train_accuracy: float
    seconds: float
    step_seconds: float


class Trainer:
    """A loaded training graph.

    Args:
        graph: A training graph written to the contract of `fedprune.step`: a file or its bytes.
        threads: Threads inside an operator; with 1 the same inputs give the same bits.

    Raises:
        ModelError: onnxruntime doesn't accept the graph.
        TrainingError: It is not a training graph.
    """

    def __init__(self, graph: Path | bytes, *, threads: int = 1) -> None:
        self._session = Session(graph, threads=threads, training=True)
        inputs, outputs = self._session.inputs, set(self._session.outputs)
        required = {step.X, step.Y, step.LR, step.MOMENTUM, step.WEIGHT_DECAY}
        if required - set(inputs) or not {step.LOSS, step.HITS} <= outputs:
            missing = sorted(required - set(inputs)) + sorted({step.LOSS, step.HITS} - outputs)
            raise TrainingError("this is not a training graph", got=f"no {', '.join(missing)}")
        self.names = tuple(n for n in inputs if n not in step.RESERVED and "::" not in n)
        self.trainable = tuple(n for n in self.names if step.buffer(n) in inputs)
        self.normalised = len(self.trainable) < len(self.names)
        """Whether the model has batch-norm statistics."""
        self.input_shape = inputs[step.X][1][1:]
        known = {*required, *self.names, step.LOGIT_OFFSET, step.CLASS_WEIGHT, step.CLASS_MASK}
        known.update(f(n) for n in self.trainable for f in (step.buffer, step.anchor, step.strength))
        if set(inputs) - known:
            raise TrainingError(
                "the training graph has inputs that this device can't feed",
                got=", ".join(sorted(set(inputs) - known)[:5]),
                hint="Update fedprune on the device.",
            )
        self._moved = [step.following(n) for n in self.names] + [step.following(step.buffer(n)) for n in self.trainable]
        if set(self._moved) - outputs:
            raise TrainingError(
                "the training graph lacks outputs", got=", ".join(sorted(set(self._moved) - outputs)[:5])
            )

    def check(self, tensors: Mapping[str, Array]) -> None:
        """Check weights against the graph's inputs.

        Raises:
            TrainingError: A tensor is missing, unknown, of another type or of a shape that doesn't fit.
        """
        for name in self.names:
            if name not in tensors:
                raise TrainingError(f"tensor {name} is missing from the weights")
        for name in tensors:
            if name not in self.names:
                raise TrainingError(f"the training graph has no tensor {name}")
        sizes: dict[str, int] = {}
        for name, value in tensors.items():
            shape = self._session.inputs[name][1]
            if value.dtype != np.float32:
                raise TrainingError(f"type of {name}", expected="float32", got=value.dtype)
            if len(shape) != value.ndim:
                raise TrainingError(f"shape of {name}", expected=shape, got=value.shape)
            for dim, size in zip(shape, value.shape, strict=True):
                # A free dimension has a name; the same name must mean the same width everywhere.
                wanted = sizes.setdefault(dim, size) if isinstance(dim, str) and dim else dim
                if isinstance(wanted, int) and wanted != size:
                    raise TrainingError(f"shape of {name}", expected=f"{wanted} ({dim})", got=value.shape)

    def train(
        self,
        tensors: Mapping[str, Array],
        data: LocalData,
        recipe: Recipe,
        *,
        seed: int,
        device: str,
        round: int,  # noqa: A002 - the field's word
        classes: int,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TrainingResult:
        """Train on local data.

        Args:
            tensors: Weights and statistics as received; they are the proximal term's anchors, too.
            data: Local samples.
            recipe: What to do.
            seed: The job's seed: with round and device it decides the order of the samples.
            device: The device's name.
            round: The round.
            classes: Entries of the model's output.
            progress: Called with (steps done, steps in all) after each step.
            stop: Asked before each step; True ends the training.

        Raises:
            TrainingError: Graph, weights and recipe don't fit each other, or a loss or weight is not finite.
            TrainingStoppedError: `stop` said so.
            DataError: Labels or shapes of the data don't fit the model.
        """
        began = time.monotonic()
        self.check(tensors)
        data.check(classes, self.input_shape)
        constant = self._constants(tensors, data.y_train, recipe, classes)
        state: dict[str, Array] = {n: np.asarray(v, order="C") for n, v in tensors.items()}
        for name in self.trainable:
            state[step.buffer(name)] = np.zeros_like(state[name])
        starts = self._starts(data.samples, recipe)
        steps = recipe.epochs * len(starts)
        steps = min(steps, recipe.max_steps) if recipe.max_steps else steps
        last_epoch = (steps - 1) // len(starts)
        batches = _batches(starts, data.samples, recipe, round, device, seed=seed)
        losses: list[float] = []
        times: list[float] = []
        hits = seen = 0
        for number, (epoch, rows) in enumerate(itertools.islice(batches, steps), 1):
            if stop is not None and stop():
                raise TrainingStoppedError(f"training was stopped before step {number} of {steps}")
            at = time.monotonic()
            out = self._run({**constant, **state, step.X: data.x_train[rows], step.Y: data.y_train[rows]})
            loss = float(out[step.LOSS])
            if not math.isfinite(loss):
                raise TrainingError(f"the loss is not finite at step {number}", got=loss, hint=_FAR)
            state = {n.removesuffix(step.following("")): out[n] for n in self._moved}
            losses.append(loss)
            if epoch == last_epoch:
                hits, seen = hits + int(out[step.HITS]), seen + len(rows)
            times.append(time.monotonic() - at)
            if progress is not None:
                progress(number, steps)
        result = {n: np.asarray(state[n], np.float32) for n in tensors}
        for name, value in result.items():
            if not np.isfinite(value).all():
                raise TrainingError(f"tensor {name} is not finite after step {steps}", hint=_FAR)
        tenth = max(1, len(losses) // 10)
        return TrainingResult(
            tensors=result,
            steps=steps,
            samples=data.samples,
            loss_first=float(np.mean(losses[:tenth])),
            loss_last=float(np.mean(losses[-tenth:])),
            train_accuracy=hits / seen,
            seconds=time.monotonic() - began,
            step_seconds=float(np.median(times)),
        )

    def loss(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, classes: int, samples: int = 32
    ) -> float:
        """Data loss of the first training samples at these weights, which stay as they are.

        Raises:
            TrainingError: Weights or recipe don't fit the graph.
        """
        self.check(tensors)
        feeds = self._constants(tensors, data.y_train, recipe, classes)
        feeds |= {n: np.asarray(v, order="C") for n, v in tensors.items()}
        feeds |= {step.buffer(n): np.zeros_like(feeds[n]) for n in self.trainable}
        feeds |= {step.X: data.x_train[:samples], step.Y: data.y_train[:samples]}
        return float(self._run(feeds, [step.LOSS])[step.LOSS])

    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        try:
            return self._session.run(feeds, outputs or [step.LOSS, step.HITS, *self._moved])
        except ModelError as error:
            raise TrainingError(f"the training graph failed: {error}") from error

    def _constants(
        self, tensors: Mapping[str, Array], y: npt.NDArray[np.int64], recipe: Recipe, classes: int
    ) -> dict[str, Array]:
        feeds: dict[str, Array] = {
            step.LR: np.array(recipe.lr, np.float32),
            step.MOMENTUM: np.array(recipe.momentum, np.float32),
            step.WEIGHT_DECAY: np.array(recipe.weight_decay, np.float32),
            **loss_terms(y, recipe, classes),
        }
        if recipe.features.proximal:
            for name in self.trainable:
                feeds[step.anchor(name)] = np.asarray(tensors[name], order="C")
                feeds[step.strength(name)] = np.array(recipe.proximal, np.float32)
        moving = {step.X, step.Y, *self.names, *map(step.buffer, self.trainable)}
        wanted = set(self._session.inputs) - moving
        if wanted != set(feeds):
            raise TrainingError(
                "training graph and recipe don't fit each other",
                expected=", ".join(sorted(wanted - set(feeds))[:5]) or "no further inputs",
                got=", ".join(sorted(set(feeds) - wanted)[:5]) or "no value for them",
            )
        return feeds

    def _starts(self, samples: int, recipe: Recipe) -> range:
        """Where the batches of an epoch begin in its order."""
        starts = range(0, samples, recipe.batch_size)
        # Statistics of a single sample are worthless (over a 1×1 map its variance is 0, the unbiased one 0/0), so
        # a leftover sample waits for an epoch whose order puts it into a real batch.
        if self.normalised and len(starts) > 1 and samples % recipe.batch_size == 1 < recipe.batch_size:
            return starts[:-1]
        return starts


def _batches(
    starts: range, samples: int, recipe: Recipe, *key: object, seed: int
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Rows of every step, with the epoch."""
    for epoch in range(recipe.epochs):
        order = keyed(seed, *key, "batches", epoch).permutation(samples)
        for start in starts:
            yield epoch, order[start : start + recipe.batch_size]


def loss_terms(y: npt.NDArray[np.int64], recipe: Recipe, classes: int) -> dict[str, Array]:
    """The vectors over classes that a recipe brings into the loss, by input name of the training graph.

    Raises:
        DataError: A label is out of range.
    """
    features, out = recipe.features, dict[str, Array]()
    if features.logit_offset:
        out[step.LOGIT_OFFSET] = log_prior(y, classes)
    if features.class_weight:
        out[step.CLASS_WEIGHT] = class_weights(y, classes)
    if features.class_mask:
        out[step.CLASS_MASK] = class_presence(y, classes)
    return out
