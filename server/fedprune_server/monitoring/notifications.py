"""Notifications about alerts, by webhook and by e-mail.

A thread of its own looks at the open alerts once a second and decides what is due; each channel sends on a thread of
its own, one message after the other, and tries again with growing pauses. The server's loop waits for none of them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import smtplib
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any, Protocol

from fedprune.core.errors import ExitCode, FedpruneError, reason
from fedprune.core.text import one_line
from fedprune_server.config.alert_settings import OFF, AlertSettings, shown_url
from fedprune_server.config.environment import file_text
from fedprune_server.monitoring.alerts import INFO, SEVERITIES, Alert

log = logging.getLogger("fedprune.server")

OPENED, REPEATED, RESOLVED, TEST = "opened", "repeated", "resolved", "test"

MOST = 20
"""Alerts that one message lists; it counts the others."""

KEPT = 100
"""Messages that wait for a channel; of more, the oldest is dropped."""

_LOOK_S = 1.0
_TOGETHER_S = 30.0
"""Messages without a critical alert have this pause between them, and then speak of all that has come."""

_BEAT_S = 60.0
_TIMEOUT_S = 10.0
_PAUSE_S, _LONGEST_S = 2.0, 300.0


class NotificationError(FedpruneError):
    """A message could not be delivered; if `lasting`, another try would fail alike."""

    exit_code = ExitCode.NOTIFICATION

    def __init__(self, what: str, *, lasting: bool = False) -> None:
        super().__init__(what)
        self.lasting = lasting


@dataclass(frozen=True)
class Message:
    """A notification about alerts, the most severe first. `event` is `opened`, `repeated`, `resolved` or `test`."""

    event: str
    at: float
    site: str
    alerts: Sequence[Alert]

    @property
    def title(self) -> str:
        first, more = self.alerts[0], len(self.alerts) - 1
        word = {REPEATED: f"still {first.severity}", RESOLVED: "resolved"}.get(self.event, first.severity)
        return f"[fedprune {self.site}] {word}: {one_line(first.what, 300)}" + (f" (and {more} more)" if more else "")

    @property
    def text(self) -> str:
        parts = [
            f"{a.severity}: {a.what}\nsince {formatdate(a.since, localtime=True)}"
            + ("" if self.event == RESOLVED else f"\nwhy: {a.why}\nto do: {a.todo}")
            for a in self.alerts[:MOST]
        ]
        more = len(self.alerts) - MOST
        return "\n\n".join([*parts, *([f"and {more} more"] if more > 0 else [])]) + "\n"

    def to_bytes(self) -> bytes:
        """The webhook's JSON (docs/observe.md#notifications)."""
        keys = ("kind", "severity", "since", "what", "why", "todo", "job", "device")
        body = {
            "version": 1, "event": self.event, "at": self.at, "site": self.site, "text": self.title,
            "count": len(self.alerts),
            "alerts": [{"id": a.key} | {k: getattr(a, k) for k in keys} for a in self.alerts[:MOST]],
        }  # fmt: skip
        return json.dumps(body, sort_keys=True).encode()


class Channel(Protocol):
    """A channel of notifications."""

    name: str

    def send(self, message: Message) -> str:
        """Deliver a message; returns the other side's answer, or raises `NotificationError`."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: only the operator chooses the address."""


def fetch(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> str:
    """Ask an operator's address; returns the answer's status line, or raises `NotificationError`."""
    request = urllib.request.Request(url, data, {"User-Agent": "fedprune", **(headers or {})})  # noqa: S310 - checked
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_S) as answer:
            return f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        with error:
            lasting = error.code < 500 and error.code not in (408, 425, 429)
            raise NotificationError(f"{shown_url(url)} answered HTTP {error.code}", lasting=lasting) from error
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise NotificationError(f"{shown_url(url)}: {reason(error)}") from error
    except Exception as error:  # http.client.HTTPException, whatever it is called
        raise NotificationError(f"{shown_url(url)}: {type(error).__name__}: {reason(error)}") from error


class Webhook:
    """Posts messages as JSON, signed with a secret if there is one."""

    name = "webhook"

    def __init__(self, url: str, secret: bytes | None = None) -> None:
        self._url, self._secret = url, secret

    def send(self, message: Message) -> str:
        body, headers = message.to_bytes(), {"Content-Type": "application/json"}
        if self._secret is not None:
            headers["X-Fedprune-Signature"] = f"sha256={hmac.new(self._secret, body, hashlib.sha256).hexdigest()}"
        return fetch(self._url, body, headers)


