"""Files as cameras, microphones and programs for labelling write them."""

from __future__ import annotations

import io
import wave


def wav(raw: bytes, width: int = 2, channels: int = 1, rate: int = 16_000) -> bytes:
    """PCM frames as a WAV file; `width` is in bytes."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(raw)
    return file.getvalue()
