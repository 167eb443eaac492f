"""A reader of the few pickle opcodes that data files need: it builds plain values and never calls what a file names.

CIFAR's "python version" is written by Python 2's pickle. A pickle is a program for a small stack machine that may name
any function and have it called; nothing here is ever unpickled that way. This reader knows the opcodes of texts, bytes,
whole numbers, lists, tuples and dicts, and understands the one sequence by which numpy writes an array of plain
numbers. Whatever else a file asks for is refused. (Opcodes: Lib/pickletools.py.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from fedprune.core.errors import DataError, shown

_HINT = "Take the data set's binary version, or save arrays with numpy.savez."

_MARK = object()
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_MOST_AXES = 8
_PLAIN = (int, str, bytes, type(None))


class _Name:
    """One of the names that an array's pickle has, standing for itself; never the thing it names."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Type:
    """A dtype under construction."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "|"


class _Draft:
    """An array under construction."""

    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] | None = None


_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE = map(_Name, ("_reconstruct", "ndarray", "dtype", "encode"))

_NAMES = {
    **{(module, "_reconstruct"): _RECONSTRUCT for module in _ARRAY_MODULES},
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("_codecs", "encode"): _ENCODE,
}


def read_plain(data: bytes) -> Any:
    """The value that a pickle of plain values describes.

    Args:
        data: The pickle, of protocol 2 to 4.

    Returns:
        Dicts, lists, tuples, texts (Python 2's strings as bytes), whole numbers, None, booleans and numpy arrays.

    Raises:
        DataError: It is damaged, or holds anything else.
    """
    try:
        return _finished(_Machine(data).run())
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError, TypeError, OverflowError) as error:
        raise DataError("a pickle is damaged", got=f"{type(error).__name__}: {error}", hint=_HINT) from error


def _finished(value: Any) -> Any:
    """Arrays in the place of drafts. Nothing that contains containers gets through."""
    if not isinstance(value, dict):
        return _entry(value)
    # A file can refer to one list under every key that it has: each is looked through once.
    entries = {id(entry): entry for entry in value.values()}
    plain = {key: _entry(entry) for key, entry in entries.items()}
    return {key: plain[id(entry)] for key, entry in value.items()}


def _entry(value: Any) -> Any:
    if isinstance(value, _Draft) and value.array is not None:
        return value.array
    if isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value)):
        return value
    raise DataError(
        "a pickle's content",
        expected="a dict of arrays, plain values and lists of these",
        got=type(value).__name__.strip("_"),
        hint=_HINT,
    )


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def run(self) -> Any:
        if self._bytes(1) != b"\x80" or self._number("<B") not in (2, 3, 4):
            raise DataError("a file is no pickle of protocol 2 to 4", hint=_HINT)
        while True:
            code = self._bytes(1)
            if code == b".":
                break
            step = _STEPS.get(code)
            if step is None:
                raise DataError("a pickle asks for more than plain values", got=f"opcode {shown(code)}", hint=_HINT)
            step(self)
        if len(self._stack) != 1:
            raise DataError("a pickle is damaged", expected="one value at its end", got=len(self._stack), hint=_HINT)
        return self._stack[0]

    def _bytes(self, count: int) -> bytes:
        out = self._data[self._at : self._at + count]
        if count < 0 or len(out) < count:
            raise DataError("a pickle is cut off", hint=_HINT)
        self._at += count
        return out

    def _skip(self, count: int) -> None:
        self._bytes(count)

    def _number(self, kind: str) -> int:
        return int(struct.unpack(kind, self._bytes(struct.calcsize(kind)))[0])

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + 256)
        if end < 0:
            raise DataError("a pickle is cut off", hint=_HINT)
        out = self._data[self._at : end].decode("ascii")
        self._at = end + 1
        return out

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark in the place of a value")
        return value

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if type(value) is not kind:
            raise TypeError(f"no {kind.__name__}")
        return value

    def _since_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                values = self._stack[at + 1 :]
                del self._stack[at:]
                return values
        raise ValueError("no mark")

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _items(self, values: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (bytes, str)):
                raise TypeError("a key that is no text")
            target[key] = value

    def _name(self, module: str, name: str) -> None:
        known = _NAMES.get((module, name))
        if known is None:
            raise DataError("a pickle names a function", got=shown(f"{module}.{name}"), hint=_HINT)
        self._stack.append(known)

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _reduce(self) -> None:
        given, what = self._pop(), self._pop()
        if what is _RECONSTRUCT and given[0] is _NDARRAY and given[1:] in (((0,), b"b"), ((0,), "b")):
            self._stack.append(_Draft())
        elif what is _DTYPE and 1 <= len(given) <= 3 and isinstance(given[0], (bytes, str)):
            code = given[0].decode("ascii") if isinstance(given[0], bytes) else given[0]
            if code not in ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8"):
                raise DataError("a pickle's array", expected="plain numbers", got=shown(code), hint=_HINT)
            self._stack.append(_Type(code))
        elif what is _ENCODE and len(given) == 2 and given[1] == "latin1" and isinstance(given[0], str):
            value = given[0].encode("latin1")  # bytes, as Python 3 writes them for Python 2
            self._encoded += len(value)
            if self._encoded > len(self._data):  # one text, referred to again and again
                raise DataError("a pickle's bytes", expected="no more than the file is long", hint=_HINT)
            self._stack.append(value)
        else:
            raise DataError("a pickle asks for more than plain values", got="a call", hint=_HINT)

    def _build(self) -> None:
        state, what = self._pop(), self._stack[-1]
        if isinstance(what, _Type):
            order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
            if order not in ("|", "<", ">", "=") or any(v is not None for v in state[2:5]):
                raise DataError("a pickle's array", expected="plain numbers", hint=_HINT)
            what.order = order
        elif isinstance(what, _Draft) and what.array is None:
            _, shape, kind, fortran, content = state
            if not isinstance(kind, _Type) or type(fortran) is not bool or not isinstance(content, bytes):
                raise TypeError("parts of an array")
            if len(shape) > _MOST_AXES or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError("shape of an array")
            dtype = np.dtype(f"{kind.order}{kind.code}")
            if math.prod(shape) * dtype.itemsize != len(content):
                raise ValueError("an array's bytes don't fit its shape")
            what.array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        else:
            raise DataError("a pickle asks for more than plain values", got="an object", hint=_HINT)


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m._stack.append(read(m))


def _keep(key: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m._memo[key(m)] = m._stack[-1]

    return step


def _append(m: _Machine) -> None:
    value = m._pop()
    m._top(list).append(value)


def _appends(m: _Machine) -> None:
    values = m._since_mark()
    m._top(list).extend(values)


def _set(m: _Machine) -> None:
    value, key = m._pop(), m._pop()
    m._items([key, value])


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"(": _push(lambda _: _MARK),
    b"N": _push(lambda _: None),
    b"\x88": _push(lambda _: True),
    b"\x89": _push(lambda _: False),
    b"K": _push(lambda m: m._number("<B")),
    b"M": _push(lambda m: m._number("<H")),
    b"J": _push(lambda m: m._number("<i")),
    b"\x8a": _push(lambda m: int.from_bytes(m._bytes(m._number("<B")), "little", signed=True)),
    b"U": _push(lambda m: m._bytes(m._number("<B"))),
    b"T": _push(lambda m: m._bytes(m._number("<i"))),
    b"C": _push(lambda m: m._bytes(m._number("<B"))),
    b"B": _push(lambda m: m._bytes(m._number("<I"))),
    b"\x8e": _push(lambda m: m._bytes(m._number("<Q"))),
    b"X": _push(lambda m: m._bytes(m._number("<I")).decode()),
    b"\x8c": _push(lambda m: m._bytes(m._number("<B")).decode()),
    b"]": _push(lambda _: []),
    b"}": _push(lambda _: {}),
    b")": _push(lambda _: ()),
    b"t": lambda m: m._stack.append(tuple(m._since_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"a": _append,
    b"e": _appends,
    b"s": _set,
    b"u": lambda m: m._items(m._since_mark()),
    b"q": _keep(lambda m: m._number("<B")),
    b"r": _keep(lambda m: m._number("<I")),
    b"\x94": _keep(lambda m: len(m._memo)),
    b"h": _push(lambda m: m._memo[m._number("<B")]),
    b"j": _push(lambda m: m._memo[m._number("<I")]),
    b"\x95": lambda m: m._skip(8),  # a frame's length: nothing depends on it
    b"c": lambda m: m._name(m._line(), m._line()),
    b"\x93": _Machine._stack_name,
    b"R": _Machine._reduce,
    b"b": _Machine._build,
}  # fmt: skip
