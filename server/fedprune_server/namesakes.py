"""Namesakes: two boards that were given one name, and push each other off the broker without a word.

A broker lets only one connection have a name, so that each of two namesakes ends the other's whenever it connects. The
server sees a device that comes back again and again, or that says first one thing of itself and then another.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MANY = 6
WITHIN_S = 60.0
"""So many new connections in so short a time are no coincidence: an agent pauses longer after each failure."""

QUIET_S = 300.0
"""After so long without a sign of it nobody is suspected any more."""

Description = tuple[str, int]
"""What a device says of itself: its profile and number of samples."""


@dataclass
class _Seen:
    session: int
    now: Description
    before: Description | None = None
    births: deque[float] = field(default_factory=lambda: deque(maxlen=MANY))


class Namesakes:
    """Watches announcements for names that more than one board uses."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._suspected: dict[str, float] = {}

    def born(self, device: str, session: int, what: Description, online: bool, now: float) -> str:
        """Take in an announcement.

        Args:
            device: Whose it is; one of those whom the server knows, so that strangers can't fill the memory.
            session: Number of its connection.
            what: What it says of itself.
            online: Whether its connection before this one still stands, as far as the server knows.
            now: Seconds of a clock that nobody sets.

        Returns:
            Why there seem to be two boards of that name, where that is news; else nothing.
        """
        seen = self._seen.setdefault(device, _Seen(session, what))
        if session == seen.session:
            return ""
        seen.births.append(now)
        reason = ""
        if what != seen.now and (online or what == seen.before):
            reason = f"first it was a {_words(seen.now)}, now it is a {_words(what)}"
        elif len(seen.births) == MANY and now - seen.births[0] <= WITHIN_S:
            reason = f"it has connected {MANY} times within {now - seen.births[0]:.0f} s"
        if what != seen.now:
            seen.before, seen.now = seen.now, what
        seen.session = session
        if not reason:
            return ""
        news = device not in self._suspected
        self._suspected[device] = now
        return reason if news else ""

    def suspects(self, device: str) -> bool:
        """Whether more than one board seems to use a name."""
        return device in self._suspected

    def settle(self, now: float) -> None:
        """Forget suspicions that nothing has happened to for long."""
        self._suspected = {n: at for n, at in self._suspected.items() if now - at < QUIET_S}


def _words(what: Description) -> str:
    return f"{what[0]} with {what[1]} samples"
