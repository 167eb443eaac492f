"""How one file becomes samples, by the ending of its name."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.model.lengths import Shape


class Format(Protocol):
    """A kind of files."""

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files' names, in small letters."""

    @property
    def most_bytes(self) -> int:
        """Larger files are refused before they are read."""

    def samples(self, body: bytes, shape: Shape) -> npt.NDArray[Any]:
        """A file's samples [k, ...], in as few bytes as may be, at least one; `shape` is that of a model's input.

        Raises `DataError` if the file is damaged or can't be a sample of this shape.
        """

    def numbers(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Samples as the model takes them."""
