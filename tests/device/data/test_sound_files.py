"""FLAC, Ogg and MP3 are read by soundfile as WAV is without it; without soundfile one error says what to install."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import DataError, MissingExtraError
from fedprune_device.data import sound_files
from fedprune_device.data.audio_decoding import Audio, read_recording
from fedprune_device.data.labels import Targets
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.splits import SplitShares
from support.fakes.sample_files import wav

pytestmark = pytest.mark.board

RATE = 16_000
TONE = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(RATE) / RATE))
FLAC_HEAD = b"fLaC" + bytes(40)


def sound(kind: str, numbers: Any, rate: int = RATE) -> bytes:
    import soundfile  # no board has it

    file = io.BytesIO()
    soundfile.write(file, numbers, rate, format=kind)
    return file.getvalue()


def as_wav(numbers: Any) -> bytes:
    return wav(np.rint(np.asarray(numbers) * 2**15).astype("<i2").tobytes())


@pytest.mark.once
@pytest.mark.parametrize(("kind", "tolerance"), [("FLAC", 1e-4), ("AIFF", 1e-4), ("OGG", 0.02), ("MP3", 0.02)])
def test_a_recording_is_what_wav_has_of_it_at_the_rate_that_is_asked_for(kind: str, tolerance: float) -> None:
    recording = read_recording(sound(kind, np.stack([TONE, TONE / 2], 1)), 8000)
    expected = read_recording(as_wav(TONE * 0.75), 8000)
    length = min(len(recording), len(expected))
    assert abs(len(recording) - len(expected)) <= (2000 if kind == "MP3" else 0)  # MP3 fills its last frame
    inner = slice(1000, length - 1000)
    np.testing.assert_allclose(recording[inner], expected[inner], atol=tolerance)


@pytest.mark.once
def test_what_is_damaged_or_too_long_is_refused() -> None:
    good = sound("FLAC", TONE)
    for body in (good[:60], b"OggS" + bytes(100), b"ID3" + bytes(100), sound("FLAC", np.zeros((0, 1)))):
        with pytest.raises(DataError) as error:
            read_recording(body, RATE)
        assert "0x" not in str(error.value)
    assert len(good) < 2**20
    with pytest.raises(DataError) as error:
        sound_files.decode_sound_file(good, RATE - 1)
    assert "length" in str(error.value)


def folder(root: Path, files: dict[str, bytes]) -> SampleFolder:
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return SampleFolder(root, (Audio(RATE),), SplitShares(0.0), 100)


@pytest.mark.once
def test_a_folder_may_have_several_formats(tmp_path: Path) -> None:
    files = {"0/a.flac": sound("FLAC", TONE), "1/b.mp3": sound("MP3", TONE), "1/c.wav": as_wav(TONE)}
    data = folder(tmp_path, files).snapshot((RATE // 2,), Targets("cross_entropy", 2))
    assert sorted(np.asarray(data.y_train).tolist()) == [0, 0, 1, 1, 1, 1]


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setattr(sound_files, "has_library", lambda: False)
    samples = folder(tmp_path, {"0/a.flac": FLAC_HEAD, "1/b.mp3": FLAC_HEAD, "1/c.mp3": FLAC_HEAD})
    with pytest.raises(DataError) as error:
        samples.snapshot((RATE,), Targets("cross_entropy", 2))
    assert "pip install soundfile" in str(error.value).lower()
    with pytest.raises(MissingExtraError) as missing:
        read_recording(FLAC_HEAD, RATE)
    assert "pip install soundfile" in str(missing.value)
