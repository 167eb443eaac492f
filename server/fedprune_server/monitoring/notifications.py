"""Sends notifications when a server's alerts open or close: which message is due, and its delivery with retries.

    open alerts  >  NotificationSchedule: due messages, once a second  >  NotificationQueue of each channel

The notifier and each queue have a thread of their own, so that the server's loop waits for none of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from fedprune.core.errors import error_reason
from fedprune_server.config.alert_settings import OFF, AlertSettings
from fedprune_server.monitoring.alerts import ALERT_LEVELS, Alert, fold_alerts
from fedprune_server.monitoring.notification_channels import (
    OPENED,
    RESOLVED,
    Message,
    NotificationChannel,
    NotificationError,
    call_address,
    notification_channels,
)

log = logging.getLogger("fedprune.server")

# Messages that wait for a channel. Of more, the oldest is dropped: after hours without a network the latest matter.
MAX_WAITING_MESSAGES = 100

# Tries of a message, which take about an hour. Then the next message is tried: a service may refuse only this one, such
# as for its length.
MAX_TRIES = 20

_POLL_INTERVAL_S = 1.0
# The shortest pause between messages without a critical alert: a broker that fails opens many alerts within seconds,
# which then come in one message.
_MIN_PAUSE_S = 30.0

_HEARTBEAT_INTERVAL_S = 60.0

# How long the server's end waits for messages under way.
_END_TIMEOUT_S = 10.0

# The first pause after a failure, which doubles, and the longest.
_FIRST_RETRY_S, _MAX_RETRY_S = 2.0, 300.0


class NotificationSchedule:
    """Decides which messages are due, given the alerts of which an earlier run sent a notification."""

    def __init__(self, settings: AlertSettings, site: str, notified: Iterable[Alert] = ()) -> None:
        self._settings, self._site = settings, site
        self._notified: dict[str, Alert] = {a.key: a for a in notified}
        self._last_sent_at: float | None = None

    @property
    def notified_alerts(self) -> list[Alert]:
        """Alerts whose opening was notified, but not their end; may be called from any thread."""
        return list(self._notified.values())

    def due_messages(
        self, open_alerts: Sequence[Alert], now: float, unix_now: float, *, last: bool = False
    ) -> list[Message]:
        """Messages that are due now, by the monotonic clock; with `last` none may wait, because the server ends."""
        unnotified: list[Alert] = []
        for alert in open_alerts:
            notified = self._notified.get(alert.key)
            if notified is not None and notified.severity == alert.severity:
                self._notified[alert.key] = alert  # a new text causes no message, but the alert's end will quote it
            elif _rank(alert) >= ALERT_LEVELS.index(self._settings.severity) and _rank(alert) > _rank(notified):
                unnotified.append(alert)
        resolved = [self._notified[key] for key in self._notified.keys() - {a.key for a in open_alerts}]
        is_urgent = any(_rank(alert) == len(ALERT_LEVELS) - 1 for alert in (*unnotified, *resolved))
        if not (is_urgent or last) and self._last_sent_at is not None and now - self._last_sent_at < _MIN_PAUSE_S:
            return []
        self._notified |= {alert.key: alert for alert in unnotified}
        for alert in resolved:
            del self._notified[alert.key]
        events = [(OPENED, unnotified), (RESOLVED, resolved if self._settings.resolved else [])]
        messages = [
            Message(event, unix_now, self._site, tuple(sorted(fold_alerts(alerts), key=lambda a: (-_rank(a), a.since))))
            for event, alerts in events
            if alerts
        ]
        self._last_sent_at = now if messages else self._last_sent_at
        return messages


def _rank(alert: Alert | None) -> int:
    return -1 if alert is None else ALERT_LEVELS.index(alert.severity)


class NotificationQueue:
    """A channel's queue of messages, and the thread that sends them. The pause after a failure doubles each time."""

    def __init__(self, channel: NotificationChannel, pause_s: float = _FIRST_RETRY_S) -> None:
        self._channel, self._pause_s = channel, pause_s
        self._waiting: deque[Message] = deque(maxlen=MAX_WAITING_MESSAGES)
        self._has_messages, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fedprune-{channel.name}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Send a message soon, without waiting."""
        if len(self._waiting) == MAX_WAITING_MESSAGES:
            text = "a notification is dropped: %d others wait for the %s"
            log.warning(text, MAX_WAITING_MESSAGES, self._channel.name)
        self._waiting.append(message)
        self._has_messages.set()

    def close(self, patience_s: float) -> None:
        self._stopping.set()
        self._has_messages.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        while True:
            self._has_messages.wait()
            self._has_messages.clear()
            while self._waiting:
                message = self._waiting[0]
                if not self._deliver(message):
                    return
                if self._waiting and self._waiting[0] is message:  # a full queue may have dropped it meanwhile
                    self._waiting.popleft()
            if self._stopping.is_set():
                return

    def _deliver(self, message: Message) -> bool:
        """Try to send a message until it is delivered, or given up because others wait. False if the server ends."""
        pause = self._pause_s
        for failures in count():
            try:
                self._channel.send(message)
                return True
            except Exception as error:  # noqa: BLE001, PERF203 - it must not end the thread
                if not failures:
                    cause = error if isinstance(error, NotificationError) else f"{type(error).__name__}: {error}"
                    log.warning("a notification by %s failed: %s", self._channel.name, cause)
                if failures >= MAX_TRIES - 1 and len(self._waiting) > 1:
                    break
                if self._stopping.wait(pause):
                    return False
                pause = min(_MAX_RETRY_S, 2 * pause)
        log.warning("a notification by %s is given up after %d tries: others wait", self._channel.name, failures + 1)
        return True


class Notifier:
    """Sends notifications of a server's alerts, and the heartbeat, which tells another machine that the loop works.
    Raises `ConfigError` if a secret's file can't be used.

    Args:
        open_alerts: Returns the open alerts; called on the notifier's thread.
        is_working: Whether the server's loop works; called on the notifier's thread.
        notified: Alerts of which an earlier run sent a notification.
    """

    def __init__(
        self,
        settings: AlertSettings,
        site: str,
        open_alerts: Callable[[], Sequence[Alert]],
        is_working: Callable[[], bool],
        notified: Iterable[Alert] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._open_alerts, self._is_working, self._clock = open_alerts, is_working, clock
        self._heartbeat = settings.heartbeat
        self._queues = [NotificationQueue(channel) for channel in notification_channels(settings)]
        self._schedule = NotificationSchedule(settings, site, notified if self._queues else ())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedprune-notifier", daemon=True)
        self._thread.start()
        if self._heartbeat != OFF:
            threading.Thread(target=self._run_heartbeat, name="fedprune-heartbeat", daemon=True).start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(_END_TIMEOUT_S)
        self._queue_messages(last=True)
        for outbox in self._queues:
            outbox.close(_END_TIMEOUT_S / 2)

    def notified_alerts(self) -> list[Alert]:
        """Alerts whose opening was notified, but not their end; may be called from any thread."""
        return self._schedule.notified_alerts

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_INTERVAL_S):
            self._queue_messages()

    def _queue_messages(self, *, last: bool = False) -> None:
        if not self._queues:
            return  # an alert that opens now is sent once a channel is set up
        try:
            messages = self._schedule.due_messages(self._open_alerts(), time.monotonic(), self._clock(), last=last)
        except Exception as error:  # noqa: BLE001 - it must not end the thread
            log.error("notifications can't be worked out: %s: %s", type(error).__name__, error_reason(error))
            self._stopping.wait(_HEARTBEAT_INTERVAL_S)
            return
        for message in messages:
            for outbox in self._queues:
                outbox.put(message)

    def _run_heartbeat(self) -> None:
        has_failed = False
        while True:
            try:
                if self._is_working():
                    call_address(self._heartbeat)
                has_failed = False
            except NotificationError as error:
                if not has_failed:
                    log.warning("the heartbeat failed: %s", error)
                has_failed = True
            if self._stopping.wait(_HEARTBEAT_INTERVAL_S):
                return
