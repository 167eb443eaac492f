"""Which samples of an endless stream stay: a fair share for every class, and of each class a uniform choice.

Algorithm R (Vitter, Random Sampling with a Reservoir, ACM TOMS 11(1), 1985): of n samples seen, each is among the k
that are kept with probability k / n. Here every class has a reservoir of its own. While there is room, everything
stays. When there is none, a class of which everything was kept so far, and which has less than the largest one, takes
a random place of the largest one; any other class continues by algorithm R in the places that it has. A class's places
become fewer, never more, and a random choice of a uniform choice is uniform. Samples without a label have a share
that they never exceed. Of those that wait for a label the newest stay, since the label of a sample comes soon or never.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from fedprune.core.rng import keyed

UNLABELLED = -1


@dataclass(frozen=True)
class Limits:
    """How much a set may hold, and the share of both limits that unlabelled samples may take."""

    samples: int
    bytes: int
    unlabelled: float = 0.25


@dataclass(frozen=True)
class Verdict:
    """The decision on a new sample: whether it stays, and which samples make room for it.

    `seen` counts the samples of its class, this one included.
    """

    id: str
    label: int
    size: int
    seen: int
    kept: bool
    dropped: tuple[str, ...] = ()


@dataclass
class _Class:
    ids: list[str] = field(default_factory=list)  # sorted, so that a draw doesn't depend on the order of arrival
    seen: int = 0


class Reservoir:
    """The names of the kept samples. The same seed and order give the same draws.

    `waiting` is whether samples without a label wait for one; otherwise they are a class like others, in their share.
    """

    waiting = True

    def __init__(self, limits: Limits, seed: int) -> None:
        self._seed = seed
        loose = int(limits.samples * limits.unlabelled), int(limits.bytes * limits.unlabelled)
        self._limits = {True: loose, False: (limits.samples - loose[0], limits.bytes - loose[1])}
        self._classes: dict[int, _Class] = {}
        self._of: dict[str, tuple[int, int]] = {}
        self._bytes = {True: 0, False: 0}
        self._count = {True: 0, False: 0}

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def label(self, name: str) -> int:
        return self._of[name][0]

    def kept(self) -> dict[int, list[str]]:
        return {label: list(c.ids) for label, c in sorted(self._classes.items()) if c.ids}

    def unlabelled(self) -> Iterator[str]:
        """Kept samples without a label, the oldest first; after a restart, as they are on the disk."""
        return (name for name, (label, _) in self._of.items() if label == UNLABELLED)

    @property
    def seen(self) -> dict[int, int]:
        return {label: c.seen for label, c in sorted(self._classes.items())}

    @property
    def labels(self) -> int:
        """Classes that a sample was seen of."""
        return len(self._classes) - (UNLABELLED in self._classes)

    def knows(self, label: int) -> bool:
        """Whether a sample of a class was seen."""
        return label in self._classes

    def set_seen(self, label: int, seen: int) -> None:
        found = self._classes.setdefault(label, _Class())
        found.seen = max(seen, len(found.ids))

    def most(self, *, unlabelled: bool) -> tuple[int, int]:
        """Samples and bytes that samples with (or without) labels may take."""
        return self._limits[unlabelled]

    def held(self, *, unlabelled: bool) -> tuple[int, int]:
        return self._count[unlabelled], self._bytes[unlabelled]

    def judge(self, name: str, label: int, size: int) -> Verdict:
        """Decide on a sample that is not kept now; nothing changes until `follow`."""
        own = self._classes.get(label, _Class())
        seen = own.seen + 1
        if size > self._limits[label == UNLABELLED][1] or not self._limits[label == UNLABELLED][0]:
            return Verdict(name, label, size, seen, kept=False)
        dropped: list[str] = []
        if label == UNLABELLED and self.waiting:
            oldest = iter(self.unlabelled())
            while not self._fits(label, size, dropped):
                dropped.append(next(oldest))
        if not self._fits(label, size, dropped):
            largest = self._largest(label, dropped)
            if label != UNLABELLED and own.seen == len(own.ids) and self._left(largest, dropped) >= len(own.ids) + 2:
                dropped.append(self._victim(largest, name, dropped))
            else:
                place = int(keyed(self._seed, "reservoir", label, seen).integers(seen))
                if place >= len(own.ids):
                    return Verdict(name, label, size, seen, kept=False)
                dropped.append(own.ids[place])
        while not self._fits(label, size, dropped):  # samples of several sizes: one may have to make room for more
            dropped.append(self._victim(self._largest(label, dropped), name, dropped))
        return Verdict(name, label, size, seen, True, tuple(dropped))

    def follow(self, verdict: Verdict) -> None:
        """Let a verdict come true."""
        for name in verdict.dropped:
            self.drop(name)
        self._classes.setdefault(verdict.label, _Class()).seen = verdict.seen
        if verdict.kept:
            self.restore(verdict.id, verdict.label, verdict.size)

    def restore(self, name: str, label: int, size: int) -> None:
        """Keep a sample without asking, when a set is read again."""
        found = self._classes.setdefault(label, _Class())
        insort(found.ids, name)
        found.seen = max(found.seen, len(found.ids))
        self._of[name] = label, size
        self._bytes[label == UNLABELLED] += size
        self._count[label == UNLABELLED] += 1

    def drop(self, name: str, *, unseen: bool = False) -> None:
        """Keep a sample no longer; with `unseen` it counts as never seen, because it was deleted or relabelled."""
        label, size = self._of.pop(name)
        found = self._classes[label]
        del found.ids[bisect_left(found.ids, name)]
        found.seen -= unseen
        if not found.ids and found.seen <= 0:
            del self._classes[label]
        self._bytes[label == UNLABELLED] -= size
        self._count[label == UNLABELLED] -= 1

    def surplus(self) -> str | None:
        """A sample that must go because there are more than there may be; None where there are not."""
        for label in (UNLABELLED, 0):
            if not self._fits(label, 0, [], more=0):
                return self._victim(self._largest(label, []), "surplus", [])
        return None

    def _fits(self, label: int, size: int, dropped: list[str], more: int = 1) -> bool:
        side = label == UNLABELLED
        most, most_bytes = self._limits[side]
        freed = sum(self._of[n][1] for n in dropped)
        return self._count[side] - len(dropped) + more <= most and self._bytes[side] - freed + size <= most_bytes

    def _largest(self, label: int, dropped: list[str]) -> int:
        if label == UNLABELLED:
            return UNLABELLED
        labels = [c for c in sorted(self._classes) if c != UNLABELLED]
        return max(labels, key=lambda c: self._left(c, dropped), default=label)

    def _left(self, label: int, dropped: list[str]) -> int:
        found = self._classes.get(label, _Class())
        return len(found.ids) - sum(self._of[n][0] == label for n in dropped)

    def _victim(self, label: int, newcomer: str, dropped: list[str]) -> str:
        left = [n for n in self._classes[label].ids if n not in dropped]
        return left[int(keyed(self._seed, "room", newcomer, len(dropped)).integers(len(left)))]
