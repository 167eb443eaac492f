"""What servers of one PostgreSQL database share of their identity, so that a standby forgets no revocation.

The identity's folder has the keys and stays on each machine; the database has the successions of the signing key and
the replaced authorities, so that no server continues with those. The server that has the job writes devices, claims,
the register of certificates and the epochs of senders into the database as well; the one that takes over completes its
own folder from there. What was revoked, used or heard on either side stays so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sql

from fedprune.core.closing import Closing
from fedprune.core.errors import FedpruneError, IdentityError, StorageError, shown
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import CLAIM_ROW, DEVICE_ROW, EPOCH_ROW, REVOKED, SharedRow
from fedprune_server.storage.database import Database
from fedprune_server.storage.lease import Lease, LeaseLostError
from fedprune_server.storage.tables import IDENTITY, encoded, upsert

log = logging.getLogger("fedprune.server")

LOOKED_S, AGAIN_S = 1.0, 5.0
_LINE, _EARLIER, _AUTHORITY = "register", "earlier key", "earlier issuer"


class SharedIdentity(Closing):
    """The PostgreSQL database's copy of what changes in an identity, written by the holder of its lease."""

    def __init__(
        self,
        url: str,
        lease: Lease,
        identity: IdentityFolder,
        state: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease, self._identity, self._clock = lease, identity, clock
        # With a connection of its own, which sees changes by this server, by commands and by the console alike.
        self._watched = IdentityFolder(state)
        self._database = Database(url)
        self._written: dict[tuple[str, str], str] = {}
        self._version: int | None = None
        self._look_at = math.inf  # until the identity is complete, and after the lease is lost
        self._logged = ""

    def close(self) -> None:
        """Write the last changes, and let go of the database."""
        if self._look_at < math.inf:
            self._look_at = 0.0
            self.turn()
        self._identity.store.also_hear = lambda _begun: None
        self._watched.close()
        self._database.close()

    def turn(self) -> None:
        """Write what has changed into the database, once a second; called in each turn of the server's loop."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOKED_S
        try:
            version = self._watched.store.version()
            if version != self._version:
                self._share(self._watched)
                self._version, self._logged = version, ""
        except LeaseLostError:
            self._look_at = math.inf  # the job's own transactions report it
        except FedpruneError as error:
            if str(error) != self._logged:
                log.error("the database doesn't have the latest devices and revocations: %s", error)
            self._logged, self._look_at = str(error), self._clock() + AGAIN_S

    def take_over(self) -> None:
        """Complete the identity from the database, then the database from the identity, and continue with that.

        Raises:
            IdentityError: The identity has an earlier signing key or authority than the server that had the job.
            LeaseLostError: Another server has taken the job over.
            StorageError: A row is damaged.
        """
        identity = self._identity
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
        self._share(identity, epochs=True)
        identity.store.also_hear = self.hear
        self._look_at = 0.0

    def _share(self, identity: IdentityFolder, *, epochs: bool = False) -> None:
        """Write into the database what has changed in an identity, and delete from it what the identity has deleted.

        Certificates stay for good, epochs of senders, which `hear` writes as they begin, as long as a key isn't
        revoked.
        """
        known = [*self._written]
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
        """Write epochs of senders into the database."""
        rows = [(EPOCH_ROW, f"{key} {stream}", encoded([key, stream, epoch])) for key, stream, epoch in begun]
        self._database.patiently(lambda: self._write(rows))

    def _write(self, rows: Sequence[tuple[str, str, str]], gone: Sequence[tuple[str, str]] = ()) -> None:
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