class Mail:
    """Sends messages through a relay, logging in if there is a password."""

    name = "e-mail"

    def __init__(
        self, settings: AlertSettings, password: str | None = None, context: ssl.SSLContext | None = None
    ) -> None:
        self._settings, self._password, self._context = settings, password, context

    def send(self, message: Message) -> str:
        settings = self._settings
        mail = EmailMessage()
        mail["Subject"], mail["From"], mail["To"] = message.title[:200], settings.mail_from, settings.recipients
        mail["Date"] = formatdate(message.at)
        mail["Message-ID"] = make_msgid("fedprune", settings.mail_from.rpartition("@")[2])
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(message.text)
        scheme, host, port = settings.relay
        try:
            with self._connected(scheme, host, port) as relay:
                if self._password is not None:
                    relay.login(settings.mail_user, self._password)
                refused = relay.send_message(mail)
        except smtplib.SMTPResponseException as error:
            said = error.smtp_error.decode(errors="replace") if isinstance(error.smtp_error, bytes) else "?"
            lasting = error.smtp_code >= 500
            raise NotificationError(
                f"{host}:{port} answered {error.smtp_code} {one_line(said, 200)}", lasting=lasting
            ) from error
        except (smtplib.SMTPException, OSError) as error:
            lasting = isinstance(error, (smtplib.SMTPNotSupportedError, ssl.SSLCertVerificationError))
            raise NotificationError(f"{host}:{port}: {reason(error)}", lasting=lasting) from error
        return f"taken by {host}:{port}" + (f", but not for {', '.join(refused)}" if refused else "")

    def _connected(self, scheme: str, host: str, port: int) -> smtplib.SMTP:
        context = self._context or ssl.create_default_context()
        if scheme == "smtps":
            return smtplib.SMTP_SSL(host, port, timeout=_TIMEOUT_S, context=context)
        relay = smtplib.SMTP(host, port, timeout=_TIMEOUT_S)
        if self._settings.mail_starttls:
            try:
                relay.starttls(context=context)
            except BaseException:
                relay.close()
                raise
        return relay


def channels(settings: AlertSettings) -> list[Channel]:
    """The configured channels; raises `ConfigError` if a secret's file can't be used."""
    found: list[Channel] = []
    if settings.webhook != OFF:
        secret = _secret(settings.webhook_secret, "webhook_secret")
        found.append(Webhook(settings.webhook, None if secret is None else secret.encode()))
    if settings.recipients:
        found.append(Mail(settings, _secret(settings.mail_password, "mail_password")))
    return found


def _secret(path: Path | None, name: str) -> str | None:
    return None if path is None else file_text(path, f"alerts.{name}").strip()


class NotificationSchedule:
    """Decides which messages are due, given the alerts of which an earlier run sent a notification."""

    def __init__(self, settings: AlertSettings, site: str, notified: Iterable[Alert] = ()) -> None:
        self._settings, self._site = settings, site
        self._notified: dict[str, tuple[Alert, float | None]] = {a.key: (a, None) for a in notified}
        self._last: float | None = None

    @property
    def notified(self) -> list[Alert]:
        """Alerts whose opening was notified, but not their end; may be called from any thread."""
        return [alert for alert, _ in list(self._notified.values())]

    def messages(self, opened: Sequence[Alert], now: float, at: float, *, last: bool = False) -> list[Message]:
        """Messages that are due now.

        Args:
            now: The monotonic clock.
            at: Seconds since 1970.
            last: Whether nothing can wait for a later message, because the server ends.
        """
        least = SEVERITIES.index(self._settings.least(datetime.fromtimestamp(at)))
        held = {a.key: a for a in opened}
        again_s = 60.0 * self._settings.repeat_minutes
        by_event: dict[str, list[Alert]] = {OPENED: [], REPEATED: [], RESOLVED: []}
        for key, alert in held.items():
            before, notified_at = self._notified.get(key, (None, None))
            if before is not None and before.severity == alert.severity:
                self._notified[key] = alert, notified_at  # a new text is no news, but its end is told in it
            if SEVERITIES.index(alert.severity) < least:
                continue
            if before is None or SEVERITIES.index(alert.severity) > SEVERITIES.index(before.severity):
                by_event[OPENED].append(alert)
            elif notified_at is None:  # by an earlier run
                self._notified[key] = alert, now
            elif again_s and now - notified_at >= again_s:
                by_event[REPEATED].append(alert)
        for key in self._notified.keys() - held.keys():
            alert = self._notified[key][0]
            if SEVERITIES.index(alert.severity) >= least:
                by_event[RESOLVED].append(alert)
        urgent = any(a.severity == SEVERITIES[-1] for alerts in by_event.values() for a in alerts)
        if not (urgent or last) and self._last is not None and now - self._last < _TOGETHER_S:
            return []
        found = []
        for event, alerts in by_event.items():
            for alert in alerts:
                if event == RESOLVED:
                    del self._notified[alert.key]
                else:
                    self._notified[alert.key] = alert, now
            if alerts and (event != RESOLVED or self._settings.resolved):
                alerts.sort(key=lambda a: (-SEVERITIES.index(a.severity), a.since))
                found.append(Message(event, at, self._site, tuple(alerts)))
        self._last = now if found else self._last
        return found


