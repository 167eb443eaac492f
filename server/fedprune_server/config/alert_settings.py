"""Settings of alerts and of notifications about them: the table [alerts]."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedprune.core.errors import ConfigError, value_text
from fedprune_server.config.setting import check_settings, setting

OFF = "off"
# Paths are made absolute when settings are stored: the next start may have another working folder.
PATH_KEYS = ("webhook_secret", "services")


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
        "An address that is fetched once a minute while the server works, for a service that reports when the calls "
        "stop; `off` for none.",
    )
    services: Path | None = setting(
        None,
        "A file with addresses of further services to notify (e-mail, chats, phones), one per line, in the form of "
        "[Apprise](https://github.com/caronc/apprise/wiki), such as `mailtos://...`. They contain passwords.",
    )
    severity: str = setting(
        "warning",
        "The lowest severity that is notified: `info`, `warning` or `critical`.",
        choices=("info", "warning", "critical"),
    )
    away_rounds: int = setting(
        2, "How many rounds end without a disconnected board before that is an alert; 0 for never.",
        within=(0, 10_000),
    )  # fmt: skip
    resolved: bool = setting(True, "Whether the end of an alert is notified, too.")

    def __post_init__(self) -> None:
        check_settings(self, ("alerts",))
        for name in ("webhook", "heartbeat"):
            _check_url(name, getattr(self, name))
        for name in PATH_KEYS:
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(("alerts", name), expected="a file that exists", got=value_text(str(path)))
        if self.webhook_secret is not None and self.webhook == OFF:
            raise ConfigError(("alerts", "webhook_secret"), expected="a webhook as well", got="none")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON, with absolute paths."""
        return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def shown_url(url: str) -> str:
    """Only a URL's scheme, host and port: the user, the path and the query often hold secrets."""
    scheme, host, port = _url_parts(url)
    if url == OFF or not host:
        return OFF if url == OFF else "not a URL"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}/..."


def _check_url(name: str, url: str) -> None:
    scheme, host, port = _url_parts(url)
    # A user in the address would be stored with the settings, and `shown_url` couldn't tell it from the host's name.
    fine = scheme in ("http", "https") and host and port != 0 and "@" not in url.partition("://")[2].partition("/")[0]
    if url != OFF and not (fine and url.isascii() and url.isprintable() and " " not in url and "#" not in url):
        raise ConfigError(
            ("alerts", name), expected=f"https://host[:port]/path or http://..., without a user, or {OFF!r}",
            got=value_text(shown_url(url)),
        )  # fmt: skip


def _url_parts(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address; empty where the address is invalid, and 0 for an invalid port."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        return "", "", 0
