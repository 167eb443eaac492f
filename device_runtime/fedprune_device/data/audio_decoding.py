"""Decodes recordings into windows of a model's length, and resamples them. WAV needs only numpy."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, shape_text
from fedprune.model.lengths import Lengths, Shape, pad_to_bound
from fedprune_device.data import sound_files

Samples = npt.NDArray[np.float32]

RATES = (1000, 384_000)  # Hz

_MAX_NUMBERS = 2**22  # numbers of one file, before and after it is resampled: at 16 kHz four minutes
_CHUNK_PRODUCTS = 2**20  # products that are summed at once, which bounds the memory of resampling to some MB
_ZERO_CROSSINGS = 16  # zero crossings of the filter, to each side
_BAND_EDGE = 0.945  # of the lower Nyquist frequency: where the filter begins to close

_CONVERT_HINT = "Write it as PCM with a header that has the length, such as: ffmpeg -i FILE -c:a pcm_s16le OUT.wav"

_FORMAT = struct.Struct("<HHIIHH")  # tag, channels, rate, bytes per second, bytes per frame, bits
_PCM, _FLOAT, _A_LAW, _MU_LAW, _EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_WIDTHS = {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8), _A_LAW: (1,), _MU_LAW: (1,)}  # bytes of a number
# In the longer format chunk, which 24 bits and more channels than two need: the tag, and the rest of its GUID.
_GUID_OFFSET = 24
_GUID_END = bytes.fromhex("000000001000800000aa00389b71")
# Recorders write 0 for the length of what they record, and programs that write to a pipe write the largest one, without
# or with some bytes of headers: the recording ends with the file.
_LEAST_UNKNOWN_SIZE = 2**31 - 2**12
_LIST_KINDS = (b"INFO", b"adtl")  # title and artist, and names of marks
_MAX_FLOAT = 4.0  # floats may exceed 1 by some decibels; larger ones are whole numbers that nobody has divided


@dataclass(frozen=True)
class Audio:
    """Recordings as a model takes them: mono, from -1 to 1, at `rate` (Hz), in windows of the input's length."""

    rate: int = 16_000

    max_bytes: ClassVar[int] = 16 * 2**20

    def __post_init__(self) -> None:
        if not RATES[0] <= self.rate <= RATES[1]:
            raise ConfigError("sample rate", expected=f"{RATES[0]} to {RATES[1]} Hz", got=self.rate)

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of files that can be read: those of compressed ones only where soundfile is installed."""
        return (".wav", *(sound_files.ENDINGS if sound_files.has_library() else ()))

    def samples(self, body: bytes, shape: Shape) -> Samples:
        """A recording's windows [k, *shape], where `shape` is [length] or [1, length]. A shorter recording is padded
        with zeros. A longer one is cut into windows that don't overlap; the rest at its end is dropped. If the length
        may vary, padded positions are marked, and the rest is a sample, too, unless it is too short."""
        length = shape[-1] if shape else None
        if isinstance(length, Lengths) and shape[0] in (1, length):
            recording = read_recording(body, self.rate)
            if len(recording) < length.lower:
                expected = f"at least {length.lower} numbers"
                raise DataError("length of a recording", expected=expected, got=len(recording))
            starts = range(0, len(recording) - length.lower + 1, length.upper)
            windows = [recording[start : start + length.upper] for start in starts]
            return np.concatenate([pad_to_bound(w.reshape(1, *[1] * (len(shape) - 1), -1), shape) for w in windows])
        if len(shape) not in (1, 2) or shape[0] not in (1, length) or not isinstance(length, int) or length < 1:
            raise DataError(
                "a recording for this model", expected=f"numbers {shape_text(*shape)}", got="[length] or [1, length]"
            )
        recording = read_recording(body, self.rate)
        count = max(1, len(recording) // length)
        out = np.zeros(count * length, np.float32)
        out[: len(recording)] = recording[: len(out)]
        return out.reshape(count, *(length if size is None else size for size in shape))

    def numbers(self, samples: npt.NDArray[np.float32], shape: Shape) -> Samples:
        return samples

    def whole_numbers(self, samples: npt.NDArray[np.float32], shape: Shape) -> npt.NDArray[np.uint8]:
        raise DataError("a recording for this model", expected="whole numbers", got="numbers from -1 to 1")


def read_recording(body: bytes, rate: int) -> Samples:
    """A file's mean over its channels, from -1 to 1, at `rate`.

    Raises `DataError` if it can't be read, and `MissingExtraError` if that takes soundfile, which isn't installed.
    """
    if not sound_files.is_sound_file(body):
        return resample(*decode_wav(body), rate)
    recording, own_rate = sound_files.decode_sound_file(body, _MAX_NUMBERS)
    _check_rate(own_rate)
    if not len(recording):
        raise DataError("length of a recording", expected=f"1 to {_MAX_NUMBERS} frames", got=0)
    return resample(recording, own_rate, rate)


def _check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError("sample rate", expected=f"{RATES[0]} to {RATES[1]} Hz", got=rate)


def decode_wav(body: bytes) -> tuple[Samples, int]:
    """A file's mean over its channels, from -1 to 1, and its rate.

    Raises `DataError` unless it is PCM, floats, A-law or µ-law.
    Chunks are read here because Python's `wave` knows the longer format chunk only from 3.12 on.
    """
    chunks = _riff_chunks(body)
    head, (size, raw) = chunks.get(b"fmt ", (0, b""))[1], chunks.get(b"data", (-1, b""))
    if len(head) < _FORMAT.size or size < 0:
        raise _unreadable_error("a file without format or data")
    tag, channels, rate, _, frame, bits = _FORMAT.unpack_from(head)
    if tag == _EXTENSIBLE and head[_GUID_OFFSET + 2 :][: len(_GUID_END)] == _GUID_END:
        tag = int.from_bytes(head[_GUID_OFFSET : _GUID_OFFSET + 2], "little")
    if tag not in _WIDTHS:
        raise _unreadable_error(f"format {tag}")
    width = (bits + 7) // 8
    _check_rate(rate)
    if width not in _WIDTHS[tag]:
        widths = " or ".join(str(8 * each) for each in _WIDTHS[tag])
        raise DataError("width of a number", expected=f"{widths} bits", got=f"{bits} bits")
    if not channels or frame != channels * width:
        raise _unreadable_error(f"{channels} channels of {bits} bits in {frame} bytes")
    count = size // frame
    if not 1 <= count <= _MAX_NUMBERS:
        raise DataError("length of a recording", expected=f"1 to {_MAX_NUMBERS} frames", got=count, hint=_CONVERT_HINT)
    if len(raw) != size:
        raise DataError("bytes of a recording", expected=size, got=f"{len(raw)}", hint="The file is cut off.")
    numbers = _decode_numbers(raw[: count * frame], tag, width)
    return np.asarray(numbers.reshape(-1, channels).mean(1), np.float32), rate


def _riff_chunks(body: bytes) -> dict[bytes, tuple[int, bytes]]:
    """The first chunk of each name: its size, and the bytes that are there. Raises `DataError` if it isn't WAV."""
    if body[:4] != b"RIFF" or body[8:12] != b"WAVE":
        raise _unreadable_error("something else")
    chunks: dict[bytes, tuple[int, bytes]] = {}
    position = 12
    while position + 8 <= len(body):
        name, size = struct.unpack_from("<4sI", body, position)
        position += 8
        if name == b"data" and (size == 0 or size >= _LEAST_UNKNOWN_SIZE) and not _is_chunk(body, position):
            size = _samples_end(body, position) - position
        chunks.setdefault(name, (size, body[position : position + size]))
        position += size + size % 2  # a chunk of an odd size is followed by a byte of padding
    return chunks


