"""What servers of one PostgreSQL database share of their identity, so that a standby forgets no revocation.

The identity's folder has the keys and stays on each machine; the database has the successions of the signing key and
the replaced authorities, so that no server goes on with those. The server that has the job writes devices, claims,
the register of certificates and the epochs of senders into the database as well; the one that takes over completes its
own folder from there. What was revoked, used or heard on either side stays so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sql

from fedprune.core.errors import FedpruneError, IdentityError, StorageError, shown
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import CLAIM_ROW, DEVICE_ROW, EPOCH_ROW, REVOKED, SharedRow
from fedprune_server.storage.database import Database
from fedprune_server.storage.lease import Lease, LeaseLostError
from fedprune_server.storage.tables import IDENTITY, encoded, upsert

log = logging.getLogger("fedprune.server")

LOOKED_S = 1.0
_LINE, _EARLIER, _AUTHORITY = "register", "earlier key", "earlier issuer"


class SharedIdentity:
    """The database's copy of what changes in an identity.

    Args:
        url: The PostgreSQL database, of this version's schema.
        lease: The lease on it, which this server holds.

    Raises:
        StorageError: It can't be reached.
    """

    def __init__(self, url: str, lease: Lease) -> None:
        self._database, self._lease = Database(url), lease
        self._written: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def take_over(self, identity: IdentityFolder) -> None:
        """Complete an identity from the database, then the database from the identity.

        Raises:
            IdentityError: The identity has an earlier signing key or authority than the server that had the job.
            LeaseLostError: Another server has taken the job over.
            StorageError: A row is damaged, or database or disk fail.
        """
        with self._database.transaction() as connection:
            rows = connection.execute(sql.select(IDENTITY)).all()
        self._written = {(kind, key): body for kind, key, body in rows}
        lines: list[str] = []
        shared: list[SharedRow] = []
        for kind, key, body in rows:
            try:
                value = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise StorageError(f"a shared row of the identity is damaged: {kind} {shown(key)}") from error
            if kind == _EARLIER:
                _check_key(identity, key)
            elif kind == _AUTHORITY:
                _check_authority(identity, key)
            elif kind == _LINE:
                lines.append(str(value))
            else:
                shared.append((kind, key, value))
        identity.store.merge(shared)
        identity.authority.adopt(lines)
        identity.revoke_again()
        self.share(identity, epochs=True)

    def share(self, identity: IdentityFolder, *, epochs: bool = False) -> None:
        """Write into the database what has changed in an identity, and delete from it what the identity has deleted.

        Certificates stay for good, epochs as long as a key isn't revoked.

        Args:
            identity: The identity.
            epochs: Also the epochs of senders, which `hear` writes as they begin.

        Raises:
            LeaseLostError: Another server has taken the job over.
        """
        with self._lock:
            known = [*self._written]  # before the identity is read: what is heard meanwhile isn't gone
        lines = identity.authority.lines()
        found = [row for row in identity.store.shared() if epochs or row[0] != EPOCH_ROW]
        rows = [(kind, key, encoded(value)) for kind, key, value in found]
        rows += [(_EARLIER, s.before.id.hex(), encoded(s.hex)) for s in identity.successions]
        rows += [(_AUTHORITY, pin.hex(), encoded("")) for pin in identity.authority.pins[:-1]]
        rows += [(_LINE, hashlib.sha256(line.encode()).hexdigest(), encoded(line)) for line in lines]
        here = {row[:2] for row in rows}
        keys = {value[1] for kind, _, value in found if kind == DEVICE_ROW and value[2] != REVOKED}
        self._write(
            rows,
            [
                (kind, key)
                for kind, key in known
                if (kind in (DEVICE_ROW, CLAIM_ROW) and (kind, key) not in here)
                or (kind == EPOCH_ROW and key.partition(" ")[0] not in keys)
            ],
        )

    def hear(self, begun: Sequence[tuple[str, str, int]]) -> None:
        """Write epochs of senders into the database.

        Raises:
            LeaseLostError: Another server has taken the job over.
            StorageError: The database fails.
        """
        rows = [(EPOCH_ROW, f"{key} {stream}", encoded([key, stream, epoch])) for key, stream, epoch in begun]
        self._database.patiently(lambda: self._write(rows))

    def _write(self, rows: Sequence[tuple[str, str, str]], gone: Sequence[tuple[str, str]] = ()) -> None:
        with self._lock:
            changed = [row for row in rows if self._written.get(row[:2]) != row[2]]
            if not changed and not gone:
                return
            with self._database.transaction() as connection:
                self._lease.check(connection)
                upsert(connection, IDENTITY, [{"kind": k, "key": n, "body": b} for k, n, b in changed])
                for kind, key in gone:
                    connection.execute(IDENTITY.delete().where(IDENTITY.c.kind == kind, IDENTITY.c.key == key))
            self._written.update({row[:2]: row[2] for row in changed})
            for row in gone:
                self._written.pop(row, None)


@contextmanager
def shared_identity(url: str, lease: Lease, state: Path, identity: IdentityFolder) -> Iterator[None]:
    """Complete an identity from the database, and write its changes there while the body runs.

    Args:
        url: The database.
        lease: The lease on it, held.
        state: The state folder with the identity.
        identity: The server's.

    Raises:
        IdentityError: The identity has an earlier signing key or authority than the server that had the job.
        StorageError: A row is damaged, or database or disk fail.
    """
    with closing(SharedIdentity(url, lease)) as shared, IdentityFolder(state) as watched:
        shared.take_over(identity)
        identity.store.also_hear = shared.hear
        closed = threading.Event()
        thread = threading.Thread(target=_watch, args=(shared, watched, closed), name="identity", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closed.set()
            thread.join()


def _check_key(identity: IdentityFolder, earlier: str) -> None:
    if identity.key.verifying.id.hex() == earlier:
        raise IdentityError(
            f"{identity.path} has an earlier signing key than the server that had the job: boards would not hear it",
            hint="Copy signing.key and successions.json of that server's identity into this one's.",
        )


def _check_authority(identity: IdentityFolder, earlier: str) -> None:
    if identity.authority.pins[-1].hex() == earlier:
        raise IdentityError(
            f"{identity.path} has an earlier certificate authority than the server that had the job",
            hint="Copy authority.* of that server's identity into this one's.",
        )


def _watch(shared: SharedIdentity, identity: IdentityFolder, closed: threading.Event) -> None:
    """Write changes of the identity into the database, whether this server, a command or the console makes them.

    The identity has a connection of its own here, which sees the changes of all others.
    """
    logged, version = "", None
    while True:
        over = closed.wait(LOOKED_S)
        try:
            found = identity.store.version()
            if found != version:
                shared.share(identity)
                version, logged = found, ""
        except LeaseLostError:
            return  # the job's own transactions report it
        except FedpruneError as error:
            if str(error) != logged:
                log.error("the database doesn't have the latest devices and revocations: %s", error)
            logged = str(error)
        if over:
            return
