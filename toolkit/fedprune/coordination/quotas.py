"""Quotas: the largest shares of a round that boards of one hardware profile, or of one region, may have.

A share of a round that asks n boards is a number of boards by the largest-remainder method: quotas of hardware together
allow ⌊n · Σ share⌋ boards, each its own n · share, rounded down or up, the largest remainders up. Quotas of regions are
rounded in the same way, and a board needs room in both. So shares that add up to 1 leave no place empty by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedprune.jobs.job import HARDWARE, REGION
from fedprune.jobs.state import Device

Integers = npt.NDArray[np.int64]

_DIMENSION = (HARDWARE, REGION)
DIMENSIONS = len(_DIMENSION)
"""A board has a kind by its hardware, and one by its region."""

Kinds = tuple[int, int]

_UNLIMITED = 2**31


class Quotas:
    """A job's quotas. A *kind* is a quota's number, from 1; boards without a quota are of kind 0."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares: list[dict[str, float]] = [
            {key.partition(":")[2]: share for key, share in shares.items() if key.startswith(f"{what}:")}
            for what in _DIMENSION
        ]
        self._kinds = [{name: i for i, name in enumerate(names, 1)} for names in self._shares]

    def __bool__(self) -> bool:
        return any(self._shares)

    def kinds(self, device: Device) -> Kinds:
        """A board's kind by hardware and by region: that of the nearest aggregator above it that has a quota."""
        hardware, regions = self._kinds
        region = device.region
        while region not in regions and "/" in region:
            region = region.rpartition("/")[0]
        return hardware.get(str(device.profile.get("name")), 0), regions.get(region, 0)

    def room(self, count: int) -> list[list[int]]:
        """Of `count` places, those that boards of each kind may have, by dimension."""
        return [[_UNLIMITED, *apportioned([*s.values()], count)] for s in self._shares]

    def full(self, devices: Iterable[Device], count: int) -> list[str]:
        """Keys of the quotas that leave none of these boards one of `count` places; empty if a board has one."""
        room, keys = self.room(count), set[str]()
        for device in devices:
            kinds = self.kinds(device)
            without = [i for i in range(DIMENSIONS) if not room[i][kinds[i]]]
            if not without:
                return []
            keys |= {f"{_DIMENSION[i]}:{list(self._shares[i])[kinds[i] - 1]}" for i in without}
        return sorted(keys)

    def places(self, kinds: Integers, count: int) -> Places:
        """The places of a round that asks `count` of the boards of these kinds, `[DIMENSIONS, boards]`."""
        return Places(kinds, self.room(count))


NO_QUOTAS = Quotas({})


class Places:
    """The places of a round that boards of each kind may still have.

    Args:
        kinds: The kinds of all boards, `[DIMENSIONS, boards]`.
        room: Places of each kind, by dimension.
    """

    def __init__(self, kinds: Integers, room: Sequence[Sequence[int]]) -> None:
        self._kinds, self._room = kinds, [np.array(r, np.int64) for r in room]

    def take(self, order: Integers, count: int) -> Integers:
        """Give `count` places to the first boards of `order` that have room, or to all of them if they are fewer."""
        taken = [order[:0]]
        while count > 0:
            for kinds, room in zip(self._kinds, self._room, strict=True):
                order = order[room[kinds[order]] > 0]
            if not len(order):
                break
            until = min(count, *(self._fitting(d, order) for d in range(DIMENSIONS)))
            for kinds, room in zip(self._kinds, self._room, strict=True):
                room -= np.bincount(kinds[order[:until]], minlength=len(room))
            taken.append(order[:until])
            order, count = order[until:], count - until
        return np.concatenate(taken)

    def _fitting(self, dimension: int, order: Integers) -> int:
        """How many boards of an order fit before the first one whose kind has no room."""
        kinds, room = self._kinds[dimension][order], self._room[dimension]
        firsts = (np.flatnonzero(kinds == kind)[room[kind] :] for kind in range(1, len(room)))
        return min((int(places[0]) for places in firsts if len(places)), default=len(order))


def apportioned(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers near `count` times each share, whose sum is `count` times the sum of the shares, rounded down.

    The largest remainders are rounded up; of equal ones, the first.
    """
    exact = [count * share for share in shares]
    whole = [math.floor(x + 1e-9) for x in exact]
    left = math.floor(math.fsum(exact) + 1e-9) - sum(whole)
    for at in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[:left]:
        whole[at] += 1
    return whole
