"""Why parts of a round came to nothing, in a few words that can be counted."""

from __future__ import annotations

import re

from fedprune_server.executor.divergence import ran_away

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
    ("stale", re.compile(r"has moved|ranked anew|the round is over")),
)  # fmt: skip
KINDS = ("diverged", *(kind for kind, _ in _KINDS), OTHER)
"""All of them."""


def kind_of(reason: str) -> str:
    """The kind of a reason that a board or the server gave."""
    if ran_away(reason):
        return "diverged"
    return next((kind for kind, words in _KINDS if words.search(reason)), OTHER)
