"""The open alerts of a server: each opens once, stays while its cause lasts, and closes once."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fedprune_server.observation.alerts import KINDS, MOST, Alert

_CHANGES = 4 * MOST
"""Changes that wait for a reader; of more, the oldest is dropped."""


@dataclass(frozen=True)
class AlertChange:
    """An alert that opened or closed.

    Attributes:
        alert: The alert.
        closed_at: When it closed, in seconds since 1970; None if it opened.
    """

    alert: Alert
    closed_at: float | None = None


class AlertBook:
    """Open alerts.

    Args:
        restored: Alerts that the server's last run left open. They close like all others.
    """

    def __init__(self, restored: Iterable[Alert] = ()) -> None:
        self._open: dict[str, Alert] = {a.key: a for a in restored}
        self._begun: dict[str, tuple[float, float]] = {}  # not open yet: since when, by both clocks
        self._ended: dict[str, float] = {}  # open, but gone since
        self._unread: deque[AlertChange] = deque(maxlen=_CHANGES)

    @property
    def open(self) -> list[Alert]:
        """All open alerts; may be read from any thread."""
        return list(self._open.values())

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the open alerts."""
        return frozenset(self._open)

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Open alerts by kind and severity, with zeros; may be read from any thread."""
        found = Counter((a.kind, a.severity) for a in self.open)
        return {(kind, severity): found[kind, severity] for kind, levels in KINDS.items() for severity in levels}

    def update(self, alerts: Iterable[Alert], now: float, at: float) -> list[AlertChange]:
        """Take over the result of one look.

        An alert opens when it has held for its delay, and closes when it has been gone for as long, so that what comes
        and goes within its delay changes nothing.

        Args:
            alerts: Alerts that hold now.
            now: The monotonic clock.
            at: Seconds since 1970.

        Returns:
            What opened and closed.
        """
        changes: list[AlertChange] = []
        held = {a.key: a for a in alerts}
        for key in self._begun.keys() - held.keys():
            del self._begun[key]
        for key, alert in held.items():
            self._ended.pop(key, None)
            if (before := self._open.get(key)) is not None:
                self._open[key] = replace(alert, since=before.since)
                continue
            begun, since = self._begun.setdefault(key, (now, alert.since))
            if now - begun >= alert.delay_s:
                del self._begun[key]
                self._open[key] = replace(alert, since=since)
                changes.append(AlertChange(self._open[key]))
        for key in self._open.keys() - held.keys():
            if now - self._ended.setdefault(key, now) >= self._open[key].delay_s:
                del self._ended[key]
                changes.append(AlertChange(self._open.pop(key), at))
        self._unread.extend(changes)
        return changes

    def changes(self) -> list[AlertChange]:
        """Changes since the last call."""
        found = list(self._unread)
        self._unread.clear()
        return found
