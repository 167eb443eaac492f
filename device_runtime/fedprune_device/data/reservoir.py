"""Chooses which samples of an endless stream to keep: a fair share per class, and uniformly within each class.

Algorithm R (Vitter, Random Sampling with a Reservoir, ACM TOMS 11(1), 1985): of n samples seen, each is among the k
that are kept with probability k / n. Here every class has a reservoir of its own. Below the limits everything is
kept. At a limit, a new sample of a class that has lost none so far, and has fewer than the largest class,
replaces a random sample of the largest class. Any other class runs algorithm R over the samples that it holds. From
then on a class's quota only shrinks, and a uniform choice from a uniform choice is uniform. Samples without a label
have a quota of their own. If they wait for a label, the newest are kept, since the label of a sample comes soon or
never.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fedprune.core.rng import keyed_generator
from fedprune_device.data.splits import SplitShares

UNLABELLED = -1  # the label of samples without one; classes begin at 0
_ANY_CLASS = 0  # stands for every class where limits are compared: all labelled samples share one limit


@dataclass(frozen=True)
class SampleLimits:
    """The limits of a set of samples, and the share of both limits that unlabelled samples may take."""

    samples: int
    bytes: int
    unlabelled: float = 0.25


@dataclass(frozen=True)
class ReservoirDecision:
    """The decision on a new sample: whether it is kept, and which samples are evicted for it.

    `seen_count` counts the samples of its class, this one included.
    """

    id: str
    label: int
    size: int
    seen_count: int
    is_kept: bool
    evicted: tuple[str, ...] = ()


@dataclass
class _Class:
    ids: list[str] = field(default_factory=list)  # sorted, so that a draw doesn't depend on the order of arrival
    seen_count: int = 0


class Reservoir:
    """The names of the kept samples. The same seed and order give the same draws.

    With `unlabelled_wait`, samples without a label wait for one; otherwise they are a class within their quota.
    """

    unlabelled_wait = True

    def __init__(self, limits: SampleLimits, seed: int) -> None:
        self._seed = seed
        samples, size = int(limits.samples * limits.unlabelled), int(limits.bytes * limits.unlabelled)
        # The keys of these three tell whether samples are unlabelled.
        self._limits = {True: (samples, size), False: (limits.samples - samples, limits.bytes - size)}
        self._bytes = {True: 0, False: 0}
        self._count = {True: 0, False: 0}
        self._classes: dict[int, _Class] = {}
        self._samples: dict[str, tuple[int, int]] = {}  # by name: label and bytes

    def __contains__(self, name: str) -> bool:
        return name in self._samples

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, name: str) -> int:
        return self._samples[name][0]

    def names_by_class(self) -> dict[int, list[str]]:
        return {label: list(c.ids) for label, c in sorted(self._classes.items()) if c.ids}

    def unlabelled_names(self) -> Iterator[str]:
        """Kept samples without a label, the oldest first; after a restart, in the order of the log on the disk."""
        return (name for name, (label, _) in self._samples.items() if label == UNLABELLED)

    @property
    def seen_counts(self) -> dict[int, int]:
        return {label: c.seen_count for label, c in sorted(self._classes.items())}

    @property
    def class_count(self) -> int:
        """Number of classes of which a sample was seen."""
        return len(self._classes) - (UNLABELLED in self._classes)

    def has_seen(self, label: int) -> bool:
        """Whether a sample of a class was seen."""
        return label in self._classes

    def set_seen_count(self, label: int, count: int) -> None:
        class_ = self._classes.setdefault(label, _Class())
        # A count that was written before its samples may be lower than the number of samples.
        class_.seen_count = max(count, len(class_.ids))

    def usage(self, *, unlabelled: bool) -> dict[str, int]:
        """The number and the bytes of samples with, or without, labels, and the limits of both."""
        max_samples, max_bytes = self._limits[unlabelled]
        samples, size = self._count[unlabelled], self._bytes[unlabelled]
        return {"samples": samples, "samples_most": max_samples, "bytes": size, "bytes_most": max_bytes}

    def decide(self, name: str, label: int, size: int) -> ReservoirDecision:
        """Decide on a new sample; nothing changes until `apply`."""
        class_ = self._classes.get(label, _Class())
        seen_count = class_.seen_count + 1
        if size > self._limits[label == UNLABELLED][1] or not self._limits[label == UNLABELLED][0]:
            return ReservoirDecision(name, label, size, seen_count, is_kept=False)
        evicted: list[str] = []
        if label == UNLABELLED and self.unlabelled_wait:
            oldest = iter(self.unlabelled_names())
            while not self._fits(label, size, evicted):
                evicted.append(next(oldest))
        if not self._fits(label, size, evicted):
            largest = self._largest_class(label, evicted)
            # Only if the largest class is not the smaller one of the two after the exchange.
            if (
                label != UNLABELLED
                and class_.seen_count == len(class_.ids)
                and self._remaining_count(largest, evicted) >= len(class_.ids) + 2
            ):
                evicted.append(self._draw_eviction(largest, name, evicted))
            else:
                # Algorithm R: the drawn number is the slot that the new sample takes, if it is one of the kept ones.
                index = int(keyed_generator(self._seed, "reservoir", label, seen_count).integers(seen_count))
                if index >= len(class_.ids):
                    return ReservoirDecision(name, label, size, seen_count, is_kept=False)
                evicted.append(class_.ids[index])
        while not self._fits(label, size, evicted):  # sizes differ: one sample may replace several
            evicted.append(self._draw_eviction(self._largest_class(label, evicted), name, evicted))
        return ReservoirDecision(name, label, size, seen_count, True, tuple(evicted))

    def apply(self, decision: ReservoirDecision) -> None:
        """Evict and keep samples as a decision says."""
        for name in decision.evicted:
            self.drop(name)
        self._classes.setdefault(decision.label, _Class()).seen_count = decision.seen_count
        if decision.is_kept:
            self.restore(decision.id, decision.label, decision.size)

    def restore(self, name: str, label: int, size: int) -> None:
        """Add a sample that is stored already, when a set is read again."""
        class_ = self._classes.setdefault(label, _Class())
        insort(class_.ids, name)
        class_.seen_count = max(class_.seen_count, len(class_.ids))
        self._samples[name] = label, size
        self._bytes[label == UNLABELLED] += size
        self._count[label == UNLABELLED] += 1

    def drop(self, name: str, *, unseen: bool = False) -> None:
        """Remove a sample; with `unseen` it counts as never seen, because it was deleted or relabelled."""
        label, size = self._samples.pop(name)
        class_ = self._classes[label]
        del class_.ids[bisect_left(class_.ids, name)]
        class_.seen_count -= unseen
        if not class_.ids and class_.seen_count <= 0:
            del self._classes[label]
        self._bytes[label == UNLABELLED] -= size
        self._count[label == UNLABELLED] -= 1

    def surplus(self) -> str | None:
        """A sample to evict because a limit is exceeded; None if none is."""
        for label in (UNLABELLED, _ANY_CLASS):
            if not self._fits(label, 0, [], added=0):
                return self._draw_eviction(self._largest_class(label, []), "surplus", [])
        return None

    def _fits(self, label: int, size: int, evicted: list[str], added: int = 1) -> bool:
        unlabelled = label == UNLABELLED
        max_samples, max_bytes = self._limits[unlabelled]
        freed = sum(self._samples[n][1] for n in evicted)
        return (
            self._count[unlabelled] - len(evicted) + added <= max_samples
            and self._bytes[unlabelled] - freed + size <= max_bytes
        )

    def _largest_class(self, label: int, evicted: list[str]) -> int:
        if label == UNLABELLED:
            return UNLABELLED
        labels = [c for c in sorted(self._classes) if c != UNLABELLED]
        return max(labels, key=lambda c: self._remaining_count(c, evicted), default=label)

    def _remaining_count(self, label: int, evicted: list[str]) -> int:
        class_ = self._classes.get(label, _Class())
        return len(class_.ids) - sum(self._samples[n][0] == label for n in evicted)

    def _draw_eviction(self, label: int, newcomer: str, evicted: list[str]) -> str:
        candidates = [n for n in self._classes[label].ids if n not in evicted]
        return candidates[int(keyed_generator(self._seed, "room", newcomer, len(evicted)).integers(len(candidates)))]


def sample_counts(reservoir: Reservoir, shares: SplitShares) -> dict[str, Any]:
    """Samples by class (kept, and ever seen) and by part, and the space that they take.

    Samples that wait for a label are in no part.
    """
    names_by_class = reservoir.names_by_class()
    part_counts = Counter(
        shares.split_of(n)
        for c, names in names_by_class.items()
        if c != UNLABELLED or not reservoir.unlabelled_wait
        for n in names
    )
    classes = {
        str(c): {"kept": len(names_by_class.get(c, ())), "seen": seen_count}
        for c, seen_count in reservoir.seen_counts.items()
        if c != UNLABELLED and seen_count
    }
    unlabelled_count = len(names_by_class.get(UNLABELLED, ()))
    return {
        "classes": classes,
        "unlabelled": unlabelled_count,
        "unlabelled_dropped": reservoir.seen_counts.get(UNLABELLED, 0) - unlabelled_count,
        "parts": {p: part_counts[p] for p in ("train", "val", "test")},
        "room": {"labelled": reservoir.usage(unlabelled=False), "unlabelled": reservoir.usage(unlabelled=True)},
    }
