"""Recordings of floats and of telephone sound are the numbers that their standards say."""

import struct

import numpy as np
import pytest

from fedprune.core.errors import DataError
from fedprune_device.data.audio_decoding import decode_wav

pytestmark = pytest.mark.board

PCM, FLOAT, A_LAW, MU_LAW, EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
TONE = np.sin(np.arange(800) / 5) * 0.5


def riff(tag: int, raw: bytes, bits: int, channels: int = 1, *, extensible: bool = False) -> bytes:
    frame = channels * bits // 8
    head = struct.pack("<HHIIHH", EXTENSIBLE if extensible else tag, channels, 16_000, 16_000 * frame, frame, bits)
    if extensible:
        guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
        head += struct.pack("<HHI", 22, bits, 1) + guid
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(raw)) + raw
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_read_as_they_are(bits: int, extensible: bool) -> None:
    raw = np.stack([TONE, -TONE / 2], 1).astype(f"<f{bits // 8}").tobytes()
    recording, rate = decode_wav(riff(FLOAT, raw, bits, 2, extensible=extensible))
    np.testing.assert_allclose(recording, TONE / 4, atol=1e-7)
    assert rate == 16_000


@pytest.mark.parametrize("number", [np.nan, np.inf, 12_000.0])
def test_floats_that_are_no_sound_from_minus_one_to_one_are_refused(number: float) -> None:
    tone = TONE.astype("<f4")
    tone[7] = number
    with pytest.raises(DataError) as error:
        decode_wav(riff(FLOAT, tone.tobytes(), 32))
    assert error.value.hint


# Bytes and numbers of 16 bits, from the tables of ITU-T G.711.
TABLES = {
    A_LAW: {0xD5: 8, 0x55: -8, 0xAA: 32256, 0x2A: -32256, 0x80: 5504, 0xC5: 264},
    MU_LAW: {0xFF: 0, 0x7F: 0, 0x80: 32124, 0x00: -32124, 0xFE: 8, 0x7E: -8, 0xF0: 120, 0xEF: 132},
}


@pytest.mark.parametrize("tag", TABLES)
def test_telephone_sound_has_the_numbers_of_the_standard(tag: int) -> None:
    recording, _ = decode_wav(riff(tag, bytes(TABLES[tag]), 8))
    np.testing.assert_array_equal(recording * 2**15, list(TABLES[tag].values()))


def test_widths_that_a_format_lacks_are_refused() -> None:
    with pytest.raises(DataError, match="32 or 64 bits"):
        decode_wav(riff(FLOAT, bytes(800), 16))
