"""What an operator should know: begun when it is so, over when it isn't any more."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping

from fedprune.wire.fields import one_line
from fedprune_server.console.log_words import AlertNews

SEVERITY = {
    "broker": "critical",
    "quarantine": "warning",
    "waiting": "info",
    "rollout": "warning",
    "rollout_paused": "info",
}
"""The kinds of alerts, and how bad each is."""

MOST = 500
"""Alerts of a kind that stand at the same time; more of them say nothing new."""

_NEWS = 4 * MOST
"""What was raised or is over and nobody has asked for: of more, the oldest is let go."""


class AlertBook:
    """The alerts that stand."""

    def __init__(self) -> None:
        self._standing: dict[str, AlertNews] = {}
        self._kinds: Counter[str] = Counter()
        self._news: deque[AlertNews] = deque(maxlen=_NEWS)

    @property
    def standing(self) -> list[AlertNews]:
        """All that stand."""
        return list(self._standing.values())

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many stand of each kind and severity, none of them left out; may be asked from any thread."""
        standing = Counter(alert.alert for alert in self.standing)
        return {(kind, severity): standing[kind] for kind, severity in SEVERITY.items()}

    def raised(self, kind: str, text: str, now: float, *, device: str | None = None, job: str | None = None) -> None:
        """Something is so; said again, it changes nothing."""
        name = f"{kind}:{job or ''}:{device or ''}"
        if name in self._standing or self._kinds[kind] >= MOST:  # strangers that wait hide nothing worse
            return
        alert = AlertNews(f"{name}@{now:.0f}"[:128], now, kind, SEVERITY[kind], device, job, one_line(text, 1000))
        self._standing[name] = alert
        self._kinds[kind] += 1
        self._news.append(alert)

    def over(self, kind: str, now: float, *, device: str | None = None, job: str | None = None) -> None:
        """It isn't so any more, if it was."""
        self._end(f"{kind}:{job or ''}:{device or ''}", now)

    def only(self, kind: str, devices: Collection[str], now: float) -> None:
        """Of a kind only these devices' stand; the others' are over."""
        for name, alert in list(self._standing.items()):
            if alert.alert == kind and alert.device not in devices:
                self._end(name, now)

    def news(self) -> list[AlertNews]:
        """What was raised and what is over since the last call."""
        found = list(self._news)
        self._news.clear()
        return found

    def _end(self, name: str, now: float) -> None:
        alert = self._standing.pop(name, None)
        if alert is not None:
            self._kinds[alert.alert] -= 1
            self._news.append(
                AlertNews(alert.id, alert.at, alert.alert, alert.severity, alert.device, alert.job, alert.text, now)
            )
