"""A board's settings at its first boot: name, user, SSH keys, wireless network."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass

from fedprune.core.errors import ConfigError, value_text
from fedprune.core.validation import check_pattern

_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_USER = re.compile(r"(?!(?:root|fedprune)$)[a-z_][a-z0-9_-]{0,30}")
_COUNTRY = re.compile(r"[A-Z]{2}")
# A key of WPA has 32 bytes, and a passphrase at most 63 characters: 64 hex digits can only be a key.
_WPA_KEY = re.compile(r"[0-9A-Fa-f]{64}")
_WPA_PASSPHRASE = re.compile(r"[\x20-\x7e]{8,63}")
_COMMENT = re.compile(r"[\x20-\x7e]{0,200}")
_SSH_KEY_KINDS = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
_MAX_SSH_KEYS = 20  # they become words of one shell command at the first boot


@dataclass(frozen=True)
class Wifi:
    """A wireless network. `key` is derived from the passphrase; without a `country` (ISO 3166) the radio stays off."""

    ssid: str
    key: str
    country: str
    hidden: bool = False

    @classmethod
    def from_passphrase(cls, ssid: str, passphrase: str, country: str, *, hidden: bool = False) -> Wifi:
        """A network of WPA2 or WPA3 with its passphrase, of 8 to 63 characters, or its key in 64 hex digits.

        Raises `ConfigError`, which doesn't show the passphrase.
        """
        raw = ssid.encode("utf-8", "surrogatepass")
        if not 1 <= len(raw) <= 32 or not ssid.isprintable():
            raise ConfigError("name of the wireless network", expected="1 to 32 printable bytes", got=value_text(ssid))
        check_pattern("--wifi-country, the country of the network", country, _COUNTRY, "two capital letters")
        if _WPA_KEY.fullmatch(passphrase):
            return cls(ssid, passphrase.lower(), country, hidden)
        if not _WPA_PASSPHRASE.fullmatch(passphrase):
            raise ConfigError(
                "passphrase of the wireless network",
                expected="8 to 63 printable ASCII characters",
                got=f"{len(passphrase)} characters",
            )
        # IEEE 802.11i, annex H.4: what wpa_passphrase computes.
        key = hashlib.pbkdf2_hmac("sha1", passphrase.encode("ascii"), raw, 4096, 32).hex()
        return cls(ssid, key, country, hidden)


@dataclass(frozen=True)
class FirstBoot:
    """A board's settings at its first boot. `user` logs in by `ssh_keys`, with sudo; None keeps the image's users."""

    hostname: str
    user: str | None = None
    ssh_keys: tuple[str, ...] = ()
    wifi: Wifi | None = None

    def __post_init__(self) -> None:
        check_pattern("host name (--hostname)", self.hostname, _HOST_NAME, "1 to 63 letters, digits and dashes")
        if bool(self.user) != bool(self.ssh_keys):
            raise ConfigError("user and SSH key", expected="both or neither", got=self.user or "a key alone")
        if self.user is not None:
            check_pattern("user", self.user, _USER, "small letters, digits, _ and -; not root or fedprune")


def parse_ssh_keys(text: str) -> tuple[str, ...]:
    """The public keys in a text such as `~/.ssh/id_ed25519.pub` or `authorized_keys`; otherwise `ConfigError`."""
    if "PRIVATE KEY" in text:
        raise ConfigError("SSH key", expected="the public one, which ends with .pub", got="a private key")
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not 1 <= len(keys) <= _MAX_SSH_KEYS:
        raise ConfigError("SSH keys", expected=f"1 to {_MAX_SSH_KEYS}", got=len(keys))
    for key in keys:
        kind, _, rest = key.partition(" ")
        body, _, comment = rest.partition(" ")
        if kind not in _SSH_KEY_KINDS or not _is_key(kind, body) or not _COMMENT.fullmatch(comment):
            raise ConfigError("SSH key", expected="a public key of OpenSSH without options", got=value_text(key))
    return keys


def _is_key(kind: str, body: str) -> bool:
    """Whether a key's body begins with its kind (RFC 4253, 6.6)."""
    try:
        raw = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        return False
    name = kind.encode("ascii")
    return len(raw) > 4 + len(name) and raw[: 4 + len(name)] == struct.pack(">I", len(name)) + name