def _samples_end(body: bytes, begin: int) -> int:
    """The end of samples whose length is unknown: the file's, or where lists of texts or marks begin that end it."""
    end = len(body)
    while True:
        position = body.rfind(b"LIST", begin, end)
        size = int.from_bytes(body[position + 4 : position + 8], "little")
        # All three must fit: samples may have the bytes of the name, too.
        if (
            position < 0
            or body[position + 8 : position + 12] not in _LIST_KINDS
            or position + 8 + size + size % 2 != end
        ):
            return end
        end = position


def _is_chunk(body: bytes, position: int) -> bool:
    """Whether a chunk, or the file's end, may be at a position."""
    if position + 8 > len(body):
        return position == len(body)
    name, size = struct.unpack_from("<4sI", body, position)
    return bool(name.strip().isalnum() and position + 8 + size <= len(body))


def _unreadable_error(got: str) -> DataError:
    return DataError(
        "the recording can't be read", expected="WAV (PCM, floats, A-law or µ-law)", got=got, hint=_CONVERT_HINT
    )


def _decode_numbers(raw: bytes, tag: int, width: int) -> Samples:
    """All numbers of a file, from -1 to 1."""
    if tag == _FLOAT:
        floats = np.frombuffer(raw, f"<f{width}")
        peak = float(np.abs(floats).max())
        if not peak <= _MAX_FLOAT:  # also if it is NaN
            raise DataError(
                "floats of a recording",
                expected="from -1 to 1",
                got=f"{peak:g}",
                hint="Divide them by the largest number of their scale, such as 32768, before they are written.",
            )
        return np.asarray(floats, np.float32)
    if tag in (_A_LAW, _MU_LAW):
        return np.asarray(_companding_table(tag)[np.frombuffer(raw, np.uint8)], np.float32)
    if width == 1:  # unsigned, unlike all others
        return np.asarray((np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128, np.float32)
    if width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return np.asarray(wide.view("<i4")[:, 0].astype(np.float32) / 2**31, np.float32)
    return np.asarray(np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1), np.float32)


