"""Notifications about alerts: by webhook, and by the services that Apprise knows (e-mail, chat, phone).

A thread of its own looks at the open alerts once a second and decides what is due; each channel sends on a thread of
its own, one message after the other, and tries again with growing pauses. The server's loop waits for none of them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from fedprune.core.errors import ConfigError, ExitCode, FedpruneError, MissingExtraError, error_reason
from fedprune.core.text import one_line
from fedprune_server.config.alert_settings import OFF, AlertSettings, shown_url
from fedprune_server.config.environment import file_text
from fedprune_server.monitoring.alerts import ALERT_LEVELS, INFO, Alert

log = logging.getLogger("fedprune.server")

OPENED, RESOLVED, TEST = "opened", "resolved", "test"

# Alerts that one message lists; it counts the others. Phones and chats cut longer texts.
MAX_ALERTS_LISTED = 20

# Messages that wait for a channel. Of more, the oldest is dropped: after hours without a network the latest matter.
MAX_WAITING_MESSAGES = 100

# Tries of a message, which take about an hour. Then the next one is tried, since a service may refuse this one alone,
# such as for its length.
MAX_TRIES = 20

_POLL_INTERVAL_S = 1.0
# Least pause between messages without a critical alert: a broker that fails opens many alerts within seconds, which
# come in one message.
_MIN_PAUSE_S = 30.0

_HEARTBEAT_INTERVAL_S = 60.0
_TIMEOUT_S = 10.0
# The first pause after a failure, which doubles, and the longest.
_FIRST_RETRY_S, _MAX_RETRY_S = 2.0, 300.0


class NotificationError(FedpruneError):
    """A message could not be delivered."""

    exit_code = ExitCode.NOTIFICATION


@dataclass(frozen=True)
class Message:
    """A notification about alerts, the most severe first. `event` is `opened`, `resolved` or `test`."""

    event: str
    at: float
    site: str
    alerts: Sequence[Alert]

    @property
    def title(self) -> str:
        first, further = self.alerts[0], len(self.alerts) - 1
        word = "resolved" if self.event == RESOLVED else first.severity
        return f"[fedprune {self.site}] {word}: {one_line(first.what, 300)}" + (
            f" (and {further} more)" if further else ""
        )

    @property
    def text(self) -> str:
        paragraphs = [
            f"{a.severity}: {a.what}\nsince {formatdate(a.since, localtime=True)}"
            + ("" if self.event == RESOLVED else f"\nwhy: {a.why}\nto do: {a.todo}")
            for a in self.alerts[:MAX_ALERTS_LISTED]
        ]
        further = len(self.alerts) - MAX_ALERTS_LISTED
        return "\n\n".join([*paragraphs, *([f"and {further} more"] if further > 0 else [])]) + "\n"

    def to_bytes(self) -> bytes:
        """The webhook's JSON (docs/observe.md#notifications)."""
        keys = ("kind", "severity", "since", "what", "why", "todo", "job", "device")
        body = {
            "version": 1, "event": self.event, "at": self.at, "site": self.site, "text": self.title,
            "count": len(self.alerts),
            "alerts": [{"id": a.key} | {k: getattr(a, k) for k in keys} for a in self.alerts[:MAX_ALERTS_LISTED]],
        }  # fmt: skip
        return json.dumps(body, sort_keys=True).encode()


class NotificationChannel(Protocol):
    """A channel of notifications."""

    name: str

    def send(self, message: Message) -> str:
        """Deliver a message; returns the other side's answer, or raises `NotificationError`."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: only the operator chooses the address."""


def call_address(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> str:
    """Ask an operator's address; returns the answer's status line, or raises `NotificationError`."""
    request = urllib.request.Request(url, data, {"User-Agent": "fedprune", **(headers or {})})  # noqa: S310 - checked
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_S) as answer:
            return f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        with error:
            raise NotificationError(f"{shown_url(url)} answered HTTP {error.code}") from error
    except Exception as error:  # OSError, ValueError or http.client.HTTPException, whatever it is called
        raise NotificationError(f"{shown_url(url)}: {type(error).__name__}: {error_reason(error)}") from error


class Webhook:
    """Posts messages as JSON, signed with a secret if there is one."""

    name = "webhook"

    def __init__(self, url: str, secret: bytes | None = None) -> None:
        self._url, self._secret = url, secret

    def send(self, message: Message) -> str:
        body, headers = message.to_bytes(), {"Content-Type": "application/json"}
        if self._secret is not None:
            headers["X-Fedprune-Signature"] = f"sha256={hmac.new(self._secret, body, hashlib.sha256).hexdigest()}"
        return call_address(self._url, body, headers)


