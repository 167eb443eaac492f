"""Two machines with one PostgreSQL database and copies of one identity: what the second knows when it takes over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sql
from cryptography import x509

from fedprune.core.errors import IdentityError, StorageError, UsedClaimError
from fedprune.security.certificates import make_request, make_tls_key
from fedprune.security.joining import Claim
from fedprune.security.joining import make_request as make_join_request
from fedprune.security.keys import SigningKey
from fedprune.wire.fleet_messages import APPROVED, JoinRequest
from fedprune_server.engine.state_directory import StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.enrollment.shared_identity import SharedIdentity
from fedprune_server.storage.lease import ROW, LeaseLostError
from fedprune_server.storage.tables import IDENTITY, META
from support.processes.postgres import Postgres

pytestmark = pytest.mark.postgresql
STREAM = "fedprune/1/lab/pi-1"


@contextmanager
def serving(state: Path, url: str) -> Iterator[IdentityFolder]:
    """A server's identity as it is while the server runs."""
    with sharing(state, url) as (identity, _):
        yield identity


@contextmanager
def sharing(state: Path, url: str) -> Iterator[tuple[IdentityFolder, Callable[[], None]]]:
    """The same, and what lets a second of its loop pass."""
    now = 0.0
    with ExitStack() as stack:
        identity = stack.enter_context(IdentityFolder(state))
        folder = stack.enter_context(StateFolder(state, url))
        shared = stack.enter_context(SharedIdentity(url, folder.lease, identity, state, lambda: now))
        shared.take_over()

        def second() -> None:
            nonlocal now
            now += 1.0
            shared.turn()

        yield identity, second


def request(claim: Claim, name: str) -> JoinRequest:
    return make_join_request("lab", name, SigningKey.make(), make_request(make_tls_key(), name), claim)


def join(identity: IdentityFolder, name: str) -> JoinRequest:
    asked = request(Claim.parse(identity.claim(name, 3600).text), name)
    assert EnrollmentService(identity).answer(asked).status == APPROVED
    return asked


