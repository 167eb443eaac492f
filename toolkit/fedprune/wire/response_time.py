"""How long answers take on the way between two peers: what is asked again sooner than that comes twice."""

from __future__ import annotations

MAX_PATIENCE = 120.0

_FORGETS = 0.95
_ROUND_TRIPS = 2.0
"""Answers take so many times what a connection took, for all that is known before the first one: pieces of blobs are
longer than what is said to connect, and wait behind each other."""


class ResponseTime:
    """What is known of it; shared by all that is pulled from one peer.

    Attributes:
        slowest: Seconds that answers have needed lately, at most; 0 as long as nothing is known.
    """

    def __init__(self) -> None:
        self.slowest = 0.0

    def connected(self, took: float) -> None:
        """A connection took so many seconds to stand, which is two round trips."""
        self.slowest = max(self.slowest, min(_ROUND_TRIPS * took, MAX_PATIENCE))

    def told(self, slowest: float) -> None:
        """The peer found answers to take so long."""
        self.slowest = max(self.slowest, min(slowest, MAX_PATIENCE))

    def came(self, took: float) -> None:
        """An answer came so many seconds after it was asked for, once."""
        self.slowest = max(_FORGETS * self.slowest, took)

    def patience(self, least: float) -> float:
        """Seconds without an answer after which it is lost, in all likelihood.

        Args:
            least: Seconds that it is given anyway.
        """
        return min(max(least, 2 * self.slowest), max(MAX_PATIENCE, least))
