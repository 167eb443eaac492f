"""A server's identity: its authority, its keys, and whom it has let in. `<state>/identity`, mode 0700.

    authority.key, authority.pem, register.jsonl, crl.pem    the certificate authority (`fedprune.trust.authority`)
    signing.key     what the server signs its messages with
    epoch           its latest epoch
    server.key, server.pem    what it connects to the broker with
    identity.db     claims, devices and answers (`fedprune_server.identity_store`)
    site            the site's name; written last, so that a folder with it is whole

Whoever has this folder is the server: back it up, and keep it to yourself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedprune.disk import write_whole
from fedprune.errors import IdentityError, ProtocolError, StorageError, remedy
from fedprune.trust.authority import CERTIFICATE, SERVER, Authority
from fedprune.trust.certificates import make_request, make_tls_key, save_tls_key
from fedprune.trust.claim import Claim
from fedprune.trust.epoch import EpochFile
from fedprune.trust.keys import SigningKey
from fedprune.trust.tls import PinnedContext, pinned_context
from fedprune.wire.topics import check_device, check_name
from fedprune_server.identity_store import IdentityStore

FOLDER = "identity"
_SIGNING, _EPOCH, _KEY, _CERTIFICATE, _STORE, _SITE = (
    "signing.key", "epoch", "server.key", "server.pem", "identity.db", "site",
)  # fmt: skip


class IdentityFolder:
    """A server's identity.

    Args:
        state: The server's state folder.
        clock: Seconds since 1970.

    Attributes:
        site: The site's name.
        authority: The certificate authority.
        key: What the server signs its messages with.
        epochs: Its epochs.
        store: Claims, devices and answers.

    Raises:
        IdentityError: There is none, or a file of it is damaged or open to other users.
        StorageError: The disk fails.
    """

    def __init__(self, state: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = state / FOLDER
        try:
            self.site = check_name((self.path / _SITE).read_text().strip(), "site")
        except FileNotFoundError as error:
            raise IdentityError(
                f"{state} has no identity", hint=f"Make one: fedprune-server init --state {state}"
            ) from error
        except OSError as error:
            raise StorageError(f"can't read {self.path / _SITE}: {error.strerror}", hint=remedy(error)) from error
        except (UnicodeDecodeError, ProtocolError) as error:
            raise IdentityError(f"{self.path / _SITE} is damaged", hint="Write the site's name into it.") from error
        self.authority = Authority(self.path, clock)
        self.key = SigningKey.load(self.path / _SIGNING)
        self.epochs = EpochFile(self.path / _EPOCH, clock)
        self.store = IdentityStore(self.path / _STORE)

    @classmethod
    def make(cls, state: Path, site: str, clock: Callable[[], float] = time.time) -> IdentityFolder:
        """A new identity; one whose making was broken off is completed.

        Raises:
            IdentityError: There is one already.
            StorageError: The disk fails or is full.
        """
        check_name(site, "site")
        path = state / FOLDER
        if (path / _SITE).exists():
            raise IdentityError(f"{state} has an identity already", hint="Keep it: every board knows the server by it.")
        authority = Authority(path, clock) if (path / CERTIFICATE).exists() else Authority.make(path, site, clock)
        SigningKey.make().save(path / _SIGNING)
        key = make_tls_key()
        save_tls_key(key, path / _KEY)
        write_whole(path / _CERTIFICATE, authority.issue_server(make_request(key, SERVER)).encode())
        IdentityStore(path / _STORE).close()
        write_whole(path / _SITE, site.encode())
        return cls(state, clock)

    def close(self) -> None:
        """Close the database."""
        with suppress(StorageError):
            self.store.close()

    def __enter__(self) -> IdentityFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, device: str | None, seconds: int) -> Claim:
        """A new one-time claim, kept by its key alone: its text is nowhere but in what this returns.

        Args:
            device: For whom; None for any one.
            seconds: How long it can be used.

        Raises:
            ProtocolError: The name is none.
            StorageError: The disk fails or is full.
        """
        if device is not None:
            check_device(device)
        made, now = Claim.make(self.authority.pin), self.authority.now()
        self.store.add_claim(made, device, now, now + seconds)
        return made

    def revoke(self, device: str) -> tuple[int, int]:
        """Shut a device out: its key at once, its certificates as soon as the broker loads the list again.

        Returns:
            How many keys and certificates that were.

        Raises:
            StorageError: The disk fails or is full; doing it again does the rest.
        """
        return self.store.revoke(check_device(device), self.authority.now()), self.authority.revoke_device(device)

    def context(self) -> PinnedContext:
        """TLS for the server's own connection to the broker.

        Raises:
            IdentityError: A file is damaged.
        """
        authority, certificate, key = (self.path / name for name in (CERTIFICATE, _CERTIFICATE, _KEY))
        return pinned_context(authority, certificate, key, self.authority.now)
