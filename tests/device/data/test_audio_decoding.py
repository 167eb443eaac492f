import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import DataError
from fedprune.model.lengths import PADDING, Lengths, lengths_of
from fedprune_device.data.audio_decoding import Audio, decode_wav, resample
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.splits import SplitShares
from support.fakes.sample_files import wav

pytestmark = pytest.mark.board

SINE = np.sin(np.arange(4000) / 7)


def pcm_bytes(numbers: Any, width: int) -> bytes:
    """Numbers from -1 to 1 as PCM, one after the other by the standard's text."""
    integers = [
        max(-(2 ** (8 * width - 1)), min(2 ** (8 * width - 1) - 1, round(v * 2 ** (8 * width - 1)))) for v in numbers
    ]
    if width == 1:
        return bytes(v + 128 for v in integers)
    return b"".join(v.to_bytes(width, "little", signed=True) for v in integers)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_numbers_of_every_width_are_what_they_were(width: int) -> None:
    decoded, rate = decode_wav(wav(pcm_bytes(SINE, width), width, 1, 8000))
    assert rate == 8000
    np.testing.assert_allclose(decoded, SINE, atol=max(2.0 ** (1 - 8 * width), 1e-6))


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44100, 16000), (48000, 16000), (8000, 16000), (16000, 22050), (11025, 8000)]
)
def test_a_tone_is_the_same_tone_at_another_rate_and_one_that_does_not_fit_is_silent(rate: int, new_rate: int) -> None:
    lower = min(rate, new_rate) / 2

    def tone(hertz: float, sampling_rate: int) -> Any:
        return np.sin(2 * np.pi * hertz * np.arange(sampling_rate) / sampling_rate).astype(np.float32)

    for share in (0.02, 0.3, 0.8):
        resampled = resample(tone(share * lower, rate), rate, new_rate)
        middle = slice(new_rate // 10, -new_rate // 10)
        assert len(resampled) == new_rate
        np.testing.assert_allclose(
            resampled[middle], tone(share * lower, new_rate)[middle], atol=7e-3
        )  # a Hann window's ripple is -44 dB
    if new_rate < rate:
        silent = resample(tone(1.15 * lower, rate), rate, new_rate)
        assert np.abs(silent[new_rate // 10 : -new_rate // 10]).max() < 5e-3


def test_a_short_recording_is_padded_and_a_long_one_is_several_windows() -> None:
    audio, body = Audio(), wav(pcm_bytes(SINE, 2))
    assert audio.samples(body, (1, 5000)).shape == (1, 1, 5000)
    assert not audio.samples(body, (5000,))[0, 4000:].any()
    cut = audio.samples(body, (1, 1500))
    assert cut.shape == (2, 1, 1500)
    np.testing.assert_allclose(cut.ravel(), SINE[:3000], atol=1e-4)


def test_a_recording_of_any_length_within_the_bounds_is_a_sample() -> None:
    shape, audio = (1, Lengths(100, 300)), Audio(8000)
    for count, lengths in ((100, [100]), (299, [299]), (300, [300]), (399, [300]), (400, [300, 100]), (900, [300] * 3)):
        sound = np.linspace(-0.5, 0.5, count)
        samples = audio.samples(wav(pcm_bytes(sound, 2), 2, 1, 8000), shape)
        assert lengths_of(samples, 1).tolist() == lengths
        np.testing.assert_allclose(samples[samples < PADDING], sound[: sum(lengths)], atol=1e-4)
    with pytest.raises(DataError) as error:
        audio.samples(wav(pcm_bytes(SINE[:99], 2), 2, 1, 8000), shape)
    assert error.value.got == 99


def test_recordings_are_samples_of_their_folders_class_and_windows_of_one_share_its_part(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for n in range(10):
            (tmp_path / str(label) / f"{n}.WAV").write_bytes(wav(pcm_bytes([(1 + label * 10 + n) / 100] * 900, 2)))
    (tmp_path / "0" / "torn.wav").write_bytes(b"RIFF")
    folder = SampleFolder(tmp_path, (Audio(),), SplitShares(0.4), 1000)
    data = folder.snapshot((1, 300))
    assert len(data.y_train) + len(data.y_test) == 60
    assert folder.samples == data.samples
    levels = [{round(float(v) * 100) for v in np.asarray(x)[:, 0, 0]} for x in (data.x_train, data.x_test)]
    assert levels[0].isdisjoint(levels[1])
    assert len(levels[0] | levels[1]) == 20
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        np.testing.assert_array_equal(np.asarray(x)[:, 0, 0] * 100 > 10.5, np.asarray(y) == 1)


@pytest.mark.parametrize("size", [0, 2**31 - 37, 2**32 - 1])
def test_a_recording_whose_header_has_no_length_ends_with_its_file(size: int) -> None:
    body = wav(pcm_bytes([n / 100 for n in range(50)], 2))
    streamed = body.replace(b"data" + struct.pack("<I", 100), b"data" + struct.pack("<I", size))
    assert streamed != body
    title = b"LIST" + struct.pack("<I", 17) + b"INFOISFT" + struct.pack("<I", 5) + b"Dawn\0\0"
    for end in (b"", title, title + b"LIST" + struct.pack("<I", 4) + b"adtl"):
        np.testing.assert_array_equal(decode_wav(streamed + end)[0], decode_wav(body)[0])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "can't be read"),
        (wav(b""), "length of a recording"),
        (wav(b"\0\0" * 50)[:-2], "cut off"),
        (wav(b"\0\0" * 50, rate=99), "sample rate"),
        (wav(b"\0\0" * 50).replace(b"fmt \x10\0\0\0\x01", b"fmt \x10\0\0\0\x02"), "expected WAV"),
    ],
)
def test_what_is_no_recording_is_one_clear_error(body: bytes, text: str) -> None:
    with pytest.raises(DataError, match=text):
        Audio().samples(body, (1, 8))


@pytest.mark.once  # boards don't have the library
def test_resampling_is_what_scipy_does() -> None:
    signal = pytest.importorskip("scipy.signal")
    noise = np.random.default_rng(0).standard_normal(4410).astype(np.float32)
    slow = signal.sosfiltfilt(signal.butter(8, 0.25, output="sos"), noise).astype(np.float32)
    resampled, expected = resample(slow, 44100, 16000), signal.resample_poly(slow, 160, 441)
    np.testing.assert_allclose(resampled[100:-100], expected[100:-100], atol=5e-3)
