"""Decodes FLAC, Ogg, MP3 and AIFF by the library soundfile (libsndfile), on boards that have it."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, MissingExtraError, error_reason

ENDINGS = (".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif")
INSTALL_HINT = "pip install soundfile, in the environment of fedprune"

_FORMATS = ("FLAC", "OGG", "MP3", "AIFF")  # libsndfile's names: it knows many more, which nobody tries here
_MAGIC = (b"fLaC", b"OggS", b"FORM", b"ID3")
_MPEG_SYNC = 0xFFE0  # the first eleven bits of a frame of MPEG audio
_BLOCK_FRAMES = 2**16  # frames that are decoded at once
_MAX_CHANNELS = 8  # as FLAC


def has_library() -> bool:
    return find_spec("soundfile") is not None


def is_sound_file(body: bytes) -> bool:
    """Whether a file begins as one of these formats does."""
    return body.startswith(_MAGIC) or int.from_bytes(body[:2], "big") & _MPEG_SYNC == _MPEG_SYNC


def decode_sound_file(body: bytes, max_frames: int) -> tuple[npt.NDArray[np.float32], int]:
    """A file's mean over its channels, from -1 to 1, and its rate.

    Raises `DataError` if it is damaged, or longer than `max_frames`, and `MissingExtraError` without soundfile.
    """
    try:
        import soundfile
    except (ModuleNotFoundError, OSError) as error:  # OSError: the package is there, its C library isn't
        raise MissingExtraError("FLAC, Ogg, MP3 and AIFF need soundfile", hint=f"{INSTALL_HINT}.") from error
    try:
        with soundfile.SoundFile(io.BytesIO(body)) as file:
            if file.format not in _FORMATS or not 1 <= file.channels <= _MAX_CHANNELS:
                got = f"{file.format} of {file.channels} channels"
                raise DataError(
                    "a recording", expected=f"{', '.join(_FORMATS)}, 1 to {_MAX_CHANNELS} channels", got=got
                )
            # In blocks, because a small file can unfold to hours, and some formats only estimate their length.
            blocks, count = [np.zeros(0, np.float32)], 0
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                blocks.append(block.mean(1))
                count += len(block)
                if count > max_frames:
                    raise DataError("length of a recording", expected=f"at most {max_frames} frames", got="more")
            return np.concatenate(blocks).astype(np.float32), int(file.samplerate)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes a decoder raise anything
        # The library's text begins with an address of the memory, which would make equal errors look different.
        reason = getattr(error, "error_string", "") or error_reason(error)
        raise DataError("the recording can't be read", expected=", ".join(_FORMATS), got=reason) from error
