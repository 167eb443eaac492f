"""Counts what is left out and why, for one line of the log instead of one for each message."""

from __future__ import annotations

from collections import Counter

_MAX_NAMES = 6  # of one reason that a line lists


class DropCounts:
    """Counts by the reason and by the channel."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, reason: str, name: str = "", number: int = 1) -> None:
        self._counts.setdefault(reason, Counter())[name] += number

    def take(self) -> str:
        """What was counted since the last call, as a text; empty if nothing was."""
        counts, self._counts, texts = self._counts, {}, []
        for reason, names in counts.items():
            most = [f"{name} {n}" if len(names) > 1 else name for name, n in names.most_common(_MAX_NAMES) if name]
            more = "" if len(names) <= _MAX_NAMES else " and others"
            listed = f" ({', '.join(most)}{more})" if most else ""
            texts.append(f"{names.total()} {reason}{listed}")
        return "; ".join(texts)
