"""Measures the statistics of batch norms again, after training and on the board's own samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.median import median
from fedprune.model import step_contract
from fedprune.model.selection import Tensors
from fedprune_device.data.batches import Rows
from fedprune_device.data.stored_array import Inputs

Array = npt.NDArray[Any]

RunGraph = Callable[[dict[str, Array], Sequence[str]], Mapping[str, Array]]  # takes feeds and names of outputs

# An old value so large that a batch's is negligible beside it: the share of it that is kept is exact to the last bit.
_HUGE_STATISTIC = np.float32(2.0**40)


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
