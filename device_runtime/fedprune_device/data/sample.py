"""One sample of the application: its bytes, its label, and the part of the set that it belongs to."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune.core.validation import whole
from fedprune_device.data.reservoir import UNLABELLED

Array = npt.NDArray[Any]
Row = tuple[str, int, Array]  # a sample's name, its label and its numbers

MAX_LABEL = 2**24 - 1

_FLOATS, _TOKENS = 0, 1
_RANK = 8


class SampleConflictError(DataError):
    """A sample is there already, with another label."""


class NoSampleError(DataError):
    """There is no sample of that name."""


@dataclass(frozen=True)
class Added:
    """What became of a sample: its name (a digest of type, shape and numbers), its label and its part (`train`, `val`,
    `test`).
    """

    id: str
    kept: bool
    duplicate: bool
    label: int | None
    part: str


def checked_label(label: int | None) -> int:
    """A label as the set writes it: `UNLABELLED` for None."""
    if label is None:
        return UNLABELLED
    return whole("label", label, 0, MAX_LABEL, error=DataError)


def encoded(x: Array) -> bytes:
    """Type, shape and numbers of a sample: always the same bytes for the same sample. Raises `DataError` if it can't be
    one.
    """
    if x.dtype not in (np.float32, np.int64) or not 1 <= x.ndim <= _RANK:
        kind = f"{x.dtype} {shape_text(*x.shape)}"
        raise DataError("a sample", expected="float32 or int64 of 1 to 8 dimensions", got=kind)
    if x.dtype == np.float32:
        if not np.isfinite(x).all():
            raise DataError("a sample holds numbers that are not finite")
        return _head(_FLOATS, x) + x.astype("<f4").tobytes()
    if x.size and int(x.min()) < 0:
        raise DataError("a sample holds a negative token id", expected="0 or more", got=int(x.min()))
    return _head(_TOKENS, x) + x.astype("<i8").tobytes()


def outline(payload: bytes) -> Array:
    """An array of a sample's type and shape that takes no memory; its numbers are the last bytes of the payload."""
    rank = payload[1]
    kind = np.dtype("<f4" if payload[0] == _FLOATS else "<i8")
    return np.broadcast_to(np.zeros((), kind), struct.unpack_from(f"<{rank}I", payload, 2))


def _head(code: int, x: Array) -> bytes:
    return struct.pack(f"<BB{x.ndim}I", code, x.ndim, *x.shape)


def of_one_kind(rows: list[Row], shape: Sequence[int | str | None] | None) -> list[Row]:
    """The samples that fit the model's shape, and of those the ones of the most frequent shape and type."""
    if shape is not None:
        rows = [r for r in rows if _fits(r[2].shape, shape)]
    kinds = Counter((x.dtype.kind, x.shape) for _, _, x in rows)
    if not kinds:
        return []
    most = max(sorted(kinds, key=repr), key=lambda k: kinds[k])
    return [r for r in rows if (r[2].dtype.kind, r[2].shape) == most]


def _fits(found: tuple[int, ...], wanted: Sequence[int | str | None]) -> bool:
    return len(found) == len(wanted) and all(
        not isinstance(w, int) or w == f for f, w in zip(found, wanted, strict=True)
    )
