"""The open alerts of a server: each opens once, stays while its cause lasts, may change severity, and closes once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fedprune_server.monitoring.alert_rules import ALERT_SEVERITIES
from fedprune_server.monitoring.alerts import Alert


@dataclass(frozen=True)
class AlertChange:
    """An alert that opened, changed its severity, or (with `closed_at`, in seconds since 1970) closed."""

    alert: Alert
    closed_at: float | None = None


class AlertBook:
    """The open alerts; at first those that the server's last run left open."""

    def __init__(self, restored: Iterable[Alert] = ()) -> None:
        self._open: dict[str, Alert] = {a.key: a for a in restored}
        # Alerts whose delay hasn't passed, by key and severity: when they were first seen, and since when they hold.
        self._pending: dict[tuple[str, str], tuple[float, float]] = {}
        self._closing_since: dict[str, float] = {}  # open alerts whose cause has gone: since when, by key

    @property
    def open_alerts(self) -> list[Alert]:
        """All open alerts; may be called from any thread."""
        return list(self._open.values())

    @property
    def closing_keys(self) -> frozenset[str]:
        """Keys of open alerts that close unless their cause comes again; may be called from any thread."""
        return frozenset(tuple(self._closing_since))

    @property
    def open_severities(self) -> frozenset[tuple[str, str]]:
        return frozenset((a.kind, a.severity) for a in self.open_alerts)

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Open alerts by kind and severity, including zeros; may be called from any thread."""
        counts = Counter((a.kind, a.severity) for a in self.open_alerts)
        return {(kind, level): counts[kind, level] for kind, levels in ALERT_SEVERITIES.items() for level in levels}

    def update(self, alerts: Iterable[Alert], now: float, unix_now: float) -> list[AlertChange]:
        """Apply one evaluation; returns the alerts that opened, changed their severity, or closed.

        An alert opens when its cause has lasted for its delay, and closes when the cause has been gone for as long, so
        that a condition shorter than the delay changes nothing. A change of severity must last as long, too. `now` is
        the monotonic clock, `unix_now` in seconds since 1970.
        """
        changes: list[AlertChange] = []
        current = {a.key: a for a in alerts}
        for key, severity in self._pending.keys() - {(k, a.severity) for k, a in current.items()}:
            del self._pending[key, severity]
        for key, alert in current.items():
            self._closing_since.pop(key, None)
            open_alert = self._open.get(key)
            if open_alert is not None and open_alert.severity == alert.severity:
                # The text may have changed, such as the free bytes of a disk.
                self._open[key] = replace(alert, since=open_alert.since)
                continue
            begun_at, since = self._pending.setdefault((key, alert.severity), (now, alert.since))
            if now - begun_at >= alert.delay_s:
                del self._pending[key, alert.severity]
                self._open[key] = replace(alert, since=since if open_alert is None else open_alert.since)
                changes.append(AlertChange(self._open[key]))
        for key in self._open.keys() - current.keys():
            if now - self._closing_since.setdefault(key, now) >= self._open[key].delay_s:
                del self._closing_since[key]
                changes.append(AlertChange(self._open.pop(key), unix_now))
        return changes
