"""Which channels of a group a device holds, as a shape and as words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MOST_RANGES = 60
"""Ranges that are said in words; how many more there are is said, too."""


@dataclass(frozen=True)
class ChannelMap:
    """The channels of a group that a device holds.

    Attributes:
        group: The group.
        kept: How many it holds.
        of: How many there are.
        known: Whether the channels are known; else the shape shows the first `kept`.
        path: The shape, in channels, as SVG has it.
        words: The channels as ranges, such as `0-3, 7`; empty where it isn't known which.
    """

    group: str
    kept: int
    of: int
    known: bool
    path: str
    words: str


def channels(group: str, kept: int, of: int, which: str | None) -> ChannelMap:
    """Lay out the channels of a group.

    Args:
        group: The group.
        kept: How many channels it holds.
        of: How many there are.
        which: A bit for each, the first one highest, as hex; None where it isn't known. What doesn't fit the numbers
            counts as not known.
    """
    found = None if which is None else list(_runs(which, of))
    if found is None or sum(n for _, n in found) != kept:
        return ChannelMap(group, kept, of, False, _path([(0, kept)] if kept else []), "")
    words = [f"{at}-{at + n - 1}" if n > 1 else str(at) for at, n in found[:MOST_RANGES]]
    more = len(found) - len(words)
    return ChannelMap(
        group, kept, of, True, _path(found), ", ".join([*words, *([f"and {more} more ranges"] if more else [])])
    )


def _runs(which: str, of: int) -> Iterator[tuple[int, int]]:
    """Begin and length of each run of held channels."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in which)[:of]
    at = bits.find("1")
    while at >= 0:
        end = bits.find("0", at)
        end = len(bits) if end < 0 else end
        yield at, end - at
        at = bits.find("1", end)


def _path(runs: list[tuple[int, int]]) -> str:
    return "".join(f"M{at} 0h{n}v1h-{n}z" for at, n in runs)
