"""Recordings of a data set as inputs [n, 1, length]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune.model.lengths import PADDING
from fedprune_device.data.audio_decoding import read_recording
from fedprune_server.config.layers import name_source
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.image_files import MAX_DATA_BYTES

Recordings = npt.NDArray[np.float32]


def decode_recordings(splits: Sequence[Sequence[tuple[str, bytes]]], decoding: Decoding) -> list[Recordings]:
    """Decode recordings as boards do: mono, from -1 to 1, at `decoding.audio_rate`.

    Each is a file's bytes, after the name that errors give it. With `decoding.seconds` all have this length. Otherwise
    shorter ones end in `PADDING`, as a model with inputs of any length takes them. Raises `DataError`, which names the
    recording, if one can't be read.
    """
    decoded, length = [[_decode(*each, decoding) for each in split] for split in splits], 0
    if decoding.seconds:
        length = round(decoding.seconds * decoding.audio_rate)
        if not length:
            expected = f"at least one of {decoding.audio_rate} Hz"
            raise DataError("[data] seconds", expected=expected, got=decoding.seconds)
    else:
        length = max((len(recording) for split in decoded for recording in split), default=0)
    count = sum(map(len, decoded))
    if count * length * 4 > MAX_DATA_BYTES:
        raise DataError("recordings", expected=f"at most {MAX_DATA_BYTES} bytes", hint="Give a smaller [data] seconds.")
    filling = 0.0 if decoding.seconds else PADDING
    stacks = [np.full((len(split), 1, length), filling, np.float32) for split in decoded]
    for split, inputs in zip(decoded, stacks, strict=True):
        for row, recording in zip(inputs, split, strict=True):
            row[0, : len(recording)] = recording[:length]
    return stacks


def _decode(name: str, body: bytes, decoding: Decoding) -> Recordings:
    with name_source(name):
        return read_recording(body, decoding.audio_rate)
