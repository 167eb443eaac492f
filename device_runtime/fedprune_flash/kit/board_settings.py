"""A board's settings: server, site, name, data, and the authority that it trusts.

They are stored on a memory card that anyone may read, so that they contain no secret. A claim, which is good for one
enrollment, is a file of its own, which the installer deletes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedprune.core.errors import ConfigError, JoinError, value_text
from fedprune.core.validation import check_bool
from fedprune.security.join_claim import JoinClaim
from fedprune.security.tls import check_local_host
from fedprune.wire.topics import check_device, check_topic_name
from fedprune.wire.urls import BrokerUrl
from fedprune_flash.kit.unit import DEFAULT_SAMPLES_PATH, HIDDEN_FOLDERS

MAX_AUTHORITIES_BYTES = 256 * 1024  # bytes: room for some hundred certificates

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
_URL = re.compile(rf"mqtts?://{_HOST}(?::[0-9]{{1,5}})?")
_PATH = re.compile(r"/[A-Za-z0-9_.@/-]{1,200}")
_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,150}:[A-Za-z_][A-Za-z0-9_]{0,60}")
_PRIVATE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")


@dataclass(frozen=True)
class BoardSettings:
    """The settings of a board.

    `server` is `mqtts://host[:port]` without user and password; `mqtt://` is for trials on this machine alone. `data`
    is an absolute path on the board, or `package.module:function`. `authority`: whether the kit brings certificates
    of other authorities of the broker. `join` is where the board joins, if not at the port after the broker's. Raises
    `ConfigError`.
    """

    server: str
    device: str
    site: str = "default"
    data: str = DEFAULT_SAMPLES_PATH
    authority: bool = False
    join: str = ""

    def __post_init__(self) -> None:
        _check_server("server", self.server)
        if self.join != "":
            _check_server("join", self.join)
        check_device(self.device, error=ConfigError)
        check_topic_name(self.site, "site", error=ConfigError)
        if not isinstance(self.data, str) or not (
            (_PATH.fullmatch(self.data) and ".." not in self.data.split("/")) or _FUNCTION.fullmatch(self.data)
        ):
            raise ConfigError(
                "data of the board", expected="an absolute path or package.module:function", got=value_text(self.data)
            )
        if hidden := _hidden_folder(self.data):
            raise ConfigError(
                "data of the board",
                expected="a path that its service sees",
                got=f"one in {hidden}, which is hidden from it",
                hint=f"Take another one, such as {DEFAULT_SAMPLES_PATH}.",
            )
        check_bool("authority", self.authority)
        if self.authority and not self.server.startswith("mqtts://"):
            raise ConfigError(
                "a certificate for a server without TLS", expected="mqtts://", got=value_text(self.server)
            )


def check_claim(text: str, device: str) -> str:
    """Check and normalise a one-time claim; raises `ConfigError` if the text is no claim for this device, or a private
    key."""
    if _PRIVATE.search(text):
        raise ConfigError(
            "claim", expected="a one-time claim", got="a private key", hint="Keys are made on the board and stay there."
        )
    try:
        return JoinClaim.parse(text, device=device).text
    except JoinError as error:
        hint = error.hint or "`fedprune-server claim` prints one. $FEDPRUNE_CLAIM is the claim itself."
        raise ConfigError(error.what, expected=error.expected, got=error.got, hint=hint) from error


def check_authorities(raw: bytes) -> bytes:
    """Check certificates of authorities in PEM form, and drop anything else in the file; otherwise `ConfigError`."""
    if len(raw) > MAX_AUTHORITIES_BYTES:
        raise ConfigError("certificate file", expected=f"at most {MAX_AUTHORITIES_BYTES} bytes", got=len(raw))
    if _PRIVATE.search(raw.decode("ascii", "replace")):
        raise ConfigError("certificate file", expected="certificates alone", got="a private key among them")
    try:
        certificates = x509.load_pem_x509_certificates(raw)
    except ValueError as error:
        raise ConfigError("certificate file", expected="certificates in PEM form", got=value_text(raw[:40])) from error
    return b"".join(c.public_bytes(Encoding.PEM) for c in certificates)


def _check_server(name: str, value: object) -> None:
    # The URL becomes a line of an environment file: characters such as a line break are refused, too.
    if not isinstance(value, str) or "@" in value or not _URL.fullmatch(value):
        raise ConfigError(
            name,
            expected="mqtts://host[:port], without user and password",
            got="a user" if isinstance(value, str) and "@" in value else value_text(value),  # a password is not shown
            hint="A card can be read by anybody, and a board needs no password: it has a certificate once it has "
            "joined.",
        )
    url = BrokerUrl.parse(value)
    if not url.tls:
        check_local_host(url.host)


def _hidden_folder(data: str) -> str:
    """The folder hidden from the service that contains this path; empty if it is visible."""
    path_parts = tuple(name for name in data.split("/") if name not in ("", ".")) if data.startswith("/") else ()
    return next((f for f in HIDDEN_FOLDERS if path_parts[: f.count("/")] == tuple(f.split("/")[1:])), "")
