"""Members, claims and answers to requests to join, in the server's database.

Commands, the console and other servers of the database use the same tables, and see each other's changes at once. A
transaction is durable before the server acts on it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sql

from fedprune.core.errors import IdentityError, JoinError, StorageError, value_text
from fedprune.security.certificates import key_digest, read_certificate, request_key, seconds_of
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import holds_claim
from fedprune.wire.fleet_messages import JoinRequest
from fedprune_server.storage.database import Database
from fedprune_server.storage.tables import (
    ANSWERS,
    CERTIFICATES,
    CLAIMS,
    EPOCHS,
    MEMBERS,
    META,
    insert_new,
    put_meta,
    read_meta,
    upsert,
)

APPROVED, WAITING, REVOKED = "approved", "waiting", "revoked"

# Maximum number of requests that wait for the operator: strangers may send any number.
MAX_WAITING = 1000

# Maximum number of requests that wait under one name, so that nobody can fill the list under a board's name.
MAX_NAMESAKES = 16

# Number of stored answers to one device. A request with an older answer gets a new one, with the same certificate of
# its TLS key: it gets no second one, and is refused once that one has ended or was revoked.
MAX_ANSWERS = 16

# Maximum number of a member's certificates that have not ended.
MAX_CERTIFICATES = 64

# Seconds for which unused claims are kept after they expire, so that a late board learns the reason.
EXPIRED_CLAIMS_KEPT_S = 30 * 86_400

# Members that are read at a time.
_PAGE_ROWS = 1000

# Rows of `meta`: a random text that each change of the members replaces, and the identity whose members they are.
_VERSION_ROW, _IDENTITY_ROW = "members", "identity"

# Begins the row of the identity while the members are nobody's; the replaced identities follow, one a line.
_NOBODY = "not\n"

_M, _C, _T = MEMBERS.c, CLAIMS.c, CERTIFICATES.c
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class MemberKey:
    """A verifying key (hex) that has asked to be a device, the operator's decision (the status `waiting`, `approved` or
    `revoked`), and the time of its first request, in seconds since 1970."""

    device: str
    key: str
    status: str
    asked: int


class IdentityStore:
    """Members, claims, answers and epochs of senders, in a database that its owner closes; None for an identity that
    has none yet: it has no members. Every method raises `StorageError` if the database is damaged or away, or the disk
    fails or is full."""

    def __init__(self, database: Database | None) -> None:
        self._database = database
        self._cached_members: tuple[str, Mapping[str, str]] = "", {}

    @property
    def shared(self) -> bool:
        """Whether servers on several machines may use the database."""
        return self._database is not None and self._database.postgresql

    @property
    def is_empty(self) -> bool:
        """Whether there are neither members nor claims."""
        return self._database is None or self._read(
            lambda connection: not any(connection.execute(sql.select(t).limit(1)).first() for t in (MEMBERS, CLAIMS))
        )

    def add_claim(self, claim: JoinClaim, device: str | None, now: int, expires: int) -> None:
        """Store a claim's key, not its secret, for a device or for any (None). Times are in seconds since 1970."""

        def add(connection: sql.Connection) -> None:
            connection.execute(CLAIMS.delete().where(_C.used.is_(None), _C.expires < now - EXPIRED_CLAIMS_KEPT_S))
            row = {"id": claim.id.hex(), "key": claim.key, "device": device, "made": now, "expires": expires}
            upsert(connection, CLAIMS, [row])

        self._write(add)

    def use_claim(self, request: JoinRequest, digest: str, now: int) -> None:
        """Use a claim for a device and approve the device, in one durable transaction.

        The very same request may use it again, even if the claim has expired since: the board may not have got the
        answer.

        Raises `JoinError` if the claim is unknown, expired, for another device or used by another request, its sender
        doesn't know its secret, the name is another key's, or the key was revoked.
        """

        def use(connection: sql.Connection) -> None:
            row = connection.execute(sql.select(CLAIMS).where(_C.id == request.claim)).first()
            has_secret = holds_claim(request, bytes(32) if row is None else bytes(row.key))
            if row is None or not has_secret:
                raise JoinError("this server doesn't know the claim", hint="Have a new one made.")
            if row.used is not None and row.used != digest:
                raise JoinError("the claim was used by another request", hint="Have a new one made.")
            if row.used is None:
                if now >= row.expires:
                    raise JoinError("the claim has expired", hint="Have a new one made.")
                if row.device is not None and row.device != request.device:
                    raise JoinError(f"the claim is for another device than {request.device}")
                _approve(connection, request.device, request.key, now)
                used = CLAIMS.update().where(_C.id == request.claim).values(used=digest, used_at=now)
                connection.execute(used)
            elif _status(connection, request.device, request.key) != APPROVED:
                raise JoinError(f"{request.device} is approved no more")

        self._change(use)

    def request_approval(self, device: str, key: str, now: int) -> str:
        """Store that a key asks to be a device, without a claim; returns its status. Raises `JoinError` if too many
        requests wait.
        """

        def add(connection: sql.Connection) -> str:
            status = _status(connection, device, key)
            if status is None:
                waiting = list(connection.execute(sql.select(_M.device).where(_M.status == WAITING)).scalars())
                if len(waiting) >= MAX_WAITING or waiting.count(device) >= MAX_NAMESAKES:
                    raise JoinError(
                        "too many wait for the operator", hint="Have a claim made, or let the operator decide."
                    )
                connection.execute(MEMBERS.insert().values(device=device, key=key, status=WAITING, asked=now))
            return status or WAITING

        rows = self._rows(sql.select(_M.status).where(_M.device == device, _M.key == key))
        return str(rows[0].status) if rows else self._change(add)

    def approve(self, device: str, key: str, now: int) -> None:
        """Approve a waiting key. Raises `JoinError` if the name is another key's, or the key was revoked."""
        self._change(lambda connection: _approve(connection, device, key, now))

    def revoke(self, device: str, now: int) -> tuple[int, int]:
        """Revoke all keys of a device, waiting ones included; returns the number of keys, and of their certificates."""
        keys = self._revoke(now, _M.device == device, _M.status != REVOKED)
        return len(keys), len(self._rows(sql.select(_T.serial).where(_T.device == device, _T.key.in_(keys))))

    def deny(self, device: str, keys: Collection[str], now: int) -> int:
        """Deny waiting keys of a device; one that was approved meanwhile stays. Returns the number of denied keys."""
        return len(self._revoke(now, _M.device == device, _M.key.in_(list(keys)), _M.status == WAITING))

    def _revoke(self, now: int, *conditions: sql.ColumnElement[bool]) -> set[str]:
        # Filled by all attempts: an earlier one may have been committed, though its answer was lost.
        revoked: set[str] = set()

        def revoke_keys(connection: sql.Connection) -> set[str]:
            revoked.update(connection.execute(sql.select(_M.key).where(*conditions)).scalars())
            connection.execute(MEMBERS.update().where(*conditions).values(status=REVOKED, decided=now))
            # A revoked key is never approved again: its sender's sequence numbers are not needed.
            approved_keys = sql.select(_M.key).where(_M.status == APPROVED)  # the same key may have another name
            connection.execute(EPOCHS.delete().where(EPOCHS.c.key.in_(revoked), EPOCHS.c.key.not_in(approved_keys)))
            return revoked

        return self._change(revoke_keys)

    def devices(self) -> list[MemberKey]:
        """All keys that have asked or were approved, ordered by device."""
        query = sql.select(_M.device, _M.key, _M.status, _M.asked)
        keys = [MemberKey(*row) for row in self._rows(query.order_by(_M.device, _M.asked, _M.key))]
        for key in keys:
            if key.status not in (APPROVED, WAITING, REVOKED):
                raise StorageError(
                    f"the database's row of the member {key.device} is damaged",
                    got=value_text(key.status),
                    hint="Restore the server's backup.",
                )
        return keys

    def waiting(self) -> list[tuple[str, str]]:
        """Names and keys that wait for the operator. The rows of other members, perhaps thousands, are not read."""
        query = sql.select(_M.device, _M.key).where(_M.status == WAITING)
        return [(row.device, row.key) for row in self._rows(query.order_by(_M.device, _M.asked, _M.key))]

    def unannounced_members(self) -> dict[str, int]:
        """Members that have never sent a message, with the times of their requests to join, in seconds since 1970."""
        silent = _M.key.not_in(sql.select(EPOCHS.c.key))
        query = sql.select(_M.device, _M.asked).where(_M.status == APPROVED, silent)
        return {row.device: int(row.asked) for row in self._rows(query.order_by(_M.asked, _M.device))}

    def key_of(self, device: str) -> str | None:
        rows = self._rows(sql.select(_M.key).where(_M.device == device, _M.status == APPROVED))
        return str(rows[0].key) if rows else None

    def members(self) -> Mapping[str, str]:
        """Keys of the approved devices by name: the same object for all callers until the members change."""
        version = self.version()  # read before the members: a change in between is read by the next call
        if not version or version != self._cached_members[0]:
            self._cached_members = version, {} if self._database is None else self._read(_member_keys)
        return self._cached_members[1]

    def version(self) -> str:
        """A text that changes whenever the members change."""
        rows = self._rows(sql.select(META.c.value).where(META.c.key == _VERSION_ROW))
        return str(rows[0].value) if rows else ""

    def latest_epochs(self) -> dict[str, dict[str, int]]:
        """The latest epochs that `defer_epochs` stored, by sender's key and by stream (see `signed_channel`)."""
        epochs: dict[str, dict[str, int]] = {}
        for key, stream, epoch in self._rows(sql.select(EPOCHS)):
            epochs.setdefault(key, {})[stream] = int(epoch)
        return epochs

    def defer_epochs(self, epochs: Sequence[tuple[str, str, int]]) -> None:
        """Store the latest epochs of senders, each with verifying key and stream, with the next transaction of the
        server (`Database.defer`)."""
        rows = [{"key": key, "stream": stream, "epoch": epoch} for key, stream, epoch in epochs]
        self._require_database().defer(lambda connection: upsert(connection, EPOCHS, rows))

    def stored_answer(self, request: str) -> bytes | None:
        """The stored answer to the request with this digest."""
        rows = self._rows(sql.select(ANSWERS.c.answer).where(ANSWERS.c.request == request))
        return bytes(rows[0].answer) if rows else None

    def store_answer(self, request: str, device: str, answer: bytes) -> None:
        """Store an answer, so that the same request gets the same one."""

        def keep(connection: sql.Connection) -> None:
            insert_new(connection, ANSWERS, [{"request": request, "device": device, "answer": answer}])
            numbers = sql.select(ANSWERS.c.number).where(ANSWERS.c.device == device)
            latest = numbers.order_by(ANSWERS.c.number.desc()).limit(MAX_ANSWERS)
            connection.execute(ANSWERS.delete().where(ANSWERS.c.device == device, ANSWERS.c.number.not_in(latest)))

        self._write(keep)

    def certificate(self, request: JoinRequest, now: int) -> str | None:
        """The certificate (PEM) that the TLS key of a request has; None if it may get one. Raises `IdentityError` if
        the certificate is another key's, or over, or the device has too many, and `ProtocolError` if the certificate
        request is invalid."""
        device = request.device
        rows = self._rows(sql.select(CERTIFICATES).where(_T.tls_key == _tls_key(request)))
        if rows:
            if (rows[0].device, rows[0].key) != (device, request.key):
                raise IdentityError(
                    f"the TLS key of {device} has a certificate of {value_text(rows[0].device)}, for another key or "
                    "name",
                    hint="Make a new key.",
                )
            if rows[0].ends <= now:
                raise IdentityError(f"the certificate of {device}'s TLS key is over", hint="Make a new key.")
            return str(rows[0].pem)
        members = sql.select(_T.serial).where(_T.device == device, _T.key == request.key, _T.ends > now)
        if (count := len(self._rows(members))) >= MAX_CERTIFICATES:
            raise IdentityError(f"{device} has {count} certificates", hint="Revoke or replace the device.")
        return None

    def add_certificate(self, request: JoinRequest, pem: str) -> str:
        """Store a member's certificate before it is handed out. Returns the one to hand out: another server's, if that
        server was faster."""
        certificate = read_certificate(pem, "certificate")
        row = {
            "tls_key": _tls_key(request),
            "device": request.device,
            "key": request.key,
            "serial": f"{certificate.serial_number:x}",
            "ends": seconds_of(certificate.not_valid_after_utc),
            "pem": pem,
        }

        def add(connection: sql.Connection) -> str:
            insert_new(connection, CERTIFICATES, [row])
            return str(connection.execute(sql.select(_T.pem).where(_T.tls_key == row["tls_key"])).scalar())

        return self._write(add)

    def revoked_certificates(self) -> dict[int, int]:
        """Times at which certificates were revoked, in seconds since 1970, by serial number."""
        join = sql.and_(_T.device == _M.device, _T.key == _M.key)
        query = sql.select(_T.serial, _M.decided).join(MEMBERS, join).where(_M.status == REVOKED)
        return {int(row.serial, 16): int(row.decided) for row in self._rows(query)}

    def certificate_ends(self) -> dict[str, int]:
        """Times at which devices' last certificates end, in seconds since 1970, by device."""
        query = sql.select(_T.device, sql.func.max(_T.ends).label("ends")).group_by(_T.device)
        return {row.device: int(row.ends) for row in self._rows(query)}

    def claim_identity(self, identity: str) -> bool:
        """Whether the members belong to an identity, given by a text. Members that are nobody's do from now on.
        After `void_members` they are nobody's, but never become those of a replaced identity again.
        """
        if self._database is None:
            return True

        def may_take(owner: str | None) -> bool:
            return owner is None or (owner.startswith(_NOBODY) and identity not in owner.splitlines())

        def claim(connection: sql.Connection) -> str | None:
            insert_new(connection, META, [{"key": _IDENTITY_ROW, "value": identity}])
            if may_take(owner := read_meta(connection, _IDENTITY_ROW)):
                put_meta(connection, _IDENTITY_ROW, identity)
                return identity
            return owner

        owner = self._read(lambda connection: read_meta(connection, _IDENTITY_ROW))
        return (self._write(claim) if may_take(owner) else owner) == identity

    def void_members(self, identity: str, now: int) -> None:
        """Revoke every member, and delete claims, answers, certificates and epochs, because the identity, given by a
        text, is to be replaced. Neither it nor a former owner of the members can claim them again."""

        def void(connection: sql.Connection) -> None:
            connection.execute(MEMBERS.update().where(_M.status != REVOKED).values(status=REVOKED, decided=now))
            for table in (CLAIMS, ANSWERS, CERTIFICATES, EPOCHS):
                connection.execute(table.delete())
            owner = read_meta(connection, _IDENTITY_ROW) or ""
            replaced = {identity, *owner.removeprefix(_NOBODY).splitlines()} - {""}
            put_meta(connection, _IDENTITY_ROW, "\n".join([_NOBODY.strip(), *sorted(replaced)]))

        self._change(void)

    def _rows(self, query: sql.Select[Any]) -> list[Any]:
        return [] if self._database is None else self._read(lambda connection: list(connection.execute(query)))

    def _read(self, work: Callable[[sql.Connection], _Result]) -> _Result:
        return self._require_database().read(work)

    def _change(self, work: Callable[[sql.Connection], _Result]) -> _Result:
        """Run a transaction that changes the members; such transactions run one after the other."""

        def change(connection: sql.Connection) -> _Result:
            put_meta(connection, _VERSION_ROW, secrets.token_hex(8))  # first: it holds the row's lock until the commit
            return work(connection)

        return self._write(change)

    def _write(self, work: Callable[[sql.Connection], _Result]) -> _Result:
        """Run a transaction that has the same effect when it is repeated, as after a lost connection."""
        database = self._require_database()

        def write() -> _Result:
            with database.transaction() as connection:
                if database.fence is not None:
                    database.fence(connection)
                return work(connection)

        return database.retry_while_away(write)

    def _require_database(self) -> Database:
        if self._database is None:
            raise StorageError("this identity has no database yet", hint="Start a server on it, or make a claim.")
        return self._database


