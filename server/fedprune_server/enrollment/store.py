"""Claims, devices and answers of a server that lets devices in: a small SQLite database in its identity folder.

It is apart from the job's database: it outlives jobs, and only the operator's user may read it. A transaction is on the
disk before anything that follows from it is said.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core.errors import (
    ExpiredClaimError,
    ForeignClaimError,
    JoinError,
    StorageError,
    UnknownClaimError,
    UsedClaimError,
    shown,
)
from fedprune.security.joining import Claim, holds_claim
from fedprune.wire.fleet_messages import JoinRequest
from fedprune_server.storage.sqlite_file import SqliteFile

APPROVED, WAITING, REVOKED = "approved", "waiting", "revoked"

MAX_WAITING = 1000
"""Requests that may wait for the operator at a time."""

MAX_NAMESAKES = 16
"""Of those, how many may wait under one name."""

KEPT_ANSWERS = 16
"""Answers to one device that are kept. An earlier request is answered again, with the certificate that its TLS key has:
it gets no second one, and is refused once that one has ended or was revoked."""

KEPT_CLAIMS_S = 30 * 86_400
"""Seconds for which unused claims are kept after their end, so that a late board learns the reason."""

_FORMAT = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS claims (
    id TEXT PRIMARY KEY, key BLOB NOT NULL, device TEXT, made INTEGER NOT NULL, expires INTEGER NOT NULL,
    used TEXT, used_at INTEGER);
CREATE TABLE IF NOT EXISTS devices (
    device TEXT NOT NULL, key TEXT NOT NULL, status TEXT NOT NULL, asked INTEGER NOT NULL, decided INTEGER,
    PRIMARY KEY (device, key));
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT UNIQUE NOT NULL, device TEXT NOT NULL, answer BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS followed (key TEXT PRIMARY KEY, server_key TEXT, authority TEXT);
CREATE TABLE IF NOT EXISTS heard (
    key TEXT NOT NULL, stream TEXT NOT NULL, epoch INTEGER NOT NULL, PRIMARY KEY (key, stream));
"""

DEVICE_ROW, CLAIM_ROW, EPOCH_ROW = "device", "claim", "epoch"
SharedRow = tuple[str, str, list[Any]]
"""Kind, key, and values as JSON has them."""


@dataclass(frozen=True)
class Device:
    """A key that asked to be a device, and what became of it.

    Attributes:
        key: Its verifying key, as hex.
        status: `waiting`, `approved` or `revoked`.
        asked: When it asked first, in seconds since 1970.
        server_key: Id of the signing key by which the device knew this server at its latest birth, as hex.
        authority: Pin of the certificate authority whose certificate it had then, as hex.
    """

    device: str
    key: str
    status: str
    asked: int
    server_key: str | None = None
    authority: str | None = None


