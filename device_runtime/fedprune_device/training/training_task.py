"""The input and the result of a local training (`fedprune_device.training.trainer.Trainer.train`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ElementMask, Tensors


class TrainingStoppedError(FedpruneError):
    """Training was told to stop, because its round is over or the process ends; nothing was wrong."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True)
class TrainingResult:
    """The result of a local training.

    Attributes:
        tensors: The new weights and statistics, in the order in which they were given.
        steps: Optimiser steps that led to these weights.
        samples: Local training samples.
        loss_first: Mean loss over the first tenth of the steps (at least one).
        loss_last: Mean loss over the last tenth of the steps (at least one).
        train_accuracy: Share of correctly classified samples (for the loss `bce`: labels) in the last epoch, counted
            by its steps; None where numbers are predicted.
        seconds: Wall-clock time.
        step_seconds: Median time of a step.
        last_squares: Squared gradients of the last step, by tensor, if the recipe asks for them.
        moments: The optimiser's state after the last step (such as means of gradients), by the names of the graph.
        optimizer_steps: Steps behind that state, with those of earlier rounds where it was kept.
    """

    tensors: Tensors
    steps: int
    samples: int
    loss_first: float
    loss_last: float
    train_accuracy: float | None
    seconds: float
    step_seconds: float
    last_squares: Tensors
    moments: Tensors = field(default_factory=dict)
    optimizer_steps: int = 0

    @classmethod
    def without_change(cls, tensors: Tensors, steps: int, samples: int, seconds: float) -> TrainingResult:
        """The result of a training that changes nothing."""
        return cls(
            dict(tensors),
            steps,
            samples,
            loss_first=math.nan,
            loss_last=math.nan,
            train_accuracy=None,
            seconds=seconds,
            step_seconds=seconds / max(1, steps),
            last_squares={},
        )


@dataclass(frozen=True)
class TrainingTask:
    """The job, round and state of a training.

    Attributes:
        classes: Entries of the model's output.
        seed: The job's seed: with round and device it decides the order of the samples.
        widths: Channels per group that the tensors have; needed only for ordered dropout.
        mask: Which elements of the tensors are active; the others are 0.
        drift: What is added to the gradients of tensors, by their names.
        moments: The optimiser's state to begin with, by the names of the training graph; missing arrays begin at 0.
        optimizer_steps: Steps behind that state.
    """

    recipe: Recipe
    classes: int
    seed: int
    device: str
    round: int
    widths: Sequence[int] = ()
    mask: ElementMask = field(default_factory=dict)
    drift: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    optimizer_steps: int = 0


@dataclass(frozen=True)
class TrainingControl:
    """Callbacks that watch a training and may end it early.

    Attributes:
        progress: Called with (steps done, steps in all) after each step.
        stop: Asked before each step; True ends the training with an error.
        enough: Asked after each step; True ends the training with what it has reached.
    """

    progress: Callable[[int, int], None] = lambda done, total: None
    stop: Callable[[], bool] = lambda: False
    enough: Callable[[], bool] = lambda: False
