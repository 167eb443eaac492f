"""Two machines with one PostgreSQL database and copies of one identity: what the second knows when it takes over."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from fedprune.core.errors import ConfigError, IdentityError, JoinError
from fedprune.security.certificates import make_request, make_tls_key
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import make_join_request
from fedprune.security.keys import SigningKey
from fedprune.wire.fleet_messages import APPROVED, JoinRequest
from fedprune_server.cli.main import main
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.messaging.authentication import AuthenticatedLink
from fedprune_server.messaging.transport import DeviceRevoked
from fedprune_server.storage import lease
from fedprune_server.storage.lease import LEASE_ROW, LeaseLostError
from fedprune_server.storage.tables import put_meta, read_meta
from support.fakes.inbox import Inbox
from support.fakes.members import serials_of
from support.faults.hung_server import hang
from support.processes.postgres import Postgres

pytestmark = pytest.mark.postgresql
STREAM = "fedprune/1/lab/pi-1"


@contextmanager
def serving(state: Path, url: str) -> Iterator[IdentityFolder]:
    """A server's identity as it is while the server runs."""
    with IdentityFolder(state, database=url) as identity, StateFolder(state, url) as folder:
        identity.use_database(folder.storage.database)
        yield identity


def request(claim: JoinClaim, name: str) -> JoinRequest:
    return make_join_request("lab", name, SigningKey.make(), make_request(make_tls_key(), name), claim)


def join(identity: IdentityFolder, name: str) -> JoinRequest:
    asked = request(JoinClaim.parse(identity.make_claim(name, 3600).text), name)
    assert EnrollmentService(identity).answer(asked).status == APPROVED
    return asked


def listed_serials(identity: IdentityFolder) -> set[int]:
    """Certificates on the list that the broker gets."""
    return {r.serial_number for r in x509.load_pem_x509_crl(identity.authority.crl_path.read_bytes())}


def copy_identity(first: Path, second: Path) -> None:
    """Give another machine the identity, by hand."""
    shutil.copytree(first / "identity", second / "identity")


def test_a_standby_knows_who_was_shut_out_and_heard_a_moment_ago(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    monkeypatch.setattr(lease, "RENEWAL_INTERVAL_S", 0.1)
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    IdentityFolder.make(first, "lab").close()
    copy_identity(first, second)  # long before any board joined
    with ExitStack() as crashed:
        identity = crashed.enter_context(IdentityFolder(first, database=url))
        folder = crashed.enter_context(StateFolder(first, url))
        identity.use_database(folder.storage.database)
        revoked, member = join(identity, "pi-1"), join(identity, "pi-2")
        open_claim = JoinClaim.parse(identity.make_claim(None, 3600).text)
        assert EnrollmentService(identity).answer(request(open_claim, "pi-3")).status == APPROVED
        identity.store.defer_epochs([(member.key, STREAM, 77)])
        identity.store._require_database().flush()
        with IdentityFolder(first, database=url) as command:  # an operator at a terminal
            command.revoke("pi-1")
        hang(folder)

        with IdentityFolder(second, database=url) as identity, StateFolder(second, url, standby=True) as folder:
            identity.use_database(folder.storage.database)
            assert sorted(identity.store.members()) == ["pi-2", "pi-3"]
            assert identity.store.latest_epochs() == {member.key: {STREAM: 77}}
            assert listed_serials(identity) == serials_of(second, "pi-1", url) != set()
            assert len(serials_of(second, "pi-3", url)) == 1
            with pytest.raises(JoinError, match="used by another"):
                identity.store.use_claim(request(open_claim, "pi-4"), "00" * 32, 0)
            assert EnrollmentService(identity).answer(revoked).status != APPROVED


def test_a_server_that_lost_the_job_writes_nothing(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    IdentityFolder.make(tmp_path / "first", "lab").close()
    state = tmp_path / "first"
    with StateFolder(state, url) as folder, IdentityFolder(state) as identity:
        identity.use_database(folder.storage.database)
        with folder.storage.database.transaction() as connection:
            row = json.loads(read_meta(connection, LEASE_ROW) or "")
            put_meta(connection, LEASE_ROW, json.dumps(row | {"token": row["token"] + 1}))
        identity.store.defer_epochs([("ab" * 32, STREAM, 1)])
        with pytest.raises(LeaseLostError):
            identity.store._require_database().flush()
        with pytest.raises(LeaseLostError):
            identity.make_claim(None, 3600)


def test_claims_in_another_database_are_not_lost_silently(tmp_path: Path, postgres: Postgres) -> None:
    url, state = postgres.database(), tmp_path / "first"
    with IdentityFolder.make(state, "lab") as identity:
        identity.store.devices()
        StateFolder(state, url).close()
        identity.make_claim(None, 3600)
    with pytest.raises(ConfigError, match=r"first.*server\.db"):
        StateFolder(state, url)
    assert main(["init", "--state", str(tmp_path / "other"), "--database", url]) == 0
    assert main(["claim", "--state", str(tmp_path / "other")]) == 0
    with StateFolder(tmp_path / "other", url) as folder:
        assert not IdentityStore(folder.storage.database).is_empty


def test_a_standby_with_a_replaced_identity_is_refused_until_it_has_the_present_one(
    tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    IdentityFolder.make(first, "lab").close()
    with serving(first, url) as identity:
        join(identity, "pi-1")
    copy_identity(first, second)
    with serving(second, url) as identity:
        assert identity.store.members().keys() == {"pi-1"}
    with IdentityFolder(first, database=url) as identity:
        identity.replace().close()
    for _ in range(2):  # neither before the present one has opened the database nor after that
        with pytest.raises(IdentityError, match="another identity's"), serving(second, url):
            pass
        with serving(first, url) as identity:
            assert identity.store.members() == {}
    shutil.rmtree(second / "identity")
    copy_identity(first, second)
    with serving(second, url):
        pass


def test_a_server_notices_what_another_machine_changes(
    tmp_path: Path, postgres: Postgres, capsys: pytest.CaptureFixture[str]
) -> None:
    url = postgres.database()
    first, second = tmp_path / "first", tmp_path / "second"
    IdentityFolder.make(first, "lab").close()
    copy_identity(first, second)

    def command(*words: str) -> str:
        assert main([*words, "--state", str(second), "--database", url]) == 0
        return capsys.readouterr().out

    with serving(first, url) as identity:
        now = [0.0]
        link = AuthenticatedLink(Inbox(), identity, lambda: now[0])
        asked = request(JoinClaim.parse(command("claim", "--device", "pi-1").strip()), "pi-1")
        assert EnrollmentService(identity).answer(asked).status == APPROVED
        now[0] += 1.0
        assert link.get() is None
        assert command("devices").split()[:2] == ["pi-1", "approved"]
        assert "1 key and 1 certificate revoked" in command("devices", "revoke", "pi-1")
        now[0] += 0.5
        assert link.get() is None, "it looks once a second"
        now[0] += 0.5
        assert link.get() == DeviceRevoked("pi-1")
        assert listed_serials(identity) == serials_of(first, "pi-1", url) != set()
