"""Messages of a sensor: rows of numbers, which become windows of a model's input, and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, reason, shape_text, shown
from fedprune.core.validation import is_number, is_whole
from fedprune.model.lengths import Shape
from fedprune_device.data.table_windows import laid_out, oriented

FORMATS = ("json", "float32", "int16")
MESSAGE_BYTES = 2**20

_LABEL_LETTERS = 200
_FULL_SCALE = 32_768  # of int16, as in recordings

Label = int | str


@dataclass(frozen=True)
class Message:
    """Rows [n, channels] in order of time, and the class of the last one, if it is known."""

    rows: npt.NDArray[np.float32]
    label: Label | None = None

    @classmethod
    def parse(cls, payload: bytes, kind: str, channels: int | None = None) -> Message:
        """Read a payload: one row, or rows of `channels` numbers; raises `DataError` if it is damaged.

        `kind` is one of `FORMATS`. JSON is a number, a row, a list of rows, or an object with these in `x` and maybe a
        `label`.
        """
        if len(payload) > MESSAGE_BYTES:
            raise DataError("size of a message", expected=f"at most {MESSAGE_BYTES} bytes", got=len(payload))
        body: Any = _json(payload) if kind == "json" else {"x": _raw(payload, kind)}
        found = body if isinstance(body, dict) else {"x": body}
        try:
            x = np.asarray(found.get("x"))
        except (ValueError, OverflowError) as error:  # rows of different lengths
            raise DataError("rows of a message", expected="numbers, as many in each", got=reason(error)) from error
        width = channels or (x.shape[-1] if x.ndim else 1)
        if x.dtype.kind not in "iuf" or x.ndim > 2 or not x.size or x.size % width:
            raise DataError(
                "numbers of a message", expected=f"rows of {width}" if channels else "a row, or a list of rows",
                got=shown(payload),
            )  # fmt: skip
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(x, np.float32).reshape(-1, width)
        if not np.isfinite(rows).all():
            raise DataError("a message holds numbers that are not finite", got=shown(payload))
        return cls(rows, None if found.get("label") is None else _label(found["label"]))


def label_of(payload: bytes) -> tuple[Label, float | None]:
    """A label's message: a class's number or name, or an object with it in `label` and maybe a `time` in seconds since
    1970. Raises `DataError` if it is none."""
    try:
        found: Any = _json(payload)
    except DataError:
        found = payload.decode(errors="replace").strip()  # a name without quotes
    if not isinstance(found, dict):
        return _label(found), None
    time = found.get("time")
    if time is not None and not is_number(time):
        raise DataError("time of a label", expected="seconds since 1970", got=shown(time))
    return _label(found.get("label")), time


@dataclass(frozen=True)
class Window:
    """A model's input, the class of its last row, and when its first and last row arrived."""

    x: npt.NDArray[np.float32]
    label: Label | None
    begin: float
    end: float


class Windows:
    """Makes windows of rows in their order of arrival; windows share no rows, so that none is trained and tested on."""

    def __init__(self) -> None:
        self._rows = np.zeros((0, 0), np.float32)
        self._begin = 0.0

    def clear(self) -> None:
        """Begin again: rows are missing, and no window may span the gap."""
        self._rows = self._rows[:0]

    def add(self, message: Message, shape: Shape, now: float) -> Iterator[Window]:
        """The windows that a message completes for a model's input of this shape; raises `DataError` if its rows don't
        fit."""
        channels = message.rows.shape[1]
        steps, first = oriented(shape, channels, True)
        if not steps:
            raise DataError("numbers in a row", expected=f"channels of {shape_text(*shape)}", got=channels)
        if not len(self._rows) or self._rows.shape[1] != channels:
            self._rows, self._begin = message.rows[:0], now
        rows, convert = np.concatenate([self._rows, message.rows]), laid_out(0, channels, first, len(shape))
        whole = len(rows) // steps
        self._rows = rows[whole * steps :].copy()
        for number in range(whole):
            begin, self._begin = self._begin, now
            yield Window(convert(rows[None, number * steps : (number + 1) * steps])[0], message.label, begin, now)


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload.decode())
    except (ValueError, RecursionError) as error:
        raise DataError("a message isn't JSON", got=shown(payload)) from error


def _raw(payload: bytes, kind: str) -> npt.NDArray[np.float32]:
    dtype = np.dtype("<f4" if kind == "float32" else "<i2")
    if len(payload) % dtype.itemsize:
        raise DataError(f"bytes of {kind}", expected=f"a multiple of {dtype.itemsize}", got=len(payload))
    found = np.frombuffer(payload, dtype).astype(np.float32)
    return found if kind == "float32" else found / np.float32(_FULL_SCALE)


def _label(value: object) -> Label:
    if is_whole(value) or (isinstance(value, str) and 0 < len(value) <= _LABEL_LETTERS and value.isprintable()):
        return value
    raise DataError("a label", expected="a class's number or name", got=shown(value))