class Outbox:
    """A channel's queue of messages and its thread. The pause after a failure doubles with each further one."""

    def __init__(self, channel: Channel, pause_s: float = _PAUSE_S) -> None:
        self._channel, self._pause_s = channel, pause_s
        self._waiting: deque[Message] = deque(maxlen=KEPT)
        self._some, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fedprune-{channel.name}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Send a message soon, without waiting."""
        if len(self._waiting) == KEPT:
            log.warning("a notification is dropped: %d others wait for the %s", KEPT, self._channel.name)
        self._waiting.append(message)
        self._some.set()

    def close(self, patience_s: float) -> None:
        self._over.set()
        self._some.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        pause, complained = self._pause_s, False
        while True:
            self._some.wait()
            self._some.clear()
            while self._waiting:
                message = self._waiting[0]
                try:
                    self._channel.send(message)
                except NotificationError as error:
                    if not complained:
                        log.warning("a notification by %s failed: %s", self._channel.name, error)
                    complained = True
                    if not error.lasting:
                        if self._over.wait(pause):
                            return
                        pause = min(_LONGEST_S, 2 * pause)
                        continue
                except Exception as error:  # noqa: BLE001 - it must not end the thread
                    log.error("a notification by %s failed: %s: %s", self._channel.name, type(error).__name__, error)
                else:
                    pause, complained = self._pause_s, False
                if self._waiting and self._waiting[0] is message:  # else a full queue has dropped it
                    self._waiting.popleft()
            if self._over.is_set():
                return


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
        self._opened, self._works, self._clock = opened, works, clock
        self._heartbeat = settings.heartbeat
        self._outboxes = [Outbox(channel) for channel in channels(settings)]
        self._due = NotificationSchedule(settings, site, notified if self._outboxes else ())
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._look, name="fedprune-notifier", daemon=True)]
        if self._heartbeat != OFF:
            self._threads.append(threading.Thread(target=self._beat, name="fedprune-heartbeat", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads[:1]:
            thread.join(_TIMEOUT_S)
        self._pass_on(last=True)
        for outbox in self._outboxes:
            outbox.close(_TIMEOUT_S / 2)

    def notified(self) -> list[Alert]:
        """Alerts whose opening was notified, but not their end; may be called from any thread."""
        return self._due.notified

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            self._pass_on()

    def _pass_on(self, *, last: bool = False) -> None:
        if not self._outboxes:
            return  # an alert that opens now is sent once a channel is set up
        try:
            messages = self._due.messages(self._opened(), time.monotonic(), self._clock(), last=last)
        except Exception as error:  # noqa: BLE001 - it must not end the thread
            log.error("notifications can't be worked out: %s: %s", type(error).__name__, reason(error))
            self._over.wait(_BEAT_S)
            return
        for message in messages:
            for outbox in self._outboxes:
                outbox.put(message)

    def _beat(self) -> None:
        failed = False
        while True:
            why = self._beaten() if self._works() else ""
            if why and not failed:
                log.warning("the heartbeat failed: %s", why)
            failed = bool(why)
            if self._over.wait(_BEAT_S):
                return

    def _beaten(self) -> str:
        try:
            fetch(self._heartbeat)
        except NotificationError as error:
            return str(error)
        return ""


def trial(site: str, at: float) -> Message:
    alert = Alert(
        "test", INFO, at, "this is a test: notifications of this server arrive", "nothing is wrong", "nothing"
    )
    return Message(TEST, at, site, (alert,))
