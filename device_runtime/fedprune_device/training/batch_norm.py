"""Batch-norm statistics of a board's own samples, measured by the forward part of its training graph.

The dozen steps of a round hardly move running statistics: they stay those of the averaged model, which no board's
activations have. One pass over the local samples puts that right. A statistic's next value is linear in its old one,
next = kept · old + (1 − kept) · (the batch's), so that feeding 0 gives what the batch says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model import step_contract
from fedprune.model.selection import Tensors
from fedprune_device.data.batches import Rows
from fedprune_device.data.stored_array import Inputs

Array = npt.NDArray[Any]

Run = Callable[[dict[str, Array], Sequence[str]], Mapping[str, Array]]
"""Takes feeds and names of outputs."""

_HUGE = np.float32(2.0**40)
"""An old value beside which a batch's is nothing, so that the share of it that is kept comes out to the last bit."""


def measured(
    run: Run,
    names: Collection[str],
    feeds: Mapping[str, Array],
    x: Inputs,
    batches: Sequence[Rows],
    old: Mapping[str, Array],
) -> Tensors:
    """Statistics of some samples: the mean of what all batches give, as torch's BatchNorm has it with momentum=None.

    `feeds` are all other inputs except the samples. A statistic that the graph leaves alone, or that isn't finite
    afterwards, keeps its `old` value.
    """
    outputs = [step_contract.following(n) for n in names]
    none = {n: np.zeros_like(old[n]) for n in names}
    huge = run(
        {**feeds, **{n: np.full_like(v, _HUGE) for n, v in none.items()}, step_contract.X: x[batches[0]]}, outputs
    )
    totals: dict[str, npt.NDArray[np.float64]] = {n: np.zeros(old[n].shape, np.float64) for n in names}
    for rows in batches:
        out = run({**feeds, **none, step_contract.X: x[rows]}, outputs)
        for name in names:
            totals[name] += np.asarray(out[step_contract.following(name)], np.float64)
    result: Tensors = {}
    for name in names:
        taken = 1.0 - float(np.median(np.asarray(huge[step_contract.following(name)]))) / float(_HUGE)
        fresh = totals[name] / (len(batches) * taken) if taken > 0 else totals[name] * np.nan
        result[name] = np.asarray(fresh if np.isfinite(fresh).all() else old[name], np.float32)
    return result
