"""Detection of two boards that use one name.

Without identities, a broker allows one connection per name, so the two boards keep disconnecting each other: the server
sees a device that reconnects again and again, or whose description alternates. With identities, both stay connected
with the same key, because one board's disk is a copy of the other's. Then a superseded session sends again, or
signatures overlap (`fedprune_server.messaging.authentication`).
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

log = logging.getLogger("fedprune.server")

# Suspicious are this many new sessions within this many seconds: an agent that reconnects by itself backs off.
MAX_RECONNECTS, RECONNECT_WINDOW_S = 6, 60.0

# Seconds without a new sign after which a suspicion ends.
SUSPICION_QUIET_S = 300.0

# Seconds between two reports of one name.
REPORT_INTERVAL_S = 3600.0

# Overlapping signatures that show that two boards share a key, the minimum seconds between two that count, and the
# seconds within which they count. A broker that reorders messages, or a second server for a moment, causes one or two.
MIN_OVERLAPS, OVERLAP_INTERVAL_S, OVERLAP_WINDOW_S = 3, 10.0, 600.0

SHARED_KEY_REASON = "two boards sign with its key"

# Superseded sessions that are remembered per device.
_MAX_SUPERSEDED = 8

# A device's description of itself: its profile and number of samples.
Description = tuple[str, int]


@dataclass
class _SessionHistory:
    """The connections (sessions) of a device, and the descriptions with which it announced itself."""

    session: int
    current: Description
    previous: Description | None = None
    births: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECONNECTS))
    superseded: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_SUPERSEDED))


class CloneDetector:
    """Detects names that more than one board uses."""

    def __init__(self) -> None:
        self._histories: dict[str, _SessionHistory] = {}
        self._suspected: dict[str, tuple[float, str]] = {}  # time of the last sign, and reason of the first
        self._reported_at: dict[str, float] = {}
        self._overlaps: dict[str, deque[float]] = {}

    def note_birth(self, device: str, session: int, description: Description, online: bool, now: float) -> str:
        """Note the birth (the announcement) of an admitted device: strangers must not fill the memory. If two boards
        seem to use the name, warn, at most once an hour. Returns the reason of the warning; empty without one.
        """
        history = self._histories.setdefault(device, _SessionHistory(session, description))
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
            first, current = _description_text(history.current), _description_text(description)
            reason = f"first it was a {first}, now it is a {current}"
        elif len(history.births) == MAX_RECONNECTS and now - history.births[0] <= RECONNECT_WINDOW_S:
            reason = f"it has connected {MAX_RECONNECTS} times within {now - history.births[0]:.0f} s"
        if description != history.current:
            history.previous, history.current = history.current, description
        history.superseded.append(history.session)
        history.session = session
        if not reason or not self._suspect(device, reason, now):
            return ""
        log.warning(
            "device %s: another board called %s seems to be connected: %s. Give every board a --device of its own, "
            "unless this one was only started again with other data. If the card of one is a copy of the other's: "
            "fedprune-server devices replace %s, and let each join again.",
            device, device, reason, device,
        )  # fmt: skip
        return reason

    def note_shared_key(self, device: str, now: float) -> bool:
        """Note overlapping signatures of one key. After enough of them warn, at most once an hour; returns whether."""
        signs = self._overlaps.setdefault(device, deque(maxlen=MIN_OVERLAPS))
        if not signs or now - signs[-1] >= OVERLAP_INTERVAL_S:
            signs.append(now)
        is_repeated = len(signs) == MIN_OVERLAPS and now - signs[0] <= OVERLAP_WINDOW_S
        if not is_repeated or not self._suspect(device, SHARED_KEY_REASON, now):
            return False
        log.warning(
            "two boards seem to use the identity of %s, as if one were a copy of the other's card or state folder: "
            "%d signs of it within %.0f minutes. A broker that delays messages for long can look the same, so look "
            "for the second board first. If there is one, take it away, or revoke the identity of both "
            "(fedprune-server devices replace %s) and let each join again with a name and claim of its own.",
            device, MIN_OVERLAPS, OVERLAP_WINDOW_S / 60, device,
        )  # fmt: skip
        return True

    def _suspect(self, device: str, reason: str, now: float) -> bool:
        """Suspect a device; returns whether to report it, at most once an hour."""
        _, first_reason = self._suspected.get(device, (now, reason))
        self._suspected[device] = now, first_reason
        if now - self._reported_at.get(device, -REPORT_INTERVAL_S) < REPORT_INTERVAL_S:
            return False
        self._reported_at[device] = now
        return True

    def forget(self, device: str) -> None:
        """Forget a name, because another board may have it from now on."""
        for records in (self._histories, self._suspected, self._reported_at, self._overlaps):
            records.pop(device, None)

    def is_suspected(self, device: str) -> bool:
        return device in self._suspected

    def suspicions(self) -> dict[str, str]:
        """The names that two boards seem to use, with the reasons."""
        return {name: reason for name, (_, reason) in self._suspected.items()}

    def expire(self, now: float) -> None:
        """End suspicions that had no new sign for `SUSPICION_QUIET_S`."""
        self._suspected = {n: sign for n, sign in self._suspected.items() if now - sign[0] < SUSPICION_QUIET_S}


def _description_text(description: Description) -> str:
    return f"{description[0]} with {description[1]} samples"
