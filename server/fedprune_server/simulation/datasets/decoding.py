"""How images and recordings of a data set are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune_device.data.colours import WHITE, Colour


@dataclass(frozen=True)
class Decoding:
    """The conversion of files to inputs.

    Attributes:
        size: Height and width to which images are scaled (bilinear, antialiased); None if all have the same size.
        colour: Whether images have three channels; otherwise they are grey.
        background: The colour that transparent images are drawn on.
        audio_rate: The rate, in Hz, to which recordings are resampled.
        seconds: The length to which recordings are cut, or padded with zeros; 0 to keep theirs.
    """

    size: tuple[int, int] | None = None
    colour: bool = True
    background: Colour = WHITE
    audio_rate: int = 16_000
    seconds: float = 0.0
