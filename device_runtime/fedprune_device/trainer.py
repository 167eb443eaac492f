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
from fedprune.errors import BundleError, ExitCode, FedpruneError, ModelError, TrainingError
from fedprune.feeds import anchors, loss_numbers, numbers
from fedprune.ordered_dropout import TensorAxes
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.session import Session
from fedprune_device.data import LocalData
from fedprune_device.labels import class_presence, class_weights, log_prior, positive_weights, targets

Array = npt.NDArray[Any]

Rows = npt.NDArray[np.int64]

_NUMBERS = frozenset(
    {
        *(step.LABEL_SMOOTHING, step.HUBER_DELTA, step.CLIP_NORM, step.DIVISOR),
        *(step.LOGIT_OFFSET, step.CLASS_WEIGHT, step.CLASS_MASK),
    }
)
"""Inputs that a training graph may have once, besides those that it must have."""

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
        train_accuracy: Share of correctly classified samples (with `bce` of labels) in the last epoch, as seen while
            training; None where numbers are predicted.
        seconds: Wall-clock time.
        step_seconds: Median time of a step.
        squares: Squared gradients summed over the steps, by tensor, if the graph gives them.
    """

    tensors: Tensors
    steps: int
    samples: int
    loss_first: float
    loss_last: float
    train_accuracy: float | None
    seconds: float
    step_seconds: float
    squares: Tensors


class Trainer:
    """A loaded training graph.

    Args:
        graph: A training graph written to the contract of `fedprune.step`: a file or its bytes.
        threads: Threads inside an operator; with 1 the same inputs give the same bits.

    Attributes:
        names: The model's tensors.
        trainable: Those that an optimiser moves.
        frozen: Those that stay as they are; all others are statistics.
        normalised: Whether there are batch-norm statistics that move.
        input_shape: One sample's shape.
        token_ids: Whether samples are whole numbers.

    Raises:
        ModelError: onnxruntime doesn't accept the graph.
        TrainingError: It is not a training graph.
    """

    def __init__(self, graph: Path | bytes, *, threads: int = 1) -> None:
        self._session = Session(graph, threads=threads, training=True)
        inputs, outputs = self._session.inputs, set(self._session.outputs)
        optimizer = "adam" if step.BETA1 in inputs else "sgd"
        required = {step.X, step.Y, step.LR, step.WEIGHT_DECAY}
        required |= {step.BETA1, step.BETA2, step.EPSILON, step.STEP_NUMBER} if optimizer == "adam" else {step.MOMENTUM}
        self._classifies = inputs.get(step.Y, ("", ()))[0] == "tensor(int64)"
        results = {step.LOSS, step.HITS} if self._classifies else {step.LOSS}
        if required - set(inputs) or not results <= outputs:
            missing = sorted(required - set(inputs)) + sorted(results - outputs)
            raise TrainingError("this is not a training graph", got=f"no {', '.join(missing)}")
        self._results = (step.LOSS, step.HITS) if step.HITS in outputs else (step.LOSS,)
        self.names = tuple(n for n in inputs if n not in step.RESERVED and "::" not in n)
        self.trainable = tuple(n for n in self.names if step.buffer(n) in inputs)
        self._statistics = tuple(n for n in self.names if n not in self.trainable and step.following(n) in outputs)
        self.frozen = tuple(n for n in self.names if n not in {*self.trainable, *self._statistics})
        self.normalised = bool(self._statistics)
        self.input_shape = inputs[step.X][1][1:]
        self.token_ids = inputs[step.X][0] == "tensor(int64)"
        self._states = [f(n) for n in self.trainable for f in step.states(optimizer)]
        self._squares = [step.squares(n) for n in self.trainable if step.squares(n) in inputs]
        self._sums = [step.total(n) for n in self.trainable if step.total(n) in inputs]
        known = {*required, *self.names, *_NUMBERS, *self._states, *self._squares, *self._sums}
        known.update(f(n) for n in self.trainable for f in (step.anchor, step.strength))
        if set(inputs) - known:
            raise TrainingError(
                "the training graph has inputs that this device can't feed",
                got=", ".join(sorted(set(inputs) - known)[:5]),
                hint="Update fedprune on the device.",
            )
        self._moving = [*self.trainable, *self._statistics, *self._states, *self._squares]
        lacking = {step.following(n) for n in (*self._moving, *self._sums)} - outputs
        if lacking:
            raise TrainingError("the training graph lacks outputs", got=", ".join(sorted(lacking)[:5]))

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
        widths: Sequence[int] = (),
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
            widths: Channels per group that the tensors have; needed for ordered dropout alone.
            progress: Called with (steps done, steps in all) after each step.
            stop: Asked before each step; True ends the training.

        Raises:
            TrainingError: Graph, weights and recipe don't fit each other, or a loss or weight is not finite.
            TrainingStoppedError: `stop` said so.
            DataError: Labels or shapes of the data don't fit the model.
        """
        began = time.monotonic()
        self.check(tensors)
        data.check(classes, self.input_shape, loss=recipe.loss, token_ids=self.token_ids)
        y = targets(data.y_train, recipe.loss, classes)
        constant = self._constants(tensors, y, recipe, classes)
        state: dict[str, Array] = {n: np.asarray(v, order="C") for n, v in tensors.items()}
        for name in (*self._states, *self._squares):
            state[name] = np.zeros_like(state[name.partition("::")[0]])
        plans = self._plans(tensors, recipe, widths)
        if len(plans) > 1:
            state = {n: v.copy() for n, v in state.items()}  # narrower steps write into it
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
            parts = self._parts(rows, recipe)
            plan, fed = plans[0], {**constant, **state}
            if len(plans) > 1:
                plan = plans[int(keyed(seed, round, device, "widths", number).integers(len(plans)))]
            if plan != plans[0]:
                fed = self._axes.narrowed(fed, plans[0], plan)
            loss, right, moved = self._step(fed, [(data.x_train[p], y[p]) for p in parts], number)
            if not math.isfinite(loss):
                raise TrainingError(f"the loss is not finite at step {number}", got=loss, hint=_FAR)
            if plan == plans[0]:
                state.update(moved)
            else:
                # Statistics of narrower layers are those of other sums: only steps at the own width measure them.
                moved = {n: v for n, v in moved.items() if n not in self._statistics}
                self._axes.write_back(state, moved, plans[0], plan)
            losses.append(loss)
            if epoch == last_epoch:
                hits, seen = hits + right, seen + sum(y[p].size for p in parts)
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
            train_accuracy=hits / seen if step.HITS in self._results else None,
            seconds=time.monotonic() - began,
            step_seconds=float(np.median(times)),
            squares={n.partition("::")[0]: state[n] for n in self._squares},
        )

    def loss(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, classes: int, samples: int = 32
    ) -> float:
        """Data loss of the first training samples at these weights, which stay as they are.

        Raises:
            TrainingError: Weights or recipe don't fit the graph.
            DataError: The labels don't fit the recipe's loss.
        """
        self.check(tensors)
        y = targets(data.y_train, recipe.loss, classes)
        feeds = self._constants(tensors, y, recipe, classes)
        feeds |= {n: np.asarray(v, order="C") for n, v in tensors.items()}
        feeds |= {n: np.zeros_like(feeds[n.partition("::")[0]]) for n in (*self._states, *self._squares)}
        rows = np.arange(min(samples, len(y)))
        parts = [(data.x_train[p], y[p]) for p in self._parts(rows, recipe)]
        if self._sums:
            return self._step(feeds, parts, 1)[0]
        losses = [self._step(feeds, [part], 1)[0] for part in parts]
        return float(np.average(losses, weights=[_weight(y, feeds) for _, y in parts]))

    def _step(
        self, feeds: dict[str, Array], parts: Sequence[tuple[Array, Array]], number: int
    ) -> tuple[float, int, dict[str, Array]]:
        """One optimiser step over the parts of a batch: loss, hits, and what has moved, by input name."""
        feeds = dict(feeds)
        if step.STEP_NUMBER in self._session.inputs:
            feeds[step.STEP_NUMBER] = np.array(number, np.int64)
        if step.DIVISOR in self._session.inputs:
            feeds[step.DIVISOR] = np.array(sum(_weight(y, feeds) for _, y in parts), np.float32)
        feeds |= {n: np.zeros_like(feeds[n.partition("::")[0]]) for n in self._sums}
        loss, hits = 0.0, 0
        out: dict[str, Array] = {}
        for count, (x, y) in enumerate(parts, 1):
            names = self._moving if count == len(parts) else [*self._statistics, *self._sums]
            out = self._run({**feeds, step.X: x, step.Y: y}, [*self._results, *map(step.following, names)])
            loss += float(out[step.LOSS])
            hits += int(out[step.HITS]) if step.HITS in out else 0
            out = {n: out[step.following(n)] for n in names}
            feeds |= out
        return loss, hits, out

    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        try:
            return self._session.run(feeds, outputs)
        except ModelError as error:
            raise TrainingError(f"the training graph failed: {error}") from error

    def _constants(self, tensors: Mapping[str, Array], y: Array, recipe: Recipe, classes: int) -> dict[str, Array]:
        """What is fed in every step alike."""
        feeds = numbers(recipe) | anchors(recipe, tensors, self.trainable) | loss_terms(y, recipe, classes)
        moving = {step.X, step.Y, step.STEP_NUMBER, step.DIVISOR}
        wanted = set(self._session.inputs) - moving - {*self.names, *self._states, *self._squares, *self._sums}
        classifies, scores = recipe.loss == "cross_entropy", recipe.loss in ("cross_entropy", "bce")
        whole = not self._sums and recipe.features.accumulate
        if wanted != set(feeds) or classifies != self._classifies or scores != (step.HITS in self._results) or whole:
            raise TrainingError(
                "training graph and recipe don't fit each other",
                expected=", ".join(sorted(wanted - set(feeds))[:5]) or "no further inputs",
                got=", ".join(sorted(set(feeds) - wanted)[:5]) or f"no value for them (loss {recipe.loss})",
            )
        return feeds

    def _plans(self, tensors: Mapping[str, Array], recipe: Recipe, widths: Sequence[int]) -> list[tuple[int, ...]]:
        """The widths at which steps train, the tensors' own first."""
        if not recipe.ordered_dropout:
            return [()]
        try:
            self._axes = TensorAxes.from_json(self._session.metadata.get(step.AXES, "{}"))
            plans = self._axes.plans(widths, recipe.ordered_dropout)
            self._axes.check(tensors, plans[0])
        except BundleError as error:
            raise TrainingError(
                f"ordered dropout: {error}", hint="The training graph must be made for this recipe."
            ) from error
        return plans

    def _starts(self, samples: int, recipe: Recipe) -> range:
        """Where the batches of an epoch begin in its order."""
        starts = range(0, samples, recipe.batch_size)
        # Statistics of a single sample are worthless (over a 1×1 map its variance is 0, the unbiased one 0/0), so
        # a leftover sample waits for an epoch whose order puts it into a real batch.
        if self.normalised and len(starts) > 1 and samples % recipe.batch_size == 1 < recipe.batch_size:
            return starts[:-1]
        return starts

    def _parts(self, rows: Rows, recipe: Recipe) -> list[Rows]:
        """The parts in which a batch is worked through, as equal as can be."""
        most = recipe.micro_batch
        if self.normalised and most == 2 and len(rows) % 2 and len(rows) > 1:
            rows = rows[:-1]  # as above: no part of a single sample
        return np.array_split(rows, -(-len(rows) // most))


def _batches(starts: range, samples: int, recipe: Recipe, *key: object, seed: int) -> Iterator[tuple[int, Rows]]:
    """Rows of every step, with the epoch."""
    for epoch in range(recipe.epochs):
        order = keyed(seed, *key, "batches", epoch).permutation(samples)
        for start in starts:
            yield epoch, order[start : start + recipe.batch_size]


def _weight(y: Array, feeds: Mapping[str, Array]) -> float:
    """What a part of a batch adds to the divisor of the loss."""
    if y.ndim == 1 and step.CLASS_WEIGHT in feeds:
        return float(feeds[step.CLASS_WEIGHT][y].sum(dtype=np.float64))
    return float(len(y))


def loss_terms(y: Array, recipe: Recipe, classes: int) -> dict[str, Array]:
    """The vectors over classes and the numbers that a recipe brings into the loss, by input name of the training graph.

    Args:
        y: All training labels, as `labels.targets` gives them.
        recipe: The recipe.
        classes: Entries of the model's output.

    Raises:
        DataError: A label is out of range.
    """
    features, out = recipe.features, dict[str, Array]()
    if features.logit_offset:
        out[step.LOGIT_OFFSET] = log_prior(y, classes)
    if features.class_weight:
        out[step.CLASS_WEIGHT] = class_weights(y, classes) if recipe.loss == "cross_entropy" else positive_weights(y)
    if features.class_mask:
        out[step.CLASS_MASK] = class_presence(y, classes)
    return out | loss_numbers(recipe)
