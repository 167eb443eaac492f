"""Folders of recordings: what recorders, phones and sound tools write."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_folders.kinds import Array, Kind, Truth

RATE, LENGTH = 8000, 800
_EXTENSION = struct.pack("<HHIH", 22, 16, 4, 1) + bytes.fromhex("000000001000800000aa00389b71")


def kinds() -> Iterator[Kind]:
    """All kinds of recordings."""
    for bits in (8, 16, 24, 32):
        yield _kind(f"WAV, PCM of {bits} bits", _pcm(bits), max(2.0 ** (2 - bits), 1e-6))
    yield _kind("WAV, floats of 32 bits", lambda tone: _riff(3, 32, tone.astype("<f4").tobytes()), 1e-6)
    yield _kind("WAV, floats of 64 bits", lambda tone: _riff(3, 64, tone.astype("<f8").tobytes()), 1e-6)
    yield _kind("WAV, µ-law", lambda tone: _riff(7, 8, _mu_law(tone)), 0.03)
    yield _kind("WAV with the extensible header", _shorts(code=0xFFFE, extra=_EXTENSION), 1e-4)
    yield _kind("WAV, two channels", lambda tone: _shorts(channels=2)(np.repeat(tone, 2)), 1e-4)
    yield _kind("WAV at 16 kHz, resampled", _shorts(rate=16000), 0.05, rate=16000)
    yield _kind("WAV at 44.1 kHz, resampled", _shorts(rate=44100), 0.05, rate=44100)
    yield _kind("WAV with chunks before and after the sound", _chunks, 1e-4)
    cut = "WAV with a length of 0 in its header, as recorders leave it after a power cut"
    yield _kind(cut, _shorts(length=0), 1e-4)
    yield _kind("WAV with a length of 4 GiB in its header, as pipes write it", _shorts(length=0xFFFFFFFF), 1e-4)
    yield _kind("WAV, shorter than the model's input", lambda tone: _pcm(16)(tone[:600]), 1e-4, kept=600)
    yield _kind("WAV, MP3 in it", lambda tone: _riff(0x55, 0, b"\xff\xfb" * 200), None)
    yield _kind("WAV without any sound", lambda tone: _riff(1, 16, b""), None)
    yield _kind("MP3", lambda tone: b"ID3\x04" + bytes(400), None, suffix=".mp3")
    yield _kind("FLAC", _flac, 1e-4, suffix=".flac")


def _kind(
    name: str,
    encode: Callable[[Array], bytes],
    tolerance: float | None,
    *,
    kept: int = LENGTH,
    rate: int = RATE,
    suffix: str = ".wav",
) -> Kind:
    def write(folder: Path) -> tuple[Path, Truth]:
        samples = []
        for label in (0, 1):
            (folder / str(label)).mkdir()
            (folder / str(label) / f"a{suffix}").write_bytes(encode(_tone(label, rate)))
            samples.append((np.where(np.arange(LENGTH) < kept, _tone(label), 0)[None], label))
        return folder, Truth(None) if tolerance is None else Truth(samples, tolerance)

    return Kind("recordings", name, write, (1, LENGTH))


def _tone(label: int, rate: int = RATE) -> Array:
    """Tenths of a second of a tone that fades in and out, so that resampling has no edges."""
    time = np.arange(LENGTH * rate // RATE) / rate
    return 0.5 * np.sin(2 * np.pi * (200 + 300 * label) * time) * np.sin(np.pi * 10 * time) ** 2


def _shorts(code: int = 1, **header: Any) -> Callable[[Array], bytes]:
    """Numbers of 16 bits behind such a header."""
    return lambda tone: _riff(code, 16, np.round(tone * 32767).astype("<i2").tobytes(), **header)


def _pcm(bits: int) -> Callable[[Array], bytes]:
    def encode(tone: Array) -> bytes:
        numbers = np.round(tone * (2 ** (bits - 1) - 1)).astype(np.int64) + (128 if bits == 8 else 0)
        body = b"".join(int(n).to_bytes(bits // 8, "little", signed=bits > 8) for n in numbers)
        return _riff(1, bits, body)

    return encode


def _riff(
    code: int,
    bits: int,
    body: bytes,
    *,
    channels: int = 1,
    rate: int = RATE,
    length: int | None = None,
    extra: bytes = b"",
) -> bytes:
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate, rate * frame, frame, bits) + extra
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    data = b"data" + struct.pack("<I", len(body) if length is None else length) + body
    return b"RIFF" + struct.pack("<I", min(len(chunks) + len(data), 0xFFFFFFFF)) + chunks + data


def _chunks(tone: Array) -> bytes:
    plain = _shorts()(tone)
    extra = b"LIST" + struct.pack("<I", 6) + b"INFOab"
    return plain[:12] + extra + plain[12:] + b"id3 " + struct.pack("<I", 4) + b"tags"


def _mu_law(tone: Array) -> bytes:
    """Companded as in ITU-T G.711, by its formula over 255 segments of the logarithm."""
    numbers = np.clip(np.round(np.abs(tone) * 32635), 0, 32635).astype(int) + 132
    exponents = np.floor(np.log2(numbers)).astype(int) - 7
    mantissas = (numbers >> (exponents + 3)) & 15
    signs = np.where(tone < 0, 128, 0)
    return bytes((~(signs | (exponents << 4) | mantissas) & 255).astype(np.uint8))


def _flac(tone: Array) -> bytes:
    """As the library soundfile writes it; without it only the signature."""
    try:
        import io

        import soundfile
    except ImportError:
        return b"fLaC" + bytes(300)
    file = io.BytesIO()
    soundfile.write(file, tone, RATE, format="FLAC")
    return file.getvalue()
