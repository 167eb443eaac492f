"""Early stopping: when to wait for better weights no longer, and which epoch's were the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


class EarlyStopping:
    """Says when the validation loss has not fallen for long enough, and keeps the weights of its lowest.

    Args:
        epochs: So many without a lower loss are enough.
        keep: Whether the best epoch's weights will be asked for; if not, the attributes stay empty.

    Attributes:
        tensors: The best epoch's.
        steps: Optimiser steps that led to them.
        squares: What else belongs to that epoch: the squared gradients of its last step.
    """

    def __init__(self, epochs: int, *, keep: bool = True) -> None:
        self._epochs, self._keep = epochs, keep
        self._lowest: float | None = None
        self._waited = 0
        self.tensors: dict[str, Array] = {}
        self.steps = 0
        self.squares: dict[str, Array] = {}

    def over(self, loss: float, tensors: Mapping[str, Array], steps: int, squares: Mapping[str, Array]) -> bool:
        """Take in an epoch's end.

        Args:
            loss: The validation loss.
            tensors: The weights; nobody may write into them.
            steps: Optimiser steps so far.
            squares: Squared gradients of the last one, where they are reported.

        Returns:
            Whether training should end.
        """
        if self._lowest is None or loss < self._lowest:
            self._lowest, self._waited = loss, 0
            if self._keep:
                self.tensors, self.steps, self.squares = dict(tensors), steps, dict(squares)
            return False
        self._waited += 1
        return self._waited >= self._epochs
