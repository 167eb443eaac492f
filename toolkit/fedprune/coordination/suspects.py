"""Decides which boards mask their updates together, and finds the boards that spoil sums.

A sum of a cohort of boards is *false* if its numbers are out of range or its shares don't fit, and *true* otherwise. A
false sum doesn't show which board is at fault. Its boards are *suspects* from then on, and are summed in halves. Boards
of a true sum are suspects no longer. So the group with the board at fault halves with each attempt, while the other
boards' sums count: of n boards, one that always spoils its sum is named after 1 + ⌈log2(n)⌉ false sums.

A half of fewer boards than a sum needs is filled up with boards that aren't suspects. If these are too few, the half is
left out; which one is drawn at random. If all halves are, their boards are mixed anew. Only a board that was the only
suspect of a false sum is named. Two hostile boards that act together, or one of four or five boards, may have an honest
one named: it behaves while it is a suspect, and later spoils the sum in which it fills up a half with that board.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fedprune.secure_aggregation.session import MIN_BOARDS

Groups = Sequence[Collection[str]]


def divide_into_cohorts(
    devices: Sequence[str], suspects: Groups, rng: np.random.Generator
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Divide devices that were asked for the same into cohorts; returns the cohorts, and the devices that are left out
    of this attempt. Groups of `suspects` are divided in halves."""
    # By lot: a fixed order would always leave the same boards out, or fill up halves with the same ones.
    shuffled = [devices[i] for i in rng.permutation(len(devices)).tolist()]
    groups = [[name for name in shuffled if name in group] for group in suspects]
    unsuspected = [name for name in shuffled if not any(name in group for group in groups)]
    middles = [(len(group) + 1) // 2 for group in groups]
    halves = [half for g, n in zip(groups, middles, strict=True) for half in (g[:n], g[n:]) if half]
    if not halves:
        return [tuple(devices)], []
    cohorts: list[list[str]] = []
    left_out: list[str] = []
    for half in halves:
        lacking = max(0, MIN_BOARDS - len(half))
        if lacking <= len(unsuspected):
            cohorts.append(half + unsuspected[:lacking])
            del unsuspected[:lacking]
        else:
            left_out += half
    if not cohorts:
        # Other boards each time, in cohorts so small that some have none at fault; of few boards, half in one cohort.
        leftovers = [name for name in shuffled if name in left_out]
        parts = max(1, len(leftovers) // MIN_BOARDS)
        count = len(leftovers) if parts > 1 else max(MIN_BOARDS - len(unsuspected), (len(leftovers) + 1) // 2)
        cohorts, left_out = [leftovers[i:count:parts] for i in range(parts)], leftovers[count:]
    if len(unsuspected) >= MIN_BOARDS:
        cohorts.append(unsuspected)
    else:  # a sum of so few would show too much of each
        cohorts[0] += unsuspected
    return [tuple(sorted(cohort)) for cohort in cohorts], sorted(left_out)


def narrow_suspects(
    suspects: Groups, true_cohorts: Collection[Sequence[str]], false_cohorts: Collection[Sequence[str]]
) -> tuple[list[list[str]], set[str]]:
    """Groups of suspects after an attempt, and the devices that are found to be at fault, which are in no group."""
    cleared = {name for cohort in true_cohorts for name in cohort}
    groups = [remaining for group in suspects if (remaining := sorted(set(group) - cleared))]
    at_fault: set[str] = set()
    for cohort in false_cohorts:
        outside = [rest for group in groups if (rest := [name for name in group if name not in cohort])]
        inside = [rest for group in groups if (rest := [name for name in group if name in cohort])]
        inside = inside or [sorted(cohort)]  # of boards of which none was suspected, all are
        # The false sum has one suspect: all others in it were in true sums before, or were never suspected.
        is_single = len(inside) == 1 and len(inside[0]) == 1
        at_fault |= set(inside[0]) if is_single else set()
        groups = outside if is_single else outside + inside
    return sorted(groups), at_fault  # sorted: an attempt that clears nobody leaves them as they are
