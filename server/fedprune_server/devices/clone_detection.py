"""Detection of two boards that use one name.

Without identities, a broker allows one connection per name, so the two boards keep disconnecting each other: the server
sees a device that reconnects again and again, or whose description alternates. With identities, both stay connected
with the same key, because one board's disk is a copy of the other's. Then a superseded session sends again, or
signatures overlap (`fedprune_server.messaging.authentication`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# So many new sessions within so many seconds are suspicious: an agent that reconnects by itself backs off, and makes
# fewer.
RECONNECTS, RECONNECTS_WITHIN_S = 6, 60.0

# Seconds without a new sign after which a suspicion ends.
QUIET_S = 300.0

# Seconds between two reports of one name.
AGAIN_S = 3600.0

# Overlapping signatures that show that two boards share a key, the minimum seconds between two that count, and the
# seconds within which they count. A broker that reorders messages, or a second server for a moment, causes one or two.
SIGNS, APART_S, SIGNS_WITHIN_S = 3, 10.0, 600.0

SHARED_KEY = "two boards sign with its key"

# Superseded sessions that are remembered per device.
_SUPERSEDED = 8

# A device's description of itself: its profile and number of samples.
Description = tuple[str, int]


@dataclass
class _Seen:
    session: int
    current: Description
    previous: Description | None = None
    births: deque[float] = field(default_factory=lambda: deque(maxlen=RECONNECTS))
    superseded: deque[int] = field(default_factory=lambda: deque(maxlen=_SUPERSEDED))


class CloneDetector:
    """Detects names that more than one board uses."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._suspected: dict[str, tuple[float, str]] = {}  # when there was a sign last, and the first one
        self._reported: dict[str, float] = {}
        self._signs: dict[str, deque[float]] = {}

    def born(self, device: str, session: int, description: Description, online: bool, now: float) -> str:
        """Note a birth of a device. Call it only for admitted devices, so that strangers can't fill the memory. Returns
        the reason for which two boards seem to use the name; empty if there is no sign, or if the name was reported
        within the last hour."""
        history = self._seen.setdefault(device, _Seen(session, description))
        if session == history.session:
            history.current = description
            return ""
        history.births.append(now)
        reason = ""
        # More samples are no sign: they may grow at any time, also while the board is away.
        is_other_board = description[0] != history.current[0] or description[1] < history.current[1]
        if online and session in history.superseded:
            reason = "two connections take turns"
        elif is_other_board and (online or description == history.previous):
            reason = f"first it was a {_words(history.current)}, now it is a {_words(description)}"
        elif len(history.births) == RECONNECTS and now - history.births[0] <= RECONNECTS_WITHIN_S:
            reason = f"it has connected {RECONNECTS} times within {now - history.births[0]:.0f} s"
        if description != history.current:
            history.previous, history.current = history.current, description
        history.superseded.append(history.session)
        history.session = session
        return reason if reason and self._suspect(device, reason, now) else ""

    def note_shared_key(self, device: str, now: float) -> bool:
        """Note overlapping signatures of one key; returns whether to report them, at most once an hour."""
        signs = self._signs.setdefault(device, deque(maxlen=SIGNS))
        if not signs or now - signs[-1] >= APART_S:
            signs.append(now)
        return len(signs) == SIGNS and now - signs[0] <= SIGNS_WITHIN_S and self._suspect(device, SHARED_KEY, now)

    def _suspect(self, device: str, reason: str, now: float) -> bool:
        """Suspect a device; returns whether to report it, at most once an hour."""
        _, first_reason = self._suspected.get(device, (now, reason))
        self._suspected[device] = now, first_reason
        if now - self._reported.get(device, -AGAIN_S) < AGAIN_S:
            return False
        self._reported[device] = now
        return True

    def forget(self, device: str) -> None:
        """Forget a name, because another board may have it from now on."""
        for records in (self._seen, self._suspected, self._reported, self._signs):
            records.pop(device, None)

    def suspects(self, device: str) -> bool:
        return device in self._suspected

    def suspicions(self) -> dict[str, str]:
        """The names that two boards seem to use, with the reasons."""
        return {name: reason for name, (_, reason) in self._suspected.items()}

    def expire(self, now: float) -> None:
        """End suspicions that had no new sign for `QUIET_S`."""
        self._suspected = {n: sign for n, sign in self._suspected.items() if now - sign[0] < QUIET_S}


def _words(description: Description) -> str:
    return f"{description[0]} with {description[1]} samples"
