"""Divides a table's rows into blocks, and says for what each block is: training, validation or testing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_array import Rows

# Windows, end to end, in a block. A block's last rows are lost to windows that would reach into the next one, so that
# longer blocks lose less, and shorter ones spread the parts more evenly. A short table needs short blocks to have
# several, and rows that are appended must not change the blocks before them: blocks grow along the file.
_MIN_BLOCK_WINDOWS, MAX_BLOCK_WINDOWS = 2, 8
_GROWTH = 5  # a block has this share of the windows before it: of 1 to 5, the one that keeps --test-share best
# (√5 − 1) / 2: its multiples modulo 1 fill the range from 0 to 1 evenly, however many there are.
_GOLDEN_RATIO = 0.6180339887498949


def block_starts(rows: int, span: int, shares: SplitShares) -> Rows:
    """The first rows [n], ascending, of the blocks of a table of so many rows, with windows of `span` rows.

    If all is for training, the table is one block.
    """
    if not shares.test and not shares.validation:
        return np.zeros(1, np.int64)
    starts, size = [0], _MIN_BLOCK_WINDOWS
    while size < MAX_BLOCK_WINDOWS:
        starts.append(starts[-1] + size)
        size = max(_MIN_BLOCK_WINDOWS, min(MAX_BLOCK_WINDOWS, starts[-1] // _GROWTH))
    short_blocks = np.array(starts[:-1], np.int64) * span
    long_blocks = np.arange(starts[-1] * span, max(rows, 1), MAX_BLOCK_WINDOWS * span, dtype=np.int64)
    return np.concatenate([short_blocks[short_blocks < max(rows, 1)], long_blocks])


def splits_of_blocks(blocks: Rows, shares: SplitShares) -> npt.NDArray[np.str_]:
    """The split of each of these blocks [n], by their numbers from 0."""
    # 1 minus the sequence: the first block then is for training, whatever the shares are.
    positions = 1 - (blocks * _GOLDEN_RATIO) % 1
    return np.array([shares.split_at(n) for n in positions], "U5")
