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
        self._begun: dict[tuple[str, str], tuple[float, float]] = {}  # by key and severity, before the delay has passed
        self._ended: dict[str, float] = {}  # open alerts whose cause has gone: since when, by key

    @property
    def open(self) -> list[Alert]:
        """All open alerts; may be called from any thread."""
        return list(self._open.values())

    @property
    def closing(self) -> frozenset[str]:
        """Keys of open alerts whose cause has gone, so that they close unless it comes again; may be called from any
        thread."""
        return frozenset(tuple(self._ended))

    @property
    def severities(self) -> frozenset[tuple[str, str]]:
        return frozenset((a.kind, a.severity) for a in self.open)

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Open alerts by kind and severity, including zeros; may be called from any thread."""
        counts = Counter((a.kind, a.severity) for a in self.open)
        return {
            (kind, severity): counts[kind, severity] for kind, levels in ALERT_SEVERITIES.items() for severity in levels
        }

    def update(self, alerts: Iterable[Alert], now: float, at: float) -> list[AlertChange]:
        """Apply one evaluation; returns the alerts that opened, changed their severity, or closed.

        An alert opens when its cause has lasted for its delay, and closes when the cause has been gone for as long, so
        that a condition shorter than the delay changes nothing. A change of severity must last as long, too.

        Args:
            now: The monotonic clock.
            at: Seconds since 1970.
        """
        changes: list[AlertChange] = []
        current = {a.key: a for a in alerts}
        for key, severity in self._begun.keys() - {(k, a.severity) for k, a in current.items()}:
            del self._begun[key, severity]
        for key, alert in current.items():
            self._ended.pop(key, None)
            open_alert = self._open.get(key)
            if open_alert is not None and open_alert.severity == alert.severity:
                # The text may have changed, such as the free bytes of a disk.
                self._open[key] = replace(alert, since=open_alert.since)
                continue
            begun_at, since = self._begun.setdefault((key, alert.severity), (now, alert.since))
            if now - begun_at >= alert.delay_s:
                del self._begun[key, alert.severity]
                self._open[key] = replace(alert, since=since if open_alert is None else open_alert.since)
                changes.append(AlertChange(self._open[key]))
        for key in self._open.keys() - current.keys():
            if now - self._ended.setdefault(key, now) >= self._open[key].delay_s:
                del self._ended[key]
                changes.append(AlertChange(self._open.pop(key), at))
        return changes