def _member_keys(connection: sql.Connection) -> dict[str, str]:
    query = sql.select(_M.device, _M.key).where(_M.status == APPROVED).order_by(_M.device)
    try:
        with connection.execute(query.execution_options(yield_per=_PAGE_ROWS)) as rows:
            return {name: bytes.fromhex(key).hex() for name, key in rows}
    except ValueError as error:
        raise StorageError(f"a row of a member is damaged ({error})", hint="Restore the server's backup.") from error


def _approve(connection: sql.Connection, device: str, key: str, now: int) -> None:
    """Approve a key, and forget other keys that wait under the name. Raises `JoinError` if it can't be approved."""
    other_keys = sql.select(_M.key).where(_M.device == device, _M.status == APPROVED, _M.key != key)
    if connection.execute(other_keys).first() is not None:
        raise JoinError(
            f"another board is {device} already",
            hint=f"Choose another name; if that board is gone, `fedprune-server devices replace {device}`.",
        )
    if _status(connection, device, key) == REVOKED:
        raise JoinError(f"this key of {device} was revoked", hint="Let the board make a new one.")
    change = MEMBERS.update().where(_M.device == device, _M.key == key).values(status=APPROVED, decided=now)
    if not connection.execute(change).rowcount:
        row = {"device": device, "key": key, "status": APPROVED, "asked": now, "decided": now}
        connection.execute(MEMBERS.insert().values(row))
    connection.execute(MEMBERS.delete().where(_M.device == device, _M.status == WAITING))


def _status(connection: sql.Connection, device: str, key: str) -> str | None:
    status = connection.execute(sql.select(_M.status).where(_M.device == device, _M.key == key)).scalar()
    return None if status is None else str(status)


def _tls_key(request: JoinRequest) -> str:
    """The sha256 of the key of a certificate request."""
    return key_digest(request_key(request.csr)).hex()
