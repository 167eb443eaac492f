"""Notices that a broker drops pieces of blobs: requests for the same piece come again and again, and nothing else does.

No broker of MQTT 3.1.1 says what it drops. It acknowledges a message that its rules don't let through, that is longer
than it may be, or for which a queue has no room, and delivers it to nobody. So both ends of a transfer watch its
requests: the one that asks, and the one that is asked.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fedprune.wire.messages import BlobRequest

# Requests for the same piece, and the seconds between the first and the last of them, after which it counts as dropped.
# `Pull` repeats after 5 and 15 s, so that this is noticed within 20 s.
STUCK_REQUESTS, STUCK_S = 3, 10.0

# Blobs of one transfer that are remembered: an offer names three, and a few more with lower precisions.
_BLOBS = 8


@dataclass(slots=True)
class _Frontier:
    """The first piece of a blob that is still asked for, and the last one that was asked for."""

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

    def note(self, want: BlobRequest, now: float) -> bool:
        """Note a request; returns whether its piece seems to be dropped, the first time that it seems so."""
        known = self._blobs.get(want.sha256)
        # Once a piece was asked for again, a request beyond the window means that some have arrived.
        moved = known is not None and known.count > 1 and want.first > known.last
        if known is None or known.part != want.part or want.first < known.first or moved:
            self._blobs[want.sha256] = _Frontier(want.part, want.first, want.first, now, now)
            self._blobs.move_to_end(want.sha256)
            if len(self._blobs) > _BLOBS:
                self._blobs.popitem(last=False)
            return False
        if want.first > known.last:
            known.last, known.latest = want.first, now  # the window's next request
            return False
        if want.first != known.first:
            if known.count == 1:  # what came before this piece has arrived, and this one is asked for again
                self._blobs[want.sha256] = _Frontier(want.part, want.first, known.last, known.latest, now, count=2)
            return False
        before = _is_stuck(known)
        known.count += 1
        known.latest = now
        return _is_stuck(known) and not before

    @property
    def stuck(self) -> bool:
        return any(map(_is_stuck, self._blobs.values()))

    def clear(self) -> None:
        """All has arrived, or nothing more is asked for."""
        self._blobs.clear()


def _is_stuck(blob: _Frontier) -> bool:
    return blob.count >= STUCK_REQUESTS and blob.latest - blob.since >= STUCK_S


def broker_drops(what: str) -> str:
    """What to say of a broker that acknowledges something, and delivers it to nobody."""
    return f"the broker drops {what}: its rules (ACL), its limit of a message's size, or a full queue"
