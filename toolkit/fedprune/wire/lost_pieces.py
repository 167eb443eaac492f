"""Detects a broker that drops pieces of blobs: requests for one piece are repeated, and no other piece is requested.

No broker of MQTT 3.1.1 says what it drops. It acknowledges a message that its rules forbid, that exceeds its size
limit, or for which a queue has no room, and delivers it to nobody. So both ends of a transfer watch its requests.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fedprune.wire.messages import BlobRequest

# Requests for the same piece, and the seconds between the first and the last of them, after which it counts as dropped.
# `Pull` repeats after 5, 15, 35 and 75 s, so that this is noticed within 80 s; sooner the other side may only be slow.
STUCK_REQUESTS, STUCK_S = 3, 60.0

# Blobs whose requests are remembered: an offer names three, and a few more with lower precisions.
_MAX_BLOBS = 8


@dataclass(slots=True)
class _Frontier:
    """The first piece of a blob that is still requested, and the last one that was."""

    part: str
    first: int
    last: int
    since: float
    latest: float
    count: int = 1


class LostPieces:
    """Requests of one side of a connection for pieces of the other side's blobs."""

    def __init__(self) -> None:
        self._blobs: OrderedDict[str, _Frontier] = OrderedDict()

    def note_request(self, request: BlobRequest, now: float) -> bool:
        """Note a request; returns True once per piece, when the piece seems to be dropped."""
        frontier = self._blobs.get(request.sha256)
        # After a repetition, a request beyond the window means that some pieces have arrived.
        has_advanced = frontier is not None and frontier.count > 1 and request.first > frontier.last
        if frontier is None or frontier.part != request.part or request.first < frontier.first or has_advanced:
            self._blobs[request.sha256] = _Frontier(request.part, request.first, request.first, now, now)
            self._blobs.move_to_end(request.sha256)
            if len(self._blobs) > _MAX_BLOBS:
                self._blobs.popitem(last=False)
            return False
        if request.first > frontier.last:
            frontier.last, frontier.latest = request.first, now  # the window's next request
            return False
        if request.first != frontier.first:
            if frontier.count == 1:  # earlier pieces have arrived, and this one is requested again
                self._blobs[request.sha256] = _Frontier(
                    request.part, request.first, frontier.last, frontier.latest, now, count=2
                )
            return False
        was_stuck = _is_stuck(frontier)
        frontier.count += 1
        frontier.latest = now
        return _is_stuck(frontier) and not was_stuck

    @property
    def is_stuck(self) -> bool:
        return any(map(_is_stuck, self._blobs.values()))

    def clear(self) -> None:
        """Forget all requests: everything has arrived, or the transfer has ended."""
        self._blobs.clear()


def _is_stuck(blob: _Frontier) -> bool:
    return blob.count >= STUCK_REQUESTS and blob.latest - blob.since >= STUCK_S


def dropping_broker_message(what: str) -> str:
    """The message about a broker that acknowledges something, and delivers it to nobody."""
    return f"the broker drops {what}: its rules (ACL), its limit of a message's size, or a full queue"
