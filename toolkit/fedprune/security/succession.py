"""Successions of a server's signing key: each key signs the one that replaces it.

A device that knows any earlier key follows the signatures to the present one. The earlier private keys aren't needed
for that, so that a server keeps the successions alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedprune.core.atomic_file import move
from fedprune.core.disk import storage_errors
from fedprune.core.errors import IdentityError, ProtocolError, StorageError, remedy
from fedprune.security.keys import KEY, SIGNATURE, SigningKey, VerifyingKey, transcript
from fedprune.wire.messages import MAX_SUCCESSIONS

LENGTH = 2 * (2 * KEY + SIGNATURE)
"""Hex digits of a succession."""

FILE = "successions.json"
"""File of a server's identity, next to its signing key."""

SUCCESSIONS = "successions"
"""File of a device's identity, next to the server's key: the fleet's name, then a line for each succession."""

NEW = ".new"
"""The suffix of the signing key's file where a successor waits for its succession to be written."""

_DOMAIN = "fedprune succession 1"


@dataclass(frozen=True)
class Succession:
    """A signing key's replacement, signed by the replaced key over the site and both keys."""

    before: VerifyingKey
    after: VerifyingKey
    signature: bytes

    @classmethod
    def make(cls, site: str, before: SigningKey, after: VerifyingKey) -> Succession:
        return cls(before.verifying, after, before.sign(_text(site, before.verifying, after)))

    @classmethod
    def from_hex(cls, text: str) -> Succession:
        """Read a succession as `hex` writes it; its signature is not verified. Raises `ProtocolError` if the text
        has another form."""
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if 2 * len(raw) != LENGTH or len(text) != LENGTH:
            raise ProtocolError("succession of a signing key", expected=f"{LENGTH} hex digits", got=len(text))
        return cls(VerifyingKey(raw[:KEY]), VerifyingKey(raw[KEY : 2 * KEY]), raw[2 * KEY :])

    @property
    def hex(self) -> str:
        """Both keys and the signature, as messages and files carry them."""
        return (self.before.raw + self.after.raw + self.signature).hex()


_Lineage = TypeVar("_Lineage", bound="Lineage")


@dataclass(frozen=True)
class Lineage:
    """A server's signing key, and how it replaced earlier ones (the oldest first): boards that know one of those follow
    it. The site is empty where the key replaced none."""

    key: SigningKey
    site: str = ""
    successions: tuple[Succession, ...] = ()

    @classmethod
    def load(cls: type[_Lineage], path: Path) -> _Lineage:
        """Read a signing key, with its successions where it is in its server's identity folder. Nothing is written.
        Raises `IdentityError` if a file is damaged, or the key is not the one that the successions end in."""
        site = path.parent / "site"
        if not site.exists():
            return cls(SigningKey.load(path))
        with storage_errors(f"can't read {site}"):
            name = site.read_text("utf-8", "replace").strip()
        successions = read_successions(path.parent, name)
        return cls(load_signing_key(path, successions, read_only=True), name if successions else "", successions)

    def includes(self, known: VerifyingKey) -> bool:
        """Whether a key is this one, or one that it replaced."""
        return follow(self.site, known, self.successions) == self.key.verifying


def follow(site: str, key: VerifyingKey, successions: Iterable[Succession]) -> VerifyingKey:
    """The key that a known key leads to by these successions, the oldest first; the known key itself where it was not
    replaced. Raises `SignatureError` if one on the way is not signed by the key that it replaces."""
    for succession in successions:
        if succession.before == key:
            key.verify(succession.signature, _text(site, succession.before, succession.after))
            key = succession.after
    return key


def read_successions(folder: Path, site: str) -> tuple[Succession, ...]:
    """The successions of a server's signing key, verified, the oldest first. Raises `IdentityError` if the file is
    damaged, or another site's."""
    path = folder / FILE
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, list) or not 1 <= len(body) <= MAX_SUCCESSIONS:
            raise ValueError
        found = tuple(Succession.from_hex(str(text)) for text in body)
        if follow(site, found[0].before, found) != found[-1].after:
            raise ValueError
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error
    except (ValueError, RecursionError, ProtocolError) as error:
        raise IdentityError(f"{path} is damaged", hint="Restore the backup of the identity folder.") from error
    return found


def load_signing_key(path: Path, successions: Sequence[Succession], *, read_only: bool = False) -> SigningKey:
    """A server's signing key; completes an interrupted rotation if its succession was written (unless `read_only`).
    Raises `IdentityError` if a file is missing or damaged, or the key is not the one that the successions end in."""
    key, new = SigningKey.load(path), path.with_name(path.name + NEW)
    if not successions or key.verifying == successions[-1].after:
        return key
    latest = successions[-1].after
    successor = SigningKey.load(new) if new.exists() else None
    if successor is None or successor.verifying != latest:
        raise IdentityError(
            f"{path} is not the key that {path.with_name(FILE)} ends in",
            expected=latest.fingerprint,
            got=key.verifying.fingerprint,
            hint="Restore both files from the same backup.",
        )
    if not read_only:
        move(new, path)
    return successor


def kept_successions(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The fleet's name and the successions, unverified, the oldest first, that a device's identity keeps; none before
    the first."""
    path = folder / SUCCESSIONS
    with storage_errors(f"can't read {path}"):
        site, *found = (path.read_text("utf-8", "replace") if path.exists() else "").split() or [""]
    return site, tuple(found)


def _text(site: str, before: VerifyingKey, after: VerifyingKey) -> bytes:
    return transcript(_DOMAIN, site, before.raw, after.raw)
