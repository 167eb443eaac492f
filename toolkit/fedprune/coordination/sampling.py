"""Whom a synchronous round asks, and whom it may close without: chance, turns, and an end to bad luck.

Places go by lot, keyed by the job's seed and the round. With the job's `fairness` a share of them goes to those instead
who were not asked for longest. A device that stays gets no place by turn twice before every other that was there has
had one: with n devices, a share p of them asked and fairness f, no device waits for more than ⌈1 / (f·p)⌉ rounds.

With `over_selection` more are asked than the round needs, and those that are slowest are let go. So that this is not
always the same ones, a device that was let go in `MAX_CUTS` rounds in a row is waited for in its next one, up to the
deadline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MAX_CUTS = 3
"""Rounds in a row that may close before a device is done; its next one waits for it."""

ENOUGH = "enough updates are in"


def places(share: float, ready: int) -> int:
    """How many of the devices that are ready a round needs, at least one.

    Args:
        share: Above 0, at most 1.
        ready: How many there are, at least one.
    """
    return max(1, _ceil(share * ready))


def beyond(count: int, over_selection: float, ready: int) -> int:
    """How many a round asks that needs `count` of those that are ready."""
    return min(ready, _ceil(count * (1 + over_selection)))


def drawn(by_lot: Sequence[str], asked: Mapping[str, int], count: int, fairness: float) -> list[str]:
    """Whom a round asks.

    Args:
        by_lot: The devices that are ready, in the order in which chance has put them.
        asked: The round that each of them was last asked in.
        count: How many to choose.
        fairness: Share of the places that goes by turn, from 0 to 1.
    """
    turns = _ceil(count * fairness)
    # Sorting keeps the lot's order of those who have waited alike.
    first = sorted(by_lot, key=asked.__getitem__)[:turns] if turns else []
    taken = set(first)
    return first + [n for n in by_lot if n not in taken][: count - turns]


def _ceil(value: float) -> int:
    """Up to the next whole number, but not for what only rounding has put above one."""
    return math.ceil(value - 1e-9)
