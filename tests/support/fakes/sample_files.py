"""Files as cameras, microphones and programs for labelling write them."""

import io
import wave
from typing import Any

import numpy as np
import pytest


def wav(raw: bytes, width: int = 2, channels: int = 1, rate: int = 16_000) -> bytes:
    """PCM frames as a WAV file; `width` is in bytes."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(raw)
    return file.getvalue()


def image_file(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """An image of Pillow's, or pixels [height, width] or [height, width, 3], as a file."""
    file = io.BytesIO()
    pillow = pytest.importorskip("PIL.Image")
    (pillow.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()