def _companding_table(tag: int) -> Samples:
    """The number of each byte of telephone sound (ITU-T G.711), as 16 bits have it."""
    codes = np.arange(256) ^ (0x55 if tag == _A_LAW else 0xFF)
    exponents, mantissas = codes >> 4 & 7, codes & 15
    if tag == _A_LAW:  # the lowest two segments have the same steps
        steps = np.where(exponents > 0, (2 * mantissas + 33) << np.maximum(exponents - 1, 0), 2 * mantissas + 1) * 8
        signs = np.where(codes & 0x80, 1, -1)
    else:
        steps = (((2 * mantissas + 33) << exponents) - 33) * 4
        signs = np.where(codes & 0x80, -1, 1)
    return np.asarray(signs * steps / 2**15, np.float32)


def resample(recording: Samples, rate: int, target_rate: int) -> Samples:
    """Numbers at another rate, by a windowed sinc.

    y(m) = Σ x(n) · h(m · rate / target_rate − n), h(t) = c · sinc(c · t) · cos²(π t / 2w) for |t| < w.
    c is the share of the band that both rates have (Smith, "Digital Audio Resampling", CCRMA).
    """
    if rate == target_rate:
        return recording
    common = gcd(rate, target_rate)
    up, down = target_rate // common, rate // common
    length = -(-len(recording) * up // down)
    if length > _MAX_NUMBERS:
        raise DataError("length of a recording at the model's rate", expected=f"at most {_MAX_NUMBERS}", got=length)
    band = _BAND_EDGE * min(1.0, up / down)
    half_width = int(np.ceil(_ZERO_CROSSINGS / band))
    padded = np.pad(recording, half_width)
    taps = np.arange(-half_width + 1, half_width + 1)
    out = np.empty(length, np.float32)
    step = max(1, _CHUNK_PRODUCTS // len(taps))

    def filters(phase_indices: npt.NDArray[np.int64]) -> Samples:
        """The filter [k, taps] at each of these phases, in parts of `up`."""
        distance = taps - (phase_indices / up)[:, None]
        window = np.cos(np.pi / 2 * np.clip(distance / half_width, -1, 1)) ** 2
        return np.asarray(band * np.sinc(band * distance) * window, np.float32)

    phases = filters(np.arange(up)) if up <= step else None  # most rates have few phases, which come again and again
    for begin in range(0, length, step):
        offsets, phase_indices = np.divmod(np.arange(begin, min(begin + step, length), dtype=np.int64) * down, up)
        neighbours = padded[(offsets[:, None] + taps) + half_width]
        weights = filters(phase_indices) if phases is None else phases[phase_indices]
        out[begin : begin + step] = np.einsum("ij,ij->i", neighbours, weights)
    return out
