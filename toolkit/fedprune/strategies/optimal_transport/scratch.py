"""Memory that one layer after another works in: fresh pages would cost as much as the work itself."""

from __future__ import annotations

import threading
from math import prod

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Scratch(threading.local):
    """Arrays by a name, one set per thread; each grows to the largest that was asked for."""

    def __init__(self) -> None:
        self._kept: dict[str, Floats] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> Floats:
        """An array of any content, which is good until the same name is asked for again.

        Args:
            name: What it is for.
            shape: Its shape.
        """
        size = prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = self._kept[name] = np.empty(size, np.float32)
        return kept[:size].reshape(shape)


SCRATCH = Scratch()
"""Everybody's."""
