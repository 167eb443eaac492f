"""Estimate of a peer's response time: a request that is repeated sooner is answered twice."""

from __future__ import annotations

MAX_PATIENCE = 120.0

_DECAY = 0.95
_ROUND_TRIPS = 2.0
"""Response time in units of the time for connecting, until the first response: pieces of blobs are longer than the
packets of a connection, and wait behind each other."""


class ResponseTime:
    """A decaying maximum of response times in seconds (`slowest`), shared by all transfers from one peer."""

    def __init__(self) -> None:
        self.slowest = 0.0

    def connected(self, took: float) -> None:
        """Connecting took this many seconds, which is two round trips."""
        self.slowest = max(self.slowest, min(_ROUND_TRIPS * took, MAX_PATIENCE))

    def told(self, slowest: float) -> None:
        """The peer has measured this response time."""
        self.slowest = max(self.slowest, min(slowest, MAX_PATIENCE))

    def came(self, took: float) -> None:
        """A request that was sent once was answered after this many seconds."""
        self.slowest = max(_DECAY * self.slowest, took)

    def patience(self, least: float) -> float:
        """Seconds, at least `least`, after which a request or its answer was very likely lost."""
        return min(max(least, 2 * self.slowest), max(MAX_PATIENCE, least))
