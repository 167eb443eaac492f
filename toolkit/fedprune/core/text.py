"""Text for people: numbers with nouns or units (1 file, 2.10 MB, 35 ms), and received text made safe to show."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

# Characters that end a sentence, after which no full stop is added.
_SENTENCE_ENDS = (".", "!", "?", "…")


def quantity(number: int, noun: str, *, form: str = "") -> str:
    """A number, formatted by `form`, with its noun, whose plural has an `s`."""
    return f"{number:{form}} {noun if number == 1 else noun + 's'}"


def round_text(number: int, limit: int) -> str:
    """A round's number with the job's limit of rounds, as `3 of 20`. The limit may have been lowered since."""
    return f"{number:,} of {limit:,}" if number <= limit else f"{number:,}, over the job's limit of {limit:,}"


def one_line(value: str, limit: int = 500) -> str:
    """Received text as it is logged, stored and shown: short, on one line, without codes that steer a terminal."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in value[:limit]).split())
    return flat if len(value) <= limit else f"{flat}..."


def sentences(*texts: str) -> str:
    """Join texts as sentences: each but the last ends in a full stop. Empty ones are left out.

    Texts of other programs and boards may end in one already.
    """
    *all_but_last, last = [text for text in texts if text] or [""]
    return " ".join([*(text if text.endswith(_SENTENCE_ENDS) else f"{text}." for text in all_but_last), last])


def decode_text(raw: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 if its byte order mark says so, as Windows' programs save it.

    Raises `UnicodeError` for any other encoding.
    """
    return raw.decode(encoding_of(raw[:2]))


def encoding_of(first_bytes: bytes) -> str:
    """The encoding of a file that begins with these two bytes: UTF-16 if they are its byte order mark, else UTF-8."""
    # "utf-8-sig" drops the mark that Windows' editors put before UTF-8, too, and reads plain UTF-8 alike.
    return "utf-16" if first_bytes in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def first_few(names: Sequence[str], separator: str = ", ", max_names: int = 5) -> str:
    """The first few names, and how many more there are."""
    return separator.join(names[:max_names]) + (f" and {len(names) - max_names} more" if len(names) > max_names else "")


def amount(value: float, unit: str) -> str:
    """A quantity for people, in bytes, s, J, or "" for a plain number."""
    if unit == "bytes":
        return f"{value / 1e6:,.2f} MB" if abs(value) >= 1e5 else f"{value:,.0f} bytes"
    if unit == "s":
        return f"{value:,.1f} s" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} ms"
    if unit == "J":
        return f"{value:,.1f} J" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} mJ"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def all_strings(value: object) -> set[str]:
    """Every string in a JSON value, except keys."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        return set().union(*map(all_strings, value.values()))
    return set().union(*map(all_strings, value)) if isinstance(value, (list, tuple)) else set()
