"""Settings of alerts and of notifications about them: the table [alerts]."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import datetime
from email.headerregistry import Address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedprune.core.errors import ConfigError, shown
from fedprune_server.config.setting import check_settings, setting

OFF = "off"
PATHS = ("webhook_secret", "mail_password")
"""Keys that name files."""

_LEVELS = ("info", "warning", "critical")
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class AlertSettings:
    """Settings of alerts and notifications, `[alerts]`."""

    webhook: str = setting(
        OFF, "Where alerts are posted as JSON: `https://...` or `http://...`; `off` for nowhere.", "URL"
    )
    webhook_secret: Path | None = setting(
        None, "A file with a key, with which the header `X-Fedprune-Signature` proves that a post is this server's."
    )
    heartbeat: str = setting(
        OFF,
        "An address that is fetched once a minute while the server works, for a service that notices when that ends; "
        "`off` for none.",
    )
    mail_to: str = setting(OFF, "Recipients of alerts by e-mail, with commas; `off` for no mail.")
    mail_from: str = setting("fedprune@localhost", "The sender of these e-mails.")
    mail_server: str = setting(
        "smtp://localhost",
        "The relay: `smtp://host[:port]` (port 587) or `smtps://host[:port]` (TLS from the start, 465).",
    )
    mail_starttls: bool = setting(True, "Whether a relay at `smtp://` is used only over TLS.")
    mail_user: str = setting(OFF, "The name to log in with at the relay; `off` for no log-in.")
    mail_password: Path | None = setting(None, "A file with the password for that.")
    severity: str = setting(
        "warning", "The least severity that is notified: `info`, `warning` or `critical`.", choices=_LEVELS
    )
    quiet_hours: str = setting(
        OFF,
        "A time of the day, by the server's time zone, as `22:00-07:00`, in which only `quiet_severity` counts; `off` "
        "for none. What is still open afterwards is notified then.",
    )
    quiet_severity: str = setting("critical", "The least severity that is notified in quiet hours.", choices=_LEVELS)
    repeat_minutes: int = setting(
        240, "How often an open alert is notified again, in minutes; 0 for once.", within=(0, 100_000)
    )
    away_rounds: int = setting(
        2, "After how many rounds that ended without it a board that isn't connected is an alert; 0 for never.",
        within=(0, 10_000),
    )  # fmt: skip
    resolved: bool = setting(True, "Whether the end of an alert is notified, too.")

    def __post_init__(self) -> None:
        check_settings(self, ("alerts",))
        for name in ("webhook", "heartbeat"):
            _check_url(name, getattr(self, name))
        for name in PATHS:
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(("alerts", name), expected="a file that exists", got=shown(str(path)))
        if self.webhook_secret is not None and self.webhook == OFF:
            raise ConfigError(("alerts", "webhook_secret"), expected="a webhook as well", got="none")
        if (self.mail_password is None) != (self.mail_user == OFF):
            given = "mail_user" if self.mail_password is None else "mail_password"
            raise ConfigError(("alerts", given), expected="mail_user and mail_password, or neither", got="one of them")
        for name, address in (*(("mail_to", to) for to in self.recipients), ("mail_from", self.mail_from)):
            _check_address(name, address)
        _ = self.relay
        if self.quiet_hours != OFF and not _HOURS.fullmatch(self.quiet_hours):
            raise ConfigError(
                ("alerts", "quiet_hours"), expected=f"HH:MM-HH:MM, such as 22:00-07:00, or {OFF!r}",
                got=shown(self.quiet_hours),
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with paths that hold in every folder."""
        return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @property
    def recipients(self) -> tuple[str, ...]:
        return () if self.mail_to == OFF else tuple(a.strip() for a in self.mail_to.split(","))

    @property
    def relay(self) -> tuple[str, str, int]:
        scheme, host, port = _parts(self.mail_server)
        if scheme not in ("smtp", "smtps") or not host or port == 0 or self.mail_server.count("/") > 2:
            raise ConfigError(
                ("alerts", "mail_server"),
                expected="smtp://host[:port] or smtps://host[:port]",
                got=shown(self.mail_server),
            )
        return scheme, host, port or (587 if scheme == "smtp" else 465)

    def least(self, at: datetime) -> str:
        """The least severity that is notified at a local time."""
        found = _HOURS.fullmatch(self.quiet_hours)
        if found is None:
            return self.severity
        h1, m1, h2, m2 = map(int, found.groups())
        begins, ends, now = 60 * h1 + m1, 60 * h2 + m2, 60 * at.hour + at.minute
        quiet = begins <= now < ends if begins <= ends else now >= begins or now < ends
        return max(self.severity, self.quiet_severity, key=_LEVELS.index) if quiet else self.severity


def shown_url(url: str) -> str:
    """A URL's scheme, host and port alone: the user, the path and the query often hold secrets."""
    scheme, host, port = _parts(url)
    if url == OFF or not host:
        return OFF if url == OFF else "not a URL"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}/..."


def _check_url(name: str, url: str) -> None:
    scheme, host, port = _parts(url)
    fine = scheme in ("http", "https") and host and port != 0 and "@" not in url.partition("://")[2].partition("/")[0]
    if url != OFF and not (fine and url.isascii() and url.isprintable() and " " not in url and "#" not in url):
        raise ConfigError(
            ("alerts", name), expected=f"https://host[:port]/path or http://..., without a user, or {OFF!r}",
            got=shown(shown_url(url)),
        )  # fmt: skip


def _parts(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address; empty where the address is invalid, and 0 for an invalid port."""
    try:
        found = urlsplit(url)
        return found.scheme, found.hostname or "", found.port
    except ValueError:
        return "", "", 0


def _check_address(name: str, text: str) -> None:
    try:
        Address(addr_spec=text)
    except (ValueError, IndexError) as error:
        raise ConfigError(
            ("alerts", name),
            expected="an address such as ann@example.org" + ", several with commas" * (name == "mail_to"),
            got=shown(text),
        ) from error
