"""Draws the samples of every training step, and divides batches into micro-batches that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedprune.core.rng import keyed_generator
from fedprune.model.recipe import Recipe
from fedprune_device.data.stored_array import Array, Inputs

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples that a step computes at once; `partner` are the labels that mixup mixes into `y`.

    `make` reads or computes the samples each time, so that only one micro-batch is in memory.
    """

    make: Callable[[], Array]
    y: Array
    partner: Array | None = None

    @classmethod
    def of(cls, x: Inputs, y: Inputs, rows: Rows) -> MicroBatch:
        labels = y[rows]
        return cls(lambda: x[rows], labels.astype(np.int64, copy=False) if labels.dtype.kind in "iu" else labels)

    @property
    def x(self) -> Array:
        """The samples, made again by each call."""
        return self.make()


class Batches:
    """The steps of one round: `per_epoch`, and `steps` in all.

    `normalised`: the model has batch norms, whose statistics training changes.
    """

    def __init__(self, samples: int, recipe: Recipe, *, normalised: bool) -> None:
        self._samples = samples
        self._recipe = recipe
        self._normalised = normalised
        self._starts = range(0, samples, recipe.batch_size)
        # Statistics of a single sample are worthless (over a 1×1 map its variance is 0, the unbiased one 0/0), so
        # a leftover sample waits for an epoch whose order puts it into a real batch.
        if normalised and len(self._starts) > 1 and samples % recipe.batch_size == 1 < recipe.batch_size:
            self._starts = self._starts[:-1]
        self.per_epoch = len(self._starts)
        steps = recipe.epochs * self.per_epoch
        self.steps = min(steps, recipe.max_steps) if recipe.max_steps else steps

    def rows(self, *key: object, seed: int) -> Iterator[tuple[int, Rows]]:
        """Epoch and rows of every step; `key`, `seed` (the job's) and the epoch decide the order."""
        step = 0
        for epoch in range(self._recipe.epochs):
            order = keyed_generator(seed, *key, "batches", epoch).permutation(self._samples)
            for start in self._starts:
                if step == self.steps:
                    return
                step += 1
                yield epoch, order[start : start + self._recipe.batch_size]

    def micro_batches(self, rows: Rows) -> list[Rows]:
        """The micro-batches of a batch, as equal as can be."""
        max_rows = self._recipe.micro_batch
        if self._normalised and max_rows == 2 and len(rows) % 2 and len(rows) > 1:
            rows = rows[:-1]  # as above: no micro-batch of a single sample
        return np.array_split(rows, -(-len(rows) // max_rows))


def even_chunks(order: Rows, max_rows: int) -> list[Rows]:
    """Rows in parts as equal as possible, of at most `max_rows` and at least two rows."""
    count = -(-len(order) // max_rows)
    return np.array_split(order, max(1, min(count, len(order) // 2)))
