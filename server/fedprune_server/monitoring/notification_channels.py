"""The channels of notifications: a webhook, and the services that Apprise knows (e-mail, chat, phone)."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any, Protocol

from fedprune.core.errors import ConfigError, ExitCode, FedpruneError, MissingExtraError, error_reason
from fedprune.core.text import one_line
from fedprune_server.config.alert_settings import OFF, AlertSettings, shown_url
from fedprune_server.config.environment import file_text
from fedprune_server.monitoring.alerts import INFO, Alert

OPENED, RESOLVED, TEST = "opened", "resolved", "test"

# Alerts that one message lists; it counts the others. Phones and chats cut longer texts.
MAX_ALERTS_LISTED = 20

# Seconds that the other side has for its answer.
_TIMEOUT_S = 10.0


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
    """A way to deliver notifications."""

    name: str

    def send(self, message: Message) -> str:
        """Deliver a message; return the other side's answer, or raise `NotificationError`."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: only the operator chooses the address."""


def call_address(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> str:
    """Send a request to an operator's address; returns the answer's status, or raises `NotificationError`."""
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
    """A service that Apprise knows, by its address, which holds the password.

    Raises `MissingExtraError` without Apprise, and `ConfigError`, which hides the address, if Apprise can't use it.
    """

    def __init__(self, url: str) -> None:
        try:
            import apprise
        except ImportError as error:
            raise MissingExtraError("[alerts] services needs apprise", extra="notify") from error
        # The reason of a failure is in the result as well, and logs of Apprise may hold addresses with passwords.
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
    """The configured channels. Raises `ConfigError` if a secret's file or an address in it can't be used."""
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


def test_message(site: str, at: float) -> Message:
    alert = Alert(
        "test", INFO, at, "this is a test: notifications of this server arrive", "nothing is wrong", "nothing"
    )
    return Message(TEST, at, site, (alert,))
