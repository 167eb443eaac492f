"""Damaged and hostile inputs, made of sound ones: in their bytes, in their text, and in the structure of their JSON."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

DEEP = 3000  # levels of nesting, which is more than Python's recursion takes

_NAMES = (
    *("../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", "", "a\0b", "con", "a" * 300, "\ud800", "\x1b[2J"),
    *("__metadata__", "..\\b", "a\nb", "ä" * 70, "\u202egnp", "%s%n", "{0}", "-rf", "~root"),
)
_NUMBERS = (
    *(0, -1, 1, 2, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**53 + 1, 2**63 - 1, 2**63),
    *(2**64, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
)
_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [None], {"": {}}, [[]], "0", "1", "1e9", "true", "NaN")
_TOKENS = (
    *(b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"0x" + b"f" * 5000, b"[" * DEEP, b'{"":' * DEEP, b"\\ud800"),
    *(b"null", b"\\u0000"),
    *(b"../" * 20, b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"'", b"\\", b"{}", b"[]", b",", b":"),
    *(b"\n", b"\r\n", b"=", b"#", b"-", b"0x", b"1979-05-27T07:32:00Z", b"''' ", b"inf", b"%00", b"@", b"::"),
    *(b"%2e%2e%2f",),
)  # fmt: skip
_EXTREMES = (0, 1, -1, -2, 0x7F, 0x80, 0x7FFF, 0x8000, 0x7FFFFFFF, -0x80000000, 0x7FFFFFFFFFFFFFFF)


def mutated(seeds: Sequence[bytes], rng: random.Random, *, text: bool = False) -> bytes:
    """One of the inputs, damaged once or a few times.

    Args:
        seeds: Sound inputs; one that is JSON is damaged in its structure, too.
        rng: Says how.
        text: Whether the inputs are text, of which words and numbers are worth changing.
    """
    raw = rng.choice(seeds)
    if raw[:1] in (b"{", b"[") and rng.random() < 0.6:
        try:
            return _damaged_json(raw, rng)
        except (ValueError, RecursionError):  # no JSON after all
            pass
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if text and rng.random() < 0.5:
            raw = rng.choice(_TEXT)(raw, rng)
        elif rng.random() < 0.1:
            raw = _splice(raw, rng.choice(seeds), rng)
        else:
            raw = rng.choice(_BYTES)(raw, rng)
    return raw


def _at(raw: bytes, rng: random.Random) -> int:
    """A place, more often near the beginning or the end, where formats keep what says how long things are."""
    near = rng.random()
    if near < 0.4:
        return rng.randrange(min(len(raw), 128) + 1)
    return len(raw) - rng.randrange(min(len(raw), 128) + 1) if near < 0.55 else rng.randrange(len(raw) + 1)


def _flip(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw or b"\0")
    out[min(_at(raw, rng), len(out) - 1)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _byte(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw or b"\0")
    out[min(_at(raw, rng), len(out) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(out)


def _insert(raw: bytes, rng: random.Random) -> bytes:
    at = _at(raw, rng)
    return raw[:at] + rng.randbytes(rng.choice((1, 1, 2, 4, 8, 64, 1000))) + raw[at:]


def _delete(raw: bytes, rng: random.Random) -> bytes:
    at = _at(raw, rng)
    return raw[:at] + raw[at + rng.choice((1, 1, 2, 4, 8, 64, 1000)) :]


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: _at(raw, rng)]


def _repeat(raw: bytes, rng: random.Random) -> bytes:
    at = _at(raw, rng)
    piece = raw[at : at + rng.choice((1, 4, 32, 500))]
    return raw[:at] + piece * rng.choice((2, 3, 50)) + raw[at + len(piece) :]


def _number(raw: bytes, rng: random.Random) -> bytes:
    """A length or an offset, perhaps, at its extreme."""
    size, at = rng.choice((1, 2, 4, 8)), _at(raw, rng)
    value = rng.choice(_EXTREMES) % (1 << 8 * size)
    return raw[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + raw[at + size :]


def _swap(raw: bytes, rng: random.Random) -> bytes:
    one, other, size = _at(raw, rng), _at(raw, rng), rng.choice((1, 4, 16))
    piece = raw[one : one + size]
    return raw[:other] + piece + raw[other + len(piece) :]


def _splice(raw: bytes, other: bytes, rng: random.Random) -> bytes:
    return raw[: _at(raw, rng)] + other[_at(other, rng) :]


def _token(raw: bytes, rng: random.Random) -> bytes:
    at = _at(raw, rng)
    return raw[:at] + rng.choice(_TOKENS) + raw[at:]


def _digits(raw: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"-?[0-9]+", raw[:50_000]))
    if not found:
        return _token(raw, rng)
    place, value = rng.choice(found), rng.choice(_NUMBERS)
    return raw[: place.start()] + (str(value) if value != 10**400 else "1" + "0" * 400).encode() + raw[place.end() :]


def _word(raw: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"[A-Za-z_./-]+", raw[:50_000]))
    if not found:
        return _token(raw, rng)
    place = rng.choice(found)
    return raw[: place.start()] + rng.choice(_NAMES).encode("utf-8", "surrogatepass") + raw[place.end() :]


_BYTES: tuple[Mutation, ...] = (_flip, _byte, _insert, _delete, _cut, _repeat, _number, _number, _swap)
_TEXT: tuple[Mutation, ...] = (_token, _digits, _word)


class Pairs(list[tuple[str, Any]]):
    """An object as its pairs, in which a key may be there twice."""


def _damaged_json(raw: bytes, rng: random.Random) -> bytes:
    root: Any = [json.loads(raw, object_pairs_hook=Pairs)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(root)
        holder, index = rng.choice(places)
        _damage(holder, index, rng)
    text = "".join(_written(root[0], rng.random() < 0.5)) if root else ""
    return text.encode("utf-8", "surrogatepass")


def _places(root: list[Any]) -> list[tuple[Any, int]]:
    """All values of a document, as the container that holds each and its index there; of long lists only some."""
    found: list[tuple[Any, int]] = []
    todo: list[Any] = [root]
    while todo and len(found) < 5000:
        holder = todo.pop()
        step = max(1, len(holder) // 50)
        for index in range(0, len(holder), step):
            found.append((holder, index))
            value = holder[index][1] if isinstance(holder, Pairs) else holder[index]
            if isinstance(value, list):
                todo.append(value)
    return found or [(root, 0)]


def _damage(holder: Any, index: int, rng: random.Random) -> None:
    if index >= len(holder):
        return
    pairs = isinstance(holder, Pairs)
    key, value = holder[index] if pairs else ("", holder[index])
    what = rng.random()
    if what < 0.12:
        del holder[index]
        return
    if what < 0.2:
        holder.insert(index, holder[index])
        return
    if what < 0.27 and pairs:
        holder[index] = (rng.choice(_NAMES), value)
        return
    new = _other(value, rng)
    holder[index] = (key, new) if pairs else new


def _other(value: Any, rng: random.Random) -> Any:
    what = rng.random()
    if what < 0.35:
        return rng.choice(_NUMBERS)
    if what < 0.5:
        return rng.choice(_NAMES)
    if what < 0.65:
        return rng.choice(_VALUES)
    if what < 0.72:
        return [value]
    if what < 0.77:
        return Pairs([(rng.choice(_NAMES), value)])
    if what < 0.82 and isinstance(value, list) and value:
        return type(value)(value * rng.choice((2, 100)))[:20_000]
    if what < 0.87 and isinstance(value, str):
        return value * rng.choice((2, 200)) if len(value) < 5000 else value[: len(value) // 2]
    if what < 0.9:
        return Raw("[" * DEEP + "]" * DEEP)
    if isinstance(value, int) and not isinstance(value, bool):
        return value + rng.choice((-1, 1, 2**20, -value))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("\0", "/", "\ud800", " ", "é", value[at:] * 2)) + value[at + 1 :]
    return rng.choice(_VALUES)


class Raw(str):
    """A piece of JSON that is written as it is."""

    __slots__ = ()


def _written(value: Any, ascii_only: bool) -> list[str]:
    if isinstance(value, Raw):
        return [str(value)]
    if isinstance(value, Pairs):
        parts = ["{"]
        for number, (key, item) in enumerate(value):
            parts += [
                ", " if number else "",
                json.dumps(key, ensure_ascii=ascii_only),
                ":",
                *_written(item, ascii_only),
            ]
        return [*parts, "}"]
    if isinstance(value, list):
        parts = ["["]
        for number, item in enumerate(value):
            parts += [", " if number else "", *_written(item, ascii_only)]
        return [*parts, "]"]
    return [json.dumps(value, ensure_ascii=ascii_only)]
