"""How long a peer takes to answer, and after how long an answer counts as lost."""

from __future__ import annotations

MAX_PATIENCE_S = 120.0

_RESPONSE_DECAY = 0.95
# Response time, in multiples of the time for connecting, that is assumed until the first one is measured: pieces of
# blobs are longer than the packets of a handshake, and queue behind each other.
_ROUND_TRIPS = 2.0


class ResponseTime:
    """A decaying maximum of response times in seconds (`slowest_s`), shared by all transfers from one peer."""

    def __init__(self) -> None:
        self.slowest_s = 0.0

    def note_connection(self, seconds: float) -> None:
        """Note the seconds for connecting, which takes two round trips."""
        self.slowest_s = max(self.slowest_s, min(_ROUND_TRIPS * seconds, MAX_PATIENCE_S))

    def note_peer_measurement(self, slowest: float) -> None:
        """Note a response time that the peer has measured."""
        self.slowest_s = max(self.slowest_s, min(slowest, MAX_PATIENCE_S))

    def note_response(self, seconds: float) -> None:
        """Note the response time of a request that was sent only once."""
        self.slowest_s = max(_RESPONSE_DECAY * self.slowest_s, seconds)

    def patience(self, min_s: float) -> float:
        """Seconds, at least `min_s`, after which a request or its answer was very likely lost."""
        return min(max(min_s, 2 * self.slowest_s), max(MAX_PATIENCE_S, min_s))
