"""How many samples there are and were, by class and part: for people, for programs, and for the log that keeps them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedprune_device.data.reservoir import UNLABELLED, Reservoir
from fedprune_device.data.segment_log import Kind, LogRecord, digest
from fedprune_device.data.splits import SplitShares


def census(reservoir: Reservoir, shares: SplitShares) -> dict[str, Any]:
    """Samples by class (kept, and ever seen) and by part, and the room that they take.

    Args:
        reservoir: What is kept.
        shares: What is held out.
    """
    kept = reservoir.kept()
    parts = Counter(shares.part(n) for c, names in kept.items() if c != UNLABELLED for n in names)
    classes = {
        str(c): {"kept": len(kept.get(c, ())), "seen": seen}
        for c, seen in reservoir.seen.items()
        if c != UNLABELLED and seen
    }
    room = {}
    for unlabelled in (False, True):
        most, most_bytes = reservoir.most(unlabelled=unlabelled)
        held, held_bytes = reservoir.held(unlabelled=unlabelled)
        side = {"samples": held, "samples_most": most, "bytes": held_bytes, "bytes_most": most_bytes}
        room["unlabelled" if unlabelled else "labelled"] = side
    return {
        "classes": classes,
        "unlabelled": len(kept.get(UNLABELLED, ())),
        "parts": {p: parts[p] for p in ("train", "val", "test")},
        "room": room,
    }


def record_of(seen: Mapping[int, int]) -> LogRecord:
    """What a log keeps of how many samples of each class were ever seen."""
    payload = json.dumps({str(c): n for c, n in seen.items()}).encode()
    return LogRecord(Kind.COUNTS, digest(payload), payload=payload)


def seen_in(record: LogRecord) -> dict[int, int]:
    """How many samples of each class were seen, as a log has it.

    Raises:
        ValueError: The record is damaged.
    """
    if digest(record.payload) != record.name:
        raise ValueError("the digest is another")
    try:
        return {int(label): int(seen) for label, seen in json.loads(record.payload).items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from error