class AppriseService:
    """A service that Apprise knows, by its address, which holds what is needed to log in.

    Raises:
        ConfigError: Apprise knows no such address; the error doesn't show it.
        MissingExtraError: Apprise is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import apprise
        except ImportError as error:
            raise MissingExtraError("[alerts] services needs apprise", extra="notify") from error
        # A failure's reason is in the result as well, and logs of Apprise may hold addresses with passwords.
        logging.getLogger("apprise").addHandler(logging.NullHandler())
        logging.getLogger("apprise").propagate = False
        self._apprise = apprise.Apprise(asset=apprise.AppriseAsset(app_id="fedprune", async_mode=False))
        if not self._apprise.add(url):
            scheme = url.partition("://")[0] if "://" in url else "no scheme"
            raise ConfigError(
                ("alerts", "services"), expected="addresses that Apprise knows, one a line", got=scheme[:20]
            )
        self.name = str(self._apprise[0].service_name)

    def send(self, message: Message) -> str:
        result = self._apprise.notify(body=message.text, title=message.title[:200], body_format="text")
        if not result:
            raise NotificationError(one_line("; ".join(str(entry.message) for entry in result.logs()), 300))
        return "taken"


def notification_channels(settings: AlertSettings) -> list[NotificationChannel]:
    """The configured channels. Raises `ConfigError` if a secret's file can't be used, and as `AppriseService` does."""
    webhooks: list[NotificationChannel] = []
    if settings.webhook != OFF:
        secret = _read_secret(settings.webhook_secret, "webhook_secret")
        webhooks.append(Webhook(settings.webhook, None if secret is None else secret.encode()))
    lines = (_read_secret(settings.services, "services") or "").splitlines()
    services = [AppriseService(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    if settings.services is not None and not services:
        raise ConfigError(("alerts", "services"), expected="a file with an address in it", got="none")
    return [*webhooks, *services]


def _read_secret(path: Path | None, name: str) -> str | None:
    return None if path is None else file_text(path, f"alerts.{name}").strip()


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
        """Messages that are due now.

        Args:
            now: The monotonic clock.
            unix_now: Seconds since 1970.
            last: Whether nothing can wait for a later message, because the server ends.
        """
        unnotified: list[Alert] = []
        for alert in open_alerts:
            notified = self._notified.get(alert.key)
            if notified is not None and notified.severity == alert.severity:
                self._notified[alert.key] = alert  # a new text alone is no message, but the alert's end will quote it
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
            Message(event, unix_now, self._site, tuple(sorted(alerts, key=lambda a: (-_rank(a), a.since))))
            for event, alerts in events
            if alerts
        ]
        self._last_sent_at = now if messages else self._last_sent_at
        return messages


def _rank(alert: Alert | None) -> int:
    return -1 if alert is None else ALERT_LEVELS.index(alert.severity)


class NotificationQueue:
    """A channel's queue of messages and its thread. The pause after a failure doubles with each further one."""

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
                if self._waiting and self._waiting[0] is message:  # else a full queue has dropped it meanwhile
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
    """Sends notifications of a server's alerts.

    Args:
        opened: Returns the open alerts; called on the notifier's thread.
        works: Whether the server's loop turns; called on the notifier's thread.
        notified: Alerts of which an earlier run sent a notification.
        clock: Seconds since 1970.

    Raises:
        ConfigError: A secret's file can't be used.
    """

    def __init__(
        self,
        settings: AlertSettings,
        site: str,
        opened: Callable[[], Sequence[Alert]],
        works: Callable[[], bool],
        notified: Iterable[Alert] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._open_alerts, self._is_working, self._clock = opened, works, clock
        self._heartbeat = settings.heartbeat
        self._queues = [NotificationQueue(channel) for channel in notification_channels(settings)]
        self._schedule = NotificationSchedule(settings, site, notified if self._queues else ())
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="fedprune-notifier", daemon=True)]
        if self._heartbeat != OFF:
            self._threads.append(threading.Thread(target=self._run_heartbeat, name="fedprune-heartbeat", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads[:1]:
            thread.join(_TIMEOUT_S)
        self._queue_messages(last=True)
        for outbox in self._queues:
            outbox.close(_TIMEOUT_S / 2)

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
            problem = self._send_heartbeat() if self._is_working() else ""
            if problem and not has_failed:
                log.warning("the heartbeat failed: %s", problem)
            has_failed = bool(problem)
            if self._stopping.wait(_HEARTBEAT_INTERVAL_S):
                return

    def _send_heartbeat(self) -> str:
        try:
            call_address(self._heartbeat)
        except NotificationError as error:
            return str(error)
        return ""


def test_message(site: str, at: float) -> Message:
    alert = Alert(
        "test", INFO, at, "this is a test: notifications of this server arrive", "nothing is wrong", "nothing"
    )
    return Message(TEST, at, site, (alert,))
