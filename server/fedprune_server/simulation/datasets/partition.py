"""Partitions of a data set among devices.

Every function returns one sorted array of rows per device; the arrays are disjoint and cover the given rows. Labels and
owners are those of all samples, [n]. Random numbers are keyed by their purpose, so the same seed gives the same
partition on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune.core.rng import keyed_generator

Rows = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]

_MAX_DRAWS = 100


def iid(rows: Rows, devices: int, *, seed: int) -> list[Rows]:
    """Random rows, of sizes that differ by one at most. Raises `DataError` if there are more devices than rows."""
    _check(rows, devices)
    order = rows[keyed_generator(seed, "iid", "order").permutation(len(rows))]
    return _sort_hands(np.split(order, _cut_points(len(rows), _equal_shares(devices), 1)))


def dirichlet(
    rows: Rows, labels: Labels, devices: int, *, alpha: float, seed: int, min_samples: int = 10
) -> list[Rows]:
    """Of every class, each device gets a share drawn from a Dirichlet distribution (Hsu et al., arXiv:1909.06335).

    Up to 100 draws are made until every device has `min_samples` samples. If none succeeds (a thousand devices and a
    small alpha), devices with too few samples take some from those with the most. Raises `DataError` if alpha is not
    above 0, or there are too few rows.

    `alpha`: concentration: the smaller, the more uneven the split; `min_samples`: minimum samples per device.
    """
    _check(rows, devices, max(1, min_samples))
    if not 0 < alpha < np.inf:
        raise DataError("alpha of the Dirichlet shares", expected="a number above 0", got=alpha)
    row_labels = labels[rows]
    classes = np.unique(row_labels)
    hands: list[Rows] = []
    for attempt in range(_MAX_DRAWS):
        pieces_by_device: list[list[Rows]] = [[] for _ in range(devices)]
        for label in classes:
            # Keyed by class, so that a class is dealt alike whichever other classes there are.
            rng = keyed_generator(seed, "dirichlet", attempt, int(label))
            pool = rng.permutation(rows[row_labels == label])
            shares = rng.dirichlet(np.full(devices, alpha, np.float64))
            # With a tiny alpha every gamma draw may underflow; one device takes all then, as in the limit.
            if not np.isfinite(shares).all() or shares.sum() <= 0:
                shares = np.eye(devices)[rng.integers(devices)]
            pieces = np.split(pool, _cut_points(len(pool), shares))
            for device, piece in enumerate(pieces):
                pieces_by_device[device].append(piece)
        hands = [np.concatenate(p) for p in pieces_by_device]
        if min(map(len, hands)) >= min_samples:
            return _sort_hands(hands)
    return _sort_hands(_fill_small_hands(hands, labels, min_samples, keyed_generator(seed, "dirichlet", "mend")))


def pathological(rows: Rows, labels: Labels, devices: int, *, classes: int, seed: int) -> list[Rows]:
    """Every device sees samples of `classes` different classes (McMahan et al., arXiv:1602.05629).

    Every class goes to the same number of devices, plus or minus one, and is split evenly among them. Raises
    `DataError` if there are fewer classes, a class would go to no device, or a class has too few samples.
    """
    _check(rows, devices)
    row_labels = labels[rows]
    present = np.unique(row_labels)
    if not 1 <= classes <= len(present):
        raise DataError("classes per device", expected=f"1 to {len(present)}", got=classes)
    if devices * classes < len(present):
        raise DataError(
            f"classes per device, {classes}",
            expected=f"at least {-(-len(present) // devices)}, so that each of {len(present)} goes to a device",
            hint="Take more devices, or more classes for each.",
        )
    holders = _classes_of_devices(len(present), devices, classes, keyed_generator(seed, "pathological", "classes"))
    pieces_by_device: list[list[Rows]] = [[] for _ in range(devices)]
    for number, label in enumerate(present):
        pool = keyed_generator(seed, "pathological", int(label)).permutation(rows[row_labels == label])
        class_holders = [d for d in range(devices) if number in holders[d]]
        if len(pool) < len(class_holders):
            raise DataError(f"samples of class {int(label)}", expected=f"at least {len(class_holders)}", got=len(pool))
        pieces = np.split(pool, _cut_points(len(pool), _equal_shares(len(class_holders)), 1))
        for device, piece in zip(class_holders, pieces, strict=True):
            pieces_by_device[device].append(piece)
    return _sort_hands([np.concatenate(p) for p in pieces_by_device])


def by_owner(rows: Rows, owners: npt.NDArray[np.int64], devices: int = 0, *, seed: int) -> list[Rows]:
    """Keep the samples of a person, writer or domain together.

    0 devices are one per owner, in the owners' order. With fewer devices than owners each gets several owners at
    random; with more, owner k's samples are split among the devices k, k + owners, ... Raises `DataError` if an owner
    has fewer samples than devices.
    """
    row_owners = owners[rows]
    present_owners = np.unique(row_owners)
    devices = devices or len(present_owners)
    _check(rows, devices)
    if devices <= len(present_owners):
        order = present_owners
        if devices < len(present_owners):
            order = keyed_generator(seed, "owners", "groups").permutation(present_owners)
        return [np.sort(rows[np.isin(row_owners, group)]) for group in np.array_split(order, devices)]
    hands: list[Rows] = [rows[:0]] * devices
    for number, owner in enumerate(present_owners):
        pool = keyed_generator(seed, "owners", int(owner)).permutation(rows[row_owners == owner])
        owner_devices = range(number, devices, len(present_owners))
        if len(pool) < len(owner_devices):
            raise DataError(f"samples of owner {int(owner)}", expected=f"at least {len(owner_devices)}", got=len(pool))
        for device, piece in zip(owner_devices, np.array_split(pool, len(owner_devices)), strict=True):
            hands[device] = piece
    return _sort_hands(hands)


def draw_rows(rows: Rows, max_rows: int, *, seed: int) -> Rows:
    """Some of the rows at random; all of them if there are no more than `max_rows`, or that is 0."""
    if not 0 < max_rows < len(rows):
        return np.sort(rows)
    return np.sort(rows[keyed_generator(seed, "chosen").permutation(len(rows))[:max_rows]])


def split_rows(rows: Rows, shares: Sequence[float], *, seed: int, device: str) -> list[Rows]:
    """Split a device's rows into parts, such as validation and test; the last part gets the rest.

    Of each share above 0 a part gets one sample at least. The device's name keys the split. Raises `DataError` if a
    share is negative, they sum to 1 or more, or nothing is left for the last part.
    """
    if any(not 0 <= s < 1 for s in shares) or sum(shares) >= 1:
        raise DataError("shares of a split", expected="numbers of 0 or more, below 1 in all", got=list(shares))
    order = rows[keyed_generator(seed, "split", device).permutation(len(rows))]
    # A share that was asked for gets a sample at least: an empty test split measures nothing.
    sizes = [max(1, round(s * len(rows))) if s else 0 for s in shares]
    if sum(sizes) >= len(rows):
        raise DataError(f"samples of {device}", expected=f"more than {sum(sizes)} to split", got=len(rows))
    return _sort_hands(np.split(order, np.cumsum(sizes)))


def counts_per_class(hands: Sequence[Rows], labels: Labels, classes: int) -> npt.NDArray[np.int64]:
    """Samples per device and class, int64 [devices, classes]."""
    return np.stack([np.bincount(labels[hand], minlength=classes) for hand in hands]).astype(np.int64)


def _check(rows: Rows, devices: int, min_samples: int = 1) -> None:
    if devices < 1:
        raise DataError("devices that share samples", expected="one or more", got=devices)
    if min_samples * devices > len(rows):
        per_device, smaller = ("", "") if min_samples == 1 else (f" ({min_samples} each)", ", or a smaller `least`")
        raise DataError(
            f"samples for {devices} devices",
            expected=f"at least {min_samples * devices}{per_device}",
            got=len(rows),
            hint=f"Take fewer devices{smaller}.",
        )


def _sort_hands(hands: Sequence[Rows]) -> list[Rows]:
    return [np.sort(hand) for hand in hands]


def _equal_shares(count: int) -> npt.NDArray[np.float64]:
    return np.full(count, 1.0 / count)


def _cut_points(total: int, shares: npt.NDArray[np.float64], min_items: int = 0) -> npt.NDArray[np.int64]:
    """Cut points that divide `total` items into parts of these shares, with at least `min_items` items each."""
    distributable = total - min_items * len(shares)
    guaranteed = min_items * np.arange(1, len(shares))
    # The tolerance lets 0.3 · 10 be 3, whatever the product rounds to.
    cuts = np.floor(np.cumsum(shares)[:-1] * distributable + 1e-9).clip(0, distributable)
    return (cuts + guaranteed).astype(np.int64)


def _classes_of_devices(classes: int, devices: int, each: int, rng: np.random.Generator) -> list[set[int]]:
    """Draw the classes of every device. To take those with the most free places never ends in a dead end."""
    free_places = np.full(classes, devices * each // classes)
    free_places[rng.permutation(classes)[: devices * each % classes]] += 1
    classes_by_device: list[set[int]] = [set() for _ in range(devices)]
    for device in rng.permutation(devices):
        chosen_classes = np.lexsort((rng.random(classes), -free_places))[:each]
        free_places[chosen_classes] -= 1
        classes_by_device[int(device)] = set(map(int, chosen_classes))
    return classes_by_device


def _fill_small_hands(hands: list[Rows], labels: Labels, min_samples: int, rng: np.random.Generator) -> list[Rows]:
    """Give each device `min_samples` samples: the largest hand gives some of its most frequent class."""
    hands = list(hands)
    sizes = np.array([len(h) for h in hands])
    for device in map(int, np.flatnonzero(sizes < min_samples)):
        while sizes[device] < min_samples:
            giver = int(sizes.argmax())
            giver_rows = hands[giver]
            classes, number = np.unique(labels[giver_rows], return_counts=True)
            candidates = np.flatnonzero(labels[giver_rows] == classes[number.argmax()])
            # The giver keeps its own minimum.
            count = min(min_samples - int(sizes[device]), len(candidates), int(sizes[giver]) - min_samples)
            moved_rows = rng.permutation(candidates)[:count]
            hands[device] = np.concatenate([hands[device], giver_rows[moved_rows]])
            hands[giver] = np.delete(giver_rows, moved_rows)
            sizes[device] += count
            sizes[giver] -= count
    return hands