def test_a_stale_standby_knows_who_was_shut_out_and_heard_since(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    with IdentityFolder.make(first, "lab") as identity:
        lost, kept = join(identity, "pi-1"), join(identity, "pi-2")
        open_claim = Claim.parse(identity.claim(None, 3600).text)
    shutil.copytree(first, second)  # as it was copied by hand, long ago

    with serving(first, url) as identity:
        assert EnrollmentService(identity).answer(request(open_claim, "pi-3")).status == APPROVED
        identity.store.hear([(kept.key, STREAM, 77)])
        with IdentityFolder(first) as command:  # an operator at a terminal
            command.revoke("pi-1")

    with serving(second, url) as identity:
        assert sorted(identity.store.members()) == ["pi-2", "pi-3"]
        assert identity.store.heard(kept.key) == {STREAM: 77}
        crl = x509.load_pem_x509_crl(identity.authority.crl_path.read_bytes())
        assert {r.serial_number for r in crl} == {i.serial for i in identity.authority.of_device("pi-1")}
        assert len(identity.authority.of_device("pi-3")) == 1
        with pytest.raises(UsedClaimError):
            identity.store.use_claim(request(open_claim, "pi-4"), "00" * 32, 0)
        assert EnrollmentService(identity).answer(lost).status != APPROVED
        identity.revoke("pi-2")

    with serving(first, url) as identity:
        assert sorted(identity.store.members()) == ["pi-3"]


def test_a_standby_with_an_earlier_signing_key_is_refused_until_it_has_the_present_one(
    tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    with IdentityFolder.make(first, "lab") as identity:
        join(identity, "pi-1")
    with serving(first, url):
        pass
    shutil.copytree(first / "identity", second / "identity")
    with serving(second, url):
        pass
    for _ in range(2):
        with IdentityFolder(first) as identity:
            identity.rotate()
    with serving(first, url):  # boards follow it from here on
        pass
    with pytest.raises(IdentityError, match=r"earlier signing key.*successions\.json"), serving(second, url):
        pass
    for name in ("signing.key", "successions.json"):
        shutil.copy2(first / "identity" / name, second / "identity" / name)
    with serving(second, url) as identity, IdentityFolder(first, read_only=True) as other:
        assert identity.key.verifying == other.key.verifying
        assert identity.store.members().keys() == {"pi-1"}
    with IdentityFolder(second) as identity:
        identity.rotate()
    with serving(second, url):
        pass
    with pytest.raises(IdentityError, match="earlier signing key"), serving(first, url):
        pass
    with IdentityFolder.make(tmp_path / "third", "lab"), serving(tmp_path / "third", url):
        pass  # a new identity, as after the loss of all others


def test_a_standby_with_an_earlier_authority_is_refused(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    with IdentityFolder.make(first, "lab"):
        pass
    with serving(first, url):
        pass
    shutil.copytree(first / "identity", second / "identity")
    with IdentityFolder(first) as identity:
        identity.rotate_authority()
    with serving(first, url):
        pass
    with pytest.raises(IdentityError, match="earlier certificate authority"), serving(second, url):
        pass
    with IdentityFolder(first) as identity:
        identity.retire_authority(force=True)
    with serving(first, url):
        pass
    with pytest.raises(IdentityError, match="earlier certificate authority"), serving(second, url):
        pass
    shutil.rmtree(second / "identity")
    shutil.copytree(first / "identity", second / "identity")
    with serving(second, url):
        pass


def test_a_revocation_on_the_standby_s_machine_is_not_undone(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    with IdentityFolder.make(first, "lab") as identity:
        asked = join(identity, "pi-1")
        identity.store.hear([(asked.key, STREAM, 5)])
    shutil.copytree(first, second)
    with serving(first, url):
        pass
    with IdentityFolder(second) as identity:
        identity.revoke("pi-1")
    with serving(second, url) as identity:
        assert identity.store.members() == {}
    with serving(first, url) as identity:
        assert identity.store.members() == {}


def test_a_revocation_reaches_the_database_while_the_server_runs(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    with IdentityFolder.make(tmp_path / "first", "lab") as identity:
        join(identity, "pi-1")
    engine = sql.create_engine(url)

    def bodies() -> str:
        with engine.connect() as connection:
            return "".join(connection.execute(sql.select(IDENTITY.c.body)).scalars())

    with sharing(tmp_path / "first", url) as (_, second), IdentityFolder(tmp_path / "first") as command:
        assert '"approved"' in bodies()
        command.revoke("pi-1")
        second()
        assert '"approved"' not in bodies()
    engine.dispose()


def test_the_database_forgets_what_its_server_forgets(tmp_path: Path, postgres: Postgres) -> None:
    url, state, waits = postgres.database(), tmp_path / "first", "ab" * 32
    engine = sql.create_engine(url)

    def keys(kind: str) -> list[str]:
        with engine.connect() as connection:
            return sorted(connection.execute(sql.select(IDENTITY.c.key).where(IDENTITY.c.kind == kind)).scalars())

    with IdentityFolder.make(state, "lab") as identity:
        asked = join(identity, "pi-1")
        ended = Claim.parse(identity.claim(None, 1).text)
        identity.store.ask("pi-2", waits, 1)
    with sharing(state, url) as (identity, second):
        identity.store.hear([(asked.key, STREAM, 5)])
        assert ended.id.hex() in keys("claim")
        assert keys("epoch") == [f"{asked.key} {STREAM}"]
        with IdentityFolder(state) as command:
            command.store.approve("pi-2", "cd" * 32, 2)
            command.revoke("pi-1")
            command.store.add_claim(Claim.make(ended.pin), None, 2**40, 2**40 + 1)  # long after
        second()
        assert keys("device") == sorted([f"pi-1 {asked.key}", f"pi-2 {'cd' * 32}"])
        assert keys("epoch") == []
        assert ended.id.hex() not in keys("claim")
    with serving(state, url) as identity:
        assert {d.key for d in identity.store.devices()} == {asked.key, "cd" * 32}
    engine.dispose()


def test_a_server_that_lost_the_job_writes_nothing(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    IdentityFolder.make(tmp_path / "first", "lab").close()
    state = tmp_path / "first"
    with StateFolder(state, url) as folder, IdentityFolder(state) as identity:
        shared = SharedIdentity(url, folder.lease, identity, state)
        with folder.storage.database.transaction() as connection:
            query = sql.select(META.c.value).where(META.c.key == ROW)
            row = json.loads(connection.execute(query).scalar() or "")
            changed = json.dumps(row | {"token": row["token"] + 1})
            connection.execute(META.update().where(META.c.key == ROW).values(value=changed))
        with pytest.raises(LeaseLostError):
            shared.hear([("ab" * 32, STREAM, 1)])
        shared.close()


def test_a_damaged_row_is_an_error(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    IdentityFolder.make(tmp_path / "first", "lab").close()
    for row in (("device", "x", '["a"]'), ("nonsense", "x", "[]"), ("register", "x", '"{}"'), ("epoch", "x", "{")):
        with StateFolder(tmp_path / "first", url) as folder, IdentityFolder(tmp_path / "first") as identity:
            with folder.storage.database.transaction() as connection:
                connection.execute(IDENTITY.delete())
                connection.execute(IDENTITY.insert().values(kind=row[0], key=row[1], body=row[2]))
            shared = SharedIdentity(url, folder.lease, identity, tmp_path / "first")
            with shared, pytest.raises(StorageError, match="damaged"):
                shared.take_over()
    with IdentityFolder(tmp_path / "first") as identity:  # its own files are as they were
        assert identity.store.members() == {}
