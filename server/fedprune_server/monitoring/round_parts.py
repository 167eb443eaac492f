"""The parts of a round that are timed and counted: what begins and ends each, and why it comes to nothing."""

from __future__ import annotations

import re

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune_server.executor.divergence import ran_away

OF_DEVICES = ("extract", "train", "pull", "aggregate")
"""Parts of one device; `train` is from an offer to the announcement of its update."""

PARTS = ("score", *OF_DEVICES, "close", "evaluate", "round")


def begun(command: do.Command) -> tuple[str, str] | None:
    """The part that a command begins, and its device (empty if it is the whole round's); None for no part."""
    match command:
        case do.Score():
            return "score", ""
        case do.Extract():
            return "extract", command.part.device
        case do.SendOffer():
            return "train", command.device
        case do.PullUpdate():
            return "pull", command.device
        case do.Fold():
            return "aggregate", command.contribution.part.device
        case do.Close():
            return "close", ""
        case do.Evaluate():
            return "evaluate", ""
    return None


def ended(event: on.Event) -> tuple[str, str] | None:
    """The part that an event ends, and its device; None for no part."""
    match event:
        case on.Scored():
            return "score", ""
        case on.Extracted():
            return "extract", event.device
        case on.UpdateAnnounced():
            return "train", event.device
        case on.UpdateStored():
            return "pull", event.device
        case on.Folded():
            return "aggregate", event.device
        case on.Closed():
            return "close", ""
        case on.Evaluated():
            return "evaluate", ""
    return None


OTHER = "other"
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("late", re.compile(r"deadline|too late|in time|takes too long|\blate\b|enough updates|let go")),
    ("outlier", re.compile(r"stands? out|most that one device may|length of the update|cosine with the others")),
    ("quarantined", re.compile(r"quarantine")),
    ("shut out", re.compile(r"shut out|revoked")),
    ("gone", re.compile(r"no longer has|went away|\bgone\b|isn't there|offline")),
    ("malformed", re.compile(
        r"tensor|shape|type of|damaged|leaf|contradict|can't be read|lacks|holds|size of the update|not a number"
    )),
    ("no room", re.compile(r"disk|no room|space|quota")),
    ("memory", re.compile(r"memory")),
    ("data", re.compile(r"sample|label|data")),
    ("stale", re.compile(r"has moved|ranked again|the round is over")),
)  # fmt: skip
KINDS = ("diverged", *(kind for kind, _ in _KINDS), OTHER)
"""All of them."""


def kind_of(reason: str) -> str:
    """The kind of a reason that a board or the server gave."""
    if ran_away(reason):
        return "diverged"
    return next((kind for kind, words in _KINDS if words.search(reason)), OTHER)
