"""Which boards mask together, after a sum of masked updates was false.

A false sum (numbers out of range, shares that don't fit) doesn't show which board is at fault, only that one of them
is. Its boards are *suspects* from then on, and are summed in halves. Boards of a true sum are suspects no longer. So
the group with the board at fault halves with each attempt, while the other boards' sums count: of n boards, one that
always spoils its sum is named after 1 + log2(n) of them, rounded up.

A half of fewer boards than a sum needs is filled up with boards that aren't suspects. If these are too few, the half is
left out, and it is drawn by lot which one that is. Only a board that was the one suspect of a false sum is named.
Two hostile boards that act together may have a third one named: one of them behaves while it is a suspect, and spoils
the sum in which it helps to fill up another one's half.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fedprune.secure_aggregation.session import MIN_BOARDS

Groups = Sequence[Collection[str]]


def divide(
    devices: Sequence[str], suspects: Groups, dice: np.random.Generator
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Divide devices that were asked for the same into cohorts.

    Returns:
        The cohorts, and the devices that are left out of this attempt.
    """
    drawn = [devices[i] for i in dice.permutation(len(devices)).tolist()]
    groups = [[name for name in drawn if name in group] for group in suspects]
    free = [name for name in drawn if not any(name in group for group in groups)]
    halves = [half for group in groups for half in _halves(group)]
    if not halves:
        return [tuple(devices)], []
    cohorts: list[list[str]] = []
    left: list[str] = []
    for half in halves:
        lacking = max(0, MIN_BOARDS - len(half))
        if lacking <= len(free):
            cohorts.append(half + free[:lacking])
            del free[:lacking]
        else:
            left += half
    if not cohorts:  # no half is large enough: try other boards each time, and leave out as many as possible
        left = [name for name in drawn if name in left]
        kept = max(MIN_BOARDS - len(free), (len(left) + 1) // 2)
        return [tuple(sorted(left[:kept] + free))], sorted(left[kept:])
    if len(free) >= MIN_BOARDS:
        cohorts.append(free)
    else:
        cohorts[0] += free
    return [tuple(sorted(cohort)) for cohort in cohorts], sorted(left)


def after_sums(
    suspects: Groups, true: Collection[Sequence[str]], false: Collection[Sequence[str]]
) -> tuple[list[list[str]], set[str]]:
    """Groups of suspects after an attempt.

    Args:
        suspects: The groups before it.
        true: Cohorts whose sum was true.
        false: Cohorts whose sum was false.

    Returns:
        The groups, and the devices that are found to be at fault; they are in none of them.
    """
    cleared = {name for cohort in true for name in cohort}
    groups = [rest for group in suspects if (rest := sorted(set(group) - cleared))]
    at_fault: set[str] = set()
    for cohort in false:
        others, parts = list[list[str]](), list[list[str]]()
        for group in groups:
            common = [name for name in group if name in cohort]
            parts += [common] if common else []
            others += [rest] if (rest := [name for name in group if name not in cohort]) else []
        parts = parts or [sorted(cohort)]
        single = len(parts) == 1 and len(parts[0]) == 1
        at_fault |= set(parts[0]) if single else set()
        groups = others if single else others + parts
    return groups, at_fault


def _halves(group: list[str]) -> list[list[str]]:
    middle = (len(group) + 1) // 2
    return [half for half in (group[:middle], group[middle:]) if half]
