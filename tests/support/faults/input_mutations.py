"""Damaged and hostile inputs, made of sound ones: in their bytes, in their text, and in the structure of their JSON."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

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


def mutate(seeds: Sequence[bytes], rng: random.Random, *, text: bool = False) -> bytes:
    """One of the sound inputs, damaged once or a few times; one that is JSON is damaged in its structure, too.

    Of text, words and numbers are worth changing.
    """
    raw = rng.choice(seeds)
    if raw[:1] in (b"{", b"[") and rng.random() < 0.6:
        try:
            return _damaged_json(raw, rng)
        except (ValueError, RecursionError):  # no JSON after all
            pass
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        raw = _damaged_text(raw, rng) if text and rng.random() < 0.5 else _damaged_bytes(raw, rng.choice(seeds), rng)
    return raw


def _at(raw: bytes, rng: random.Random) -> int:
    """A place, more often near the beginning or the end, where formats keep what says how long things are."""
    near = rng.random()
    if near < 0.4:
        return rng.randrange(min(len(raw), 128) + 1)
    return len(raw) - rng.randrange(min(len(raw), 128) + 1) if near < 0.55 else rng.randrange(len(raw) + 1)


def _damaged_bytes(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """Bytes changed, added, left out, repeated or moved, a number at its extreme, or the end of another input."""
    at, elsewhere, size = _at(raw, rng), _at(raw, rng), rng.choice((1, 1, 2, 4, 8, 64, 1000))
    before, piece, after = raw[:at], raw[at : at + size], raw[at + size :]
    first, width = (raw[at : at + 1] or b"\0")[0], min(size, 8)
    number = rng.choice(_EXTREMES) % (1 << 8 * width)
    return rng.choice(
        (
            before + bytes([first ^ 1 << rng.randrange(8)]) + raw[at + 1 :],
            before + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) + raw[at + 1 :],
            before + rng.randbytes(size) + raw[at:],
            before + after,
            before,
            before + piece * rng.choice((2, 3, 50)) + after,
            before + number.to_bytes(width, rng.choice(("little", "big"))) + raw[at + width :],
            raw[:elsewhere] + piece + raw[elsewhere + len(piece) :],
            before + donor[_at(donor, rng) :],
        )
    )


def _damaged_text(raw: bytes, rng: random.Random) -> bytes:
    """A number or a word replaced, or what a parser knows put in between."""
    at = _at(raw, rng)
    kind, value = rng.choice(((b"-?[0-9]+", rng.choice(_NUMBERS)), (b"[A-Za-z_./-]+", rng.choice(_NAMES)), (b"", None)))
    matches = list(re.finditer(kind, raw[:50_000])) if kind else []
    if not matches:
        return raw[:at] + rng.choice(_TOKENS) + raw[at:]
    place = rng.choice(matches)
    text = "1" + "0" * 400 if value == 10**400 else str(value)
    return raw[: place.start()] + text.encode("utf-8", "surrogatepass") + raw[place.end() :]


class Pairs(list[tuple[str, Any]]):
    """An object as its pairs, in which a key may be there twice."""


def _damaged_json(raw: bytes, rng: random.Random) -> bytes:
    root: Any = [json.loads(raw, object_pairs_hook=Pairs)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, index = rng.choice(_places(root))
        _damage(holder, index, rng)
    return ("".join(_json_pieces(root[0], rng.random() < 0.5)) if root else "").encode("utf-8", "surrogatepass")


def _places(root: list[Any]) -> list[tuple[Any, int]]:
    """All values of a document, as the container that holds each and its index there; of long lists only some."""
    containers: list[tuple[Any, int]] = []
    todo: list[Any] = [root]
    while todo and len(containers) < 5000:
        holder = todo.pop()
        step = max(1, len(holder) // 50)
        for index in range(0, len(holder), step):
            containers.append((holder, index))
            value = holder[index][1] if isinstance(holder, Pairs) else holder[index]
            if isinstance(value, list):
                todo.append(value)
    return containers or [(root, 0)]


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


def _json_pieces(value: Any, ascii_only: bool) -> list[str]:
    if isinstance(value, Raw):
        return [str(value)]
    if isinstance(value, Pairs):
        chunks = ["{"]
        for number, (key, item) in enumerate(value):
            chunks += [
                ", " if number else "",
                json.dumps(key, ensure_ascii=ascii_only),
                ":",
                *_json_pieces(item, ascii_only),
            ]
        return [*chunks, "}"]
    if isinstance(value, list):
        chunks = ["["]
        for number, item in enumerate(value):
            chunks += [", " if number else "", *_json_pieces(item, ascii_only)]
        return [*chunks, "]"]
    return [json.dumps(value, ensure_ascii=ascii_only)]
