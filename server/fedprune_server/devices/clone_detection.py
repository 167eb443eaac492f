"""CloneDetector: two boards that were given one name, and push each other off the broker without a word.

Without identities a broker lets only one connection have a name, so that each of two namesakes ends the other's when
it connects. The server sees a device that comes back again and again, or that says first one thing of itself and then
another. With identities both stay connected, with one key: one is a copy of the other's disk. Then a connection speaks
again that another one had followed, or the signatures of both show it (`fedprune_server.messaging.authentication`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MANY = 6
WITHIN_S = 60.0
"""More new connections than an agent makes in this time, because it pauses longer after each failure."""

QUIET_S = 300.0
"""After this long without a sign a suspicion ends."""

AGAIN_S = 3600.0
"""Seconds between two reports of one name."""

SIGNS, APART_S, SIGNS_WITHIN_S = 3, 10.0, 600.0
"""Signs in signed messages that a key has two users: their number, their least distance, and the time within which
they count. A broker that lets messages overtake each other, or a second server for a moment, causes one or two."""

_FOLLOWED = 8
"""Connections of a device that are remembered to have been followed by another one."""

Description = tuple[str, int]
"""What a device says of itself: its profile and number of samples."""


@dataclass
class _Seen:
    session: int
    now: Description
    before: Description | None = None
    births: deque[float] = field(default_factory=lambda: deque(maxlen=MANY))
    followed: deque[int] = field(default_factory=lambda: deque(maxlen=_FOLLOWED))


class CloneDetector:
    """Detects names that more than one board uses."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._suspected: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._signs: dict[str, deque[float]] = {}

    def born(self, device: str, session: int, what: Description, online: bool, now: float) -> str:
        """Note an announcement by a known device, so that strangers can't fill the memory.

        Returns:
            Why there seem to be two boards of that name, if that is news; otherwise nothing.
        """
        seen = self._seen.setdefault(device, _Seen(session, what))
        if session == seen.session:
            seen.now = what
            return ""
        seen.births.append(now)
        reason = ""
        # Samples may grow at any time, also while the board is away.
        other = what[0] != seen.now[0] or what[1] < seen.now[1]
        if online and session in seen.followed:
            reason = "two connections take turns"
        elif other and (online or what == seen.before):
            reason = f"first it was a {_words(seen.now)}, now it is a {_words(what)}"
        elif len(seen.births) == MANY and now - seen.births[0] <= WITHIN_S:
            reason = f"it has connected {MANY} times within {now - seen.births[0]:.0f} s"
        if what != seen.now:
            seen.before, seen.now = seen.now, what
        seen.followed.append(seen.session)
        seen.session = session
        return reason if reason and self._tell(device, now) else ""

    def doubled(self, device: str, now: float) -> bool:
        """Note a sign that two boards sign with one key; returns whether the signs suffice and that is news, once an
        hour.
        """
        signs = self._signs.setdefault(device, deque(maxlen=SIGNS))
        if not signs or now - signs[-1] >= APART_S:
            signs.append(now)
        return len(signs) == SIGNS and now - signs[0] <= SIGNS_WITHIN_S and self._tell(device, now)

    def _tell(self, device: str, now: float) -> bool:
        """Suspect a device; returns whether that is new."""
        self._suspected[device] = now
        if now - self._told.get(device, -AGAIN_S) < AGAIN_S:
            return False
        self._told[device] = now
        return True

    def forget(self, device: str) -> None:
        """Forget a name, which another board has now."""
        for known in (self._seen, self._suspected, self._told, self._signs):
            known.pop(device, None)

    def suspects(self, device: str) -> bool:
        """Whether more than one board seems to use a name."""
        return device in self._suspected

    def settle(self, now: float) -> None:
        """Forget old suspicions."""
        self._suspected = {n: at for n, at in self._suspected.items() if now - at < QUIET_S}


def _words(what: Description) -> str:
    return f"{what[0]} with {what[1]} samples"