class IdentityStore(SqliteFile):
    """The database. Every method raises `StorageError` if it is damaged, or the disk fails or is full.

    Args:
        path: The file, made with mode 0600 if missing.
        read_only: Only look: nothing is made or changed, and a disk that can't be written to will do.

    Attributes:
        also_hear: Stores epochs of senders elsewhere, too, before `hear` returns.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.also_hear: Callable[[Sequence[tuple[str, str, int]]], None] = lambda _begun: None
        hint = "If it is damaged, restore the backup of the identity folder."
        super().__init__(path, _TABLES, _FORMAT, hint, read_only=read_only)

    def add_claim(self, claim: Claim, device: str | None, now: int, expires: int) -> None:
        """Store a claim's key, without its secret, for a device or for any (None); times are in seconds since 1970."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM claims WHERE used IS NULL AND expires < ?", (now - KEPT_CLAIMS_S,))
            row = (claim.id.hex(), claim.key, device, now, expires)
            connection.execute("INSERT INTO claims (id, key, device, made, expires) VALUES (?, ?, ?, ?, ?)", row)

    def use_claim(self, request: JoinRequest, digest: str, now: int) -> None:
        """Use a claim for a device, which is approved by it: both or neither, on the disk when this returns.

        The very same request may use it again, whatever has become of the claim since.

        Raises:
            UnknownClaimError: There is none, or the sender doesn't know its secret.
            UsedClaimError: Another request used it.
            ExpiredClaimError: It has expired.
            ForeignClaimError: It is for another device.
            JoinError: The name is another key's, or the key was revoked.
        """
        with self.transaction() as connection:
            query = "SELECT key, device, expires, used FROM claims WHERE id = ?"
            row = connection.execute(query, (request.claim,)).fetchone()
            known = holds_claim(request, row[0] if row else bytes(32))
            if row is None or not known:
                raise UnknownClaimError("this server doesn't know the claim", hint="Have a new one made.")
            _, device, expires, used = row
            if used is not None and used != digest:
                raise UsedClaimError("the claim was used by another request", hint="Have a new one made.")
            if used is None:
                if now >= expires:
                    raise ExpiredClaimError("the claim's time is over", hint="Have a new one made.")
                if device is not None and device != request.device:
                    raise ForeignClaimError(f"the claim is for another device than {request.device}")
                self._let_in(connection, request.device, request.key, now)
                connection.execute("UPDATE claims SET used = ?, used_at = ? WHERE id = ?", (digest, now, request.claim))
            elif self._status(connection, request.device, request.key) != APPROVED:
                raise JoinError(f"{request.device} is approved no more")

    def ask(self, device: str, key: str, now: int) -> str:
        """Store that a key asks to be a device, without a claim; returns its status. Raises `JoinError` if too many
        wait.
        """
        with self.transaction() as connection:
            status = self._status(connection, device, key)
            if status is not None:
                return status
            count = "SELECT count(*) FROM devices WHERE status = ?"
            waiting = connection.execute(count, (WAITING,)).fetchone()[0]
            same = connection.execute(f"{count} AND device = ?", (WAITING, device)).fetchone()[0]
            if waiting >= MAX_WAITING or same >= MAX_NAMESAKES:
                raise JoinError("too many wait for the operator", hint="Have a claim made, or let the operator decide.")
            row = (device, key, WAITING, now)
            connection.execute("INSERT INTO devices (device, key, status, asked) VALUES (?, ?, ?, ?)", row)
        return WAITING

    def approve(self, device: str, key: str, now: int) -> None:
        """Approve a waiting key. Raises `JoinError` if the name is another key's, or the key was revoked."""
        with self.transaction() as connection:
            self._let_in(connection, device, key, now)

    def revoke(self, device: str, now: int) -> int:
        """Revoke all keys of a device, also those that wait; returns how many there were."""
        with self.transaction() as connection:
            # A revoked key is never approved again: its sender's sequence numbers are not needed.
            connection.execute("DELETE FROM heard WHERE key IN (SELECT key FROM devices WHERE device = ?)", (device,))
            change = "UPDATE devices SET status = ?, decided = ? WHERE device = ? AND status != ?"
            return connection.execute(change, (REVOKED, now, device, REVOKED)).rowcount

    def deny(self, device: str, keys: Iterable[str], now: int) -> int:
        """Turn away keys of a device that wait; one that was approved meanwhile stays. Returns how many there were."""
        with self.transaction() as connection:
            change = "UPDATE devices SET status = ?, decided = ? WHERE device = ? AND key = ? AND status = ?"
            rows = [(REVOKED, now, device, key, WAITING) for key in keys]
            return sum(connection.execute(change, row).rowcount for row in rows)

    def devices(self) -> list[Device]:
        """All keys that asked or were approved, by name."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT device, key, status, asked, server_key, authority FROM devices LEFT JOIN followed USING (key) "
                "ORDER BY device, asked, key"
            )
            return [Device(*row) for row in rows]

    def key_of(self, device: str) -> str | None:
        return self.members().get(device)

    def members(self) -> dict[str, str]:
        return {d.device: d.key for d in self.devices() if d.status == APPROVED}

    def heard(self, key: str) -> dict[str, int]:
        """The latest epoch of a sender by stream (`fedprune.security.signed_channel`), as `hear` wrote it."""
        with self.transaction() as connection:
            return dict(connection.execute("SELECT stream, epoch FROM heard WHERE key = ?", (key,)))

    def hear(
        self, begun: Sequence[tuple[str, str, int]], followed: Iterable[tuple[str, str | None, str | None]] = ()
    ) -> None:
        """Store which epochs of senders have begun, on the disk when this returns.

        Args:
            begun: Verifying key, stream and epoch of each.
            followed: Verifying key of each device, and its `server_key` and `authority` as in `Device`.
        """
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO followed VALUES (?, ?, ?)", followed)
            connection.executemany("INSERT OR REPLACE INTO heard (key, stream, epoch) VALUES (?, ?, ?)", begun)
        self.also_hear(begun)

    def shared(self) -> list[SharedRow]:
        """All that another server must know to continue in this one's place: devices, claims and epochs of senders."""
        with self.transaction() as connection:
            return [
                *(
                    (DEVICE_ROW, f"{device} {key}", [device, key, *rest])
                    for device, key, *rest in connection.execute(
                        "SELECT device, key, status, asked, decided FROM devices"
                    )
                ),
                *(
                    (CLAIM_ROW, row[0], [row[0], row[1].hex(), *row[2:]])
                    for row in connection.execute("SELECT id, key, device, made, expires, used, used_at FROM claims")
                ),
                *(
                    (EPOCH_ROW, f"{key} {stream}", [key, stream, epoch])
                    for key, stream, epoch in connection.execute("SELECT key, stream, epoch FROM heard")
                ),
            ]

    def merge(self, rows: Iterable[SharedRow]) -> None:
        """Merge another server's rows: what either side has revoked or used stays so, and the later epochs count.

        As after a decision here, keys that wait under the name of an approved one and epochs of revoked keys go. Raises
        `StorageError`, and merges nothing, if a row is damaged.
        """
        with self.transaction() as connection:
            kind = ""
            try:
                for kind, _, row in rows:
                    _MERGED[kind](connection, row)
                connection.execute(
                    "DELETE FROM devices AS d WHERE status = ? AND EXISTS "
                    "(SELECT 1 FROM devices WHERE device = d.device AND status = ?)",
                    (WAITING, APPROVED),
                )
                connection.execute(
                    "DELETE FROM heard WHERE key IN (SELECT key FROM devices WHERE status = ?) "
                    "AND key NOT IN (SELECT key FROM devices WHERE status = ?)",
                    (REVOKED, APPROVED),
                )
            except (ValueError, TypeError, KeyError, sqlite3.ProgrammingError, sqlite3.IntegrityError) as error:
                raise StorageError("a shared row of the identity is damaged", got=f"one of {shown(kind)}") from error

    def answer(self, request: str) -> bytes | None:
        """The answer that a request got, by the request's digest."""
        with self.transaction() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE request = ?", (request,)).fetchone()
        return None if row is None else bytes(row[0])

    def keep_answer(self, request: str, device: str, answer: bytes) -> None:
        """Keep an answer, so that the same request gets the same one."""
        with self.transaction() as connection:
            row = (request, device, answer)
            connection.execute("INSERT OR IGNORE INTO answers (request, device, answer) VALUES (?, ?, ?)", row)
            connection.execute(
                "DELETE FROM answers WHERE device = ? AND number NOT IN "
                "(SELECT number FROM answers WHERE device = ? ORDER BY number DESC LIMIT ?)",
                (device, device, KEPT_ANSWERS),
            )

    def _let_in(self, connection: sqlite3.Connection, device: str, key: str, now: int) -> None:
        query = "SELECT key FROM devices WHERE device = ? AND status = ? AND key != ?"
        if connection.execute(query, (device, APPROVED, key)).fetchone() is not None:
            raise JoinError(
                f"another board is {device} already",
                hint=f"Choose another name; if that board is gone, `fedprune-server devices replace {device}`.",
            )
        if self._status(connection, device, key) == REVOKED:
            raise JoinError(f"this key of {device} was revoked", hint="Let the board make a new one.")
        connection.execute(
            "INSERT INTO devices (device, key, status, asked, decided) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (device, key) DO UPDATE SET status = excluded.status, decided = excluded.decided",
            (device, key, APPROVED, now, now),
        )
        connection.execute("DELETE FROM devices WHERE device = ? AND status = ?", (device, WAITING))

    def _status(self, connection: sqlite3.Connection, device: str, key: str) -> str | None:
        query = "SELECT status FROM devices WHERE device = ? AND key = ?"
        row = connection.execute(query, (device, key)).fetchone()
        return None if row is None else str(row[0])


