"""Defines how a file format turns a file into samples; `image_decoding.Pixels` and `audio_decoding.Audio` do it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.model.lengths import Shape


class Format(Protocol):
    """A file format. `sources.SampleOptions` lists the ones in use."""

    @property
    def endings(self) -> tuple[str, ...]:
        """File name extensions, in lower case, such as `.wav`."""

    @property
    def max_bytes(self) -> int:
        """Larger files are refused before they are read."""

    def samples(self, body: bytes, shape: Shape) -> npt.NDArray[Any]:
        """A file's samples [k, ...], k >= 1, in their most compact type; `shape` is the model's input shape.

        Raises `DataError` if the file is damaged or can't be a sample of this shape.
        """

    def numbers(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Samples as the model takes them."""