def _merge_device(connection: sqlite3.Connection, row: list[Any]) -> None:
    device, key, status, asked, decided = row
    if status not in (APPROVED, WAITING, REVOKED):
        raise ValueError(status)
    query = "SELECT status FROM devices WHERE device = ? AND key = ?"
    known = connection.execute(query, (device, key)).fetchone()
    if known is not None and known[0] == REVOKED:
        return  # for good: an approval that the other side still has must not revoke the key that replaced this one
    if status == APPROVED:
        change = "UPDATE devices SET status = ?, decided = ? WHERE device = ? AND key != ? AND status = ?"
        connection.execute(change, (REVOKED, decided, device, key, APPROVED))
    connection.execute(
        "INSERT INTO devices (device, key, status, asked, decided) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (device, key) DO UPDATE SET status = excluded.status, decided = excluded.decided "
        "WHERE excluded.status != ?",
        (device, key, status, asked, decided, WAITING),
    )


def _merge_claim(connection: sqlite3.Connection, row: list[Any]) -> None:
    number, key, *rest = row
    connection.execute(
        "INSERT INTO claims (id, key, device, made, expires, used, used_at) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET used = excluded.used, used_at = excluded.used_at WHERE used IS NULL",
        (number, bytes.fromhex(key), *rest),
    )


def _merge_epoch(connection: sqlite3.Connection, row: list[Any]) -> None:
    key, stream, epoch = row
    connection.execute(
        "INSERT INTO heard (key, stream, epoch) VALUES (?, ?, ?) "
        "ON CONFLICT (key, stream) DO UPDATE SET epoch = max(epoch, excluded.epoch)",
        (key, stream, epoch),
    )


_MERGED: dict[str, Callable[[sqlite3.Connection, list[Any]], None]] = {
    DEVICE_ROW: _merge_device,
    CLAIM_ROW: _merge_claim,
    EPOCH_ROW: _merge_epoch,
}
