"""Approval of boards, with a device's real folder on the other side."""

import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from cryptography import x509
from msgspec.structs import replace

from fedprune.core.errors import IdentityError, JoinError, ProtocolError, StorageError
from fedprune.security.certificates import (
    load_certificate,
    make_request,
    make_tls_key,
    save_tls_key,
    seconds_of,
)
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import make_join_request
from fedprune.security.keys import SigningKey
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.fleet_messages import APPROVED, REFUSED, WAITING, JoinAnswer, JoinRequest
from fedprune.wire.messages import Hello, parse_message
from fedprune.wire.topics import Topics
from fedprune_server.enrollment import approval
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.enrollment.store import MAX_ANSWERS, MAX_CERTIFICATES, MAX_NAMESAKES, MAX_WAITING
from fedprune_server.storage.database import Database
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.tables import MEMBERS
from support.fakes.members import member_certificate, serials_of
from support.faults.power_cuts import CutError, power

HOUR, DAY = 3600, 24 * 3600
NOW = [float(BUILD_TIME + 30 * DAY)]


Ask = Callable[[DeviceIdentity, JoinClaim | None], JoinAnswer]


@pytest.fixture
def identity(tmp_path: Path) -> Iterator[IdentityFolder]:
    NOW[0] = float(BUILD_TIME + 30 * DAY)
    with IdentityFolder.make(tmp_path / "state", "lab", clock=lambda: NOW[0]) as identity:
        yield identity


@pytest.fixture
def ask(identity: IdentityFolder) -> Ask:
    """What the server answers to a device, over the bytes that would travel."""

    def ask_server(device: DeviceIdentity, claim: JoinClaim | None = None) -> JoinAnswer:
        request = device.request(claim)
        topic, answer = EnrollmentService(identity).receive(
            Topics("lab").join_request(request.nonce), request.to_bytes()
        )
        assert topic == Topics("lab").join_answer(request.nonce)
        assert parse_message(answer.to_bytes()) == answer
        return answer

    return ask_server


def board(folder: Path, name: str = "pi-1") -> DeviceIdentity:
    return DeviceIdentity(folder, "lab", name, clock=lambda: 0.0)


def bare(claim: JoinClaim | None, name: str = "pi-1", site: str = "lab", key: SigningKey | None = None) -> JoinRequest:
    return make_join_request(site, name, key or SigningKey.make(), make_request(make_tls_key(), name), claim)


def answer(identity: IdentityFolder, request: JoinRequest) -> tuple[str, str]:
    join_answer = EnrollmentService(identity).answer(request)
    return join_answer.status, join_answer.reason


def test_a_claim_works_once_for_one_request_which_may_be_repeated(identity: IdentityFolder) -> None:
    claim = identity.make_claim(None, HOUR)
    request = bare(claim)
    desk = EnrollmentService(identity)
    first = desk.answer(request)
    NOW[0] += 2 * DAY

    assert desk.answer(request) == first  # the very same answer, even after the claim's end
    for second_request in (bare(claim), bare(claim, "pi-2"), bare(claim, key=SigningKey.make())):
        assert answer(identity, second_request) == (
            REFUSED, "the claim was used by another request. Have a new one made."
        )  # fmt: skip
    assert len(serials_of(identity.path.parent, "pi-1")) == 1


@pytest.mark.parametrize("lost", ["issue_device", "store_answer"])
def test_a_crash_between_use_and_answer_costs_nothing(
    identity: IdentityFolder, monkeypatch: pytest.MonkeyPatch, lost: str, tmp_path: Path
) -> None:
    claim = identity.make_claim(None, HOUR)
    request = bare(claim)

    def crash(*_: object) -> None:
        raise StorageError("the power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(identity.authority if lost == "issue_device" else identity.store, lost, crash)
        with pytest.raises(StorageError, match="power"):
            EnrollmentService(identity).answer(request)
    with IdentityFolder(tmp_path / "state", clock=lambda: NOW[0]) as restarted:
        assert answer(restarted, bare(claim))[0] == REFUSED
        join_answer = EnrollmentService(restarted).answer(request)
        assert join_answer.status == APPROVED
        assert EnrollmentService(restarted).answer(request) == join_answer
        assert len(serials_of(tmp_path / "state", "pi-1")) == 1


def test_every_claim_that_does_not_count_says_why(identity: IdentityFolder, tmp_path: Path) -> None:
    for_two, old = identity.make_claim("pi-2", HOUR), identity.make_claim(None, 1)
    with IdentityFolder.make(tmp_path / "other", "lab") as other_site:
        foreign = other_site.make_claim(None, HOUR)
    guessed = JoinClaim(for_two.id, bytes(15), for_two.pin)
    NOW[0] += 1
    for claim, cause in (
        (old, "the claim has expired"),
        (for_two, "the claim is for another device than pi-1"),
        (foreign, "this server doesn't know the claim"),
        (guessed, "this server doesn't know the claim"),
    ):
        status, reason = answer(identity, bare(claim))
        assert (status, reason.startswith(cause)) == (REFUSED, True)
    assert identity.store.devices() == []
    assert answer(identity, bare(for_two, "pi-2"))[0] == APPROVED  # none of that has used it
    assert answer(identity, bare(identity.make_claim(None, HOUR), site="other"))[1].startswith(
        "this server's site is lab"
    )


def test_a_certificate_is_renewed_with_a_new_key_by_who_is_let_in_alone(
    identity: IdentityFolder, ask: Ask, tmp_path: Path
) -> None:
    device, claim = board(tmp_path / "board"), identity.make_claim(None, HOUR)
    device.admit(ask(device, claim), claim.pin)
    assert device.trusted_time.floor == int(NOW[0])  # a board in 1970 now knows better
    assert not device.needs_renewal()
    old = (tmp_path / "board" / "device.pem").read_text()
    device.trusted_time.note_time(int(NOW[0]) + 500 * DAY)
    assert device.needs_renewal()

    NOW[0] += 500 * DAY
    device.admit(ask(device, None), claim.pin)

    assert (tmp_path / "board" / "device.pem").read_text() != old
    assert not device.needs_renewal()
    device.tls_context()  # certificate and key are a pair
    assert answer(identity, bare(None))[0] == WAITING  # another key of that name has to wait


def test_an_old_request_that_somebody_repeats_gets_no_second_certificate(identity: IdentityFolder) -> None:
    key = SigningKey.make()
    requests = [bare(identity.make_claim(None, HOUR), key=key), *(bare(None, key=key) for _ in range(MAX_ANSWERS + 1))]
    first = [EnrollmentService(identity).answer(request) for request in requests]
    assert {join_answer.status for join_answer in first} == {APPROVED}
    before = len(serials_of(identity.path.parent, "pi-1"))

    repeated = [EnrollmentService(identity).answer(request) for request in requests]

    assert [(a.status, a.certificate) for a in repeated] == [(a.status, a.certificate) for a in first]
    assert len(serials_of(identity.path.parent, "pi-1")) == before
    NOW[0] += 2 * 365 * DAY  # they are over
    assert {answer(identity, request)[0] for request in requests[:2]} == {REFUSED}


@pytest.mark.parametrize("renewal", [True, False])
def test_who_is_revoked_while_its_certificate_is_issued_is_refused_and_its_certificate_listed(
    identity: IdentityFolder, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewal: bool
) -> None:
    device, claim = board(tmp_path / "board"), identity.make_claim(None, HOUR)
    if renewal:
        device.admit(ask(device, claim), claim.pin)
    request, issue = device.request(None if renewal else claim), identity.authority.issue_device

    def revoked_meanwhile(*arguments: str) -> str:
        with IdentityFolder(tmp_path / "state", clock=lambda: NOW[0]) as second_process:  # another process
            second_process.revoke("pi-1")
        return issue(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(identity.authority, "issue_device", revoked_meanwhile)
        assert answer(identity, request) == (REFUSED, "pi-1 is approved no more")

    issued = serials_of(tmp_path / "state", "pi-1")
    listed = x509.load_pem_x509_crl((identity.path / "crl.pem").read_bytes())
    assert len(issued) == (2 if renewal else 1)
    assert {revoked.serial_number for revoked in listed} == issued
    assert answer(identity, request)[0] == REFUSED
    assert answer(identity, bare(identity.make_claim(None, HOUR), key=device.key))[0] == REFUSED


def test_nobody_uses_up_another_s_certificate_request_and_with_it_a_claim(
    identity: IdentityFolder, ask: Ask, tmp_path: Path
) -> None:
    member, own_claim = board(tmp_path / "member", "pi-2"), identity.make_claim("pi-2", HOUR)
    member.admit(ask(member, own_claim), own_claim.pin)
    victim, claim = board(tmp_path / "victim", "attic"), identity.make_claim("attic", HOUR)
    request = victim.request(claim)

    with pytest.raises(ProtocolError, match="common name"):
        answer(identity, make_join_request("lab", "pi-2", member.key, request.csr))

    assert victim.admit(ask(victim, claim), claim.pin) is not None


def test_a_request_that_gets_no_certificate_uses_no_claim(identity: IdentityFolder) -> None:
    csr, key = make_request(make_tls_key(), "pi-1"), SigningKey.make()
    spent = make_join_request("lab", "pi-1", SigningKey.make(), csr, identity.make_claim(None, HOUR))
    assert answer(identity, spent)[0] == APPROVED
    identity.revoke("pi-1")
    claim = identity.make_claim(None, HOUR)

    status, reason = answer(identity, make_join_request("lab", "pi-1", key, csr, claim))
    assert (status, "has a certificate of 'pi-1'" in reason) == (REFUSED, True)

    assert answer(identity, bare(claim, key=key))[0] == APPROVED


def test_only_so_many_wait_and_an_approved_one_clears_its_name(identity: IdentityFolder) -> None:
    for n in range(MAX_NAMESAKES):
        identity.store.request_approval("pi-1", f"{n:064}", 1)
    with pytest.raises(JoinError):
        identity.store.request_approval("pi-1", "a" * 64, 1)
    further_numbers = range(MAX_NAMESAKES, MAX_WAITING)
    rows = [{"device": f"pi-{n}", "key": "a" * 64, "status": WAITING, "asked": 1} for n in further_numbers]
    with open_database(identity.path.parent) as database, database.transaction() as connection:
        connection.execute(MEMBERS.insert(), rows)
    assert answer(identity, request := bare(None, "pi-2"))[0] == REFUSED

    identity.store.approve("pi-1", f"{1:064}", 2)

    assert [d.status for d in identity.store.devices() if d.device == "pi-1"] == [APPROVED]
    assert answer(identity, request)[0] == WAITING


def test_what_is_no_request_or_was_changed_is_not_answered(identity: IdentityFolder) -> None:
    desk, request = EnrollmentService(identity), bare(identity.make_claim(None, HOUR))
    topic = Topics("lab").join_request(request.nonce)
    for where, raw in (
        (topic, b"nonsense"),
        (topic, Hello().to_bytes()),
        (Topics("lab").join_request("0" * 32), request.to_bytes()),
        (Topics("other").join_request(request.nonce), request.to_bytes()),
        (topic, replace(request, device="pi-2").to_bytes()),
        (topic, replace(request, csr="nonsense").to_bytes()),
    ):
        with pytest.raises(ProtocolError):
            desk.receive(where, raw)
    assert identity.store.devices() == []


def test_the_folder_is_made_once_completed_after_a_crash_and_closed_to_others(tmp_path: Path) -> None:
    with power(0, "before") as supply:
        IdentityFolder.make(tmp_path / "whole", "lab").close()
    for at in range(1, len(supply.names) + 1):
        state = tmp_path / str(at)
        with pytest.raises(CutError), power(at, "before"):
            IdentityFolder.make(state, "lab")
        key = state / "identity" / "signing.key"
        server_key = key.read_bytes() if key.exists() else None  # by boards, perhaps
        with suppress(IdentityError):  # where the power failed after the last file
            IdentityFolder.make(state, "lab").close()
        with pytest.raises(IdentityError), IdentityFolder.make(state, "lab"):
            pass
        with IdentityFolder(state) as completed:
            assert completed.site == "lab"
            completed.tls_context()
        assert server_key in (None, key.read_bytes())
    folder = state / "identity"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = ("authority.key", "signing.key", "server.key")
    assert {stat.S_IMODE((folder / n).stat().st_mode) for n in secret} == {0o600}


def ends(identity: IdentityFolder) -> int:
    """When the server's own certificate ends."""
    return seconds_of(load_certificate(identity.path / "server.pem", "certificate").not_valid_after_utc)


def test_the_server_s_own_certificate_is_renewed_in_its_last_third(identity: IdentityFolder, tmp_path: Path) -> None:
    first, files = ends(identity), [identity.path / name for name in ("server.pem", "server.key")]
    before = [path.read_bytes() for path in files]
    NOW[0] += 486 * DAY
    identity.tls_context()
    assert [path.read_bytes() for path in files] == before

    NOW[0] += 2 * DAY
    identity.tls_context()
    second = ends(identity)
    assert second == first + 488 * DAY
    assert all(path.read_bytes() != old for path, old in zip(files, before, strict=True))
    assert stat.S_IMODE(files[1].stat().st_mode) == 0o600

    NOW[0] += 800 * DAY  # a server that was off until it was over
    with IdentityFolder(tmp_path / "state", clock=lambda: NOW[0]) as restarted:
        restarted.tls_context()  # key and certificate are a pair
        assert ends(restarted) == second + 800 * DAY


def test_the_embedded_broker_s_certificate_is_kept_until_its_last_year_or_other_hosts(identity: IdentityFolder) -> None:
    def certificate(*hosts: str) -> bytes:
        return identity.listener_files("broker", hosts)[0].read_bytes()

    first = certificate("127.0.0.1", "localhost")
    NOW[0] += 3 * 365 * DAY
    assert certificate("localhost", "127.0.0.1") == first
    for_new_host = certificate("localhost", "192.0.2.7")
    assert for_new_host != first
    assert certificate("localhost", "192.0.2.7") == for_new_host
    save_tls_key(make_tls_key(), identity.path / "broker.key")
    paired = certificate("localhost", "192.0.2.7")
    assert paired != for_new_host
    NOW[0] += 4 * 365 * DAY + DAY
    assert certificate("localhost", "192.0.2.7") != paired


def test_a_claim_s_secret_is_not_in_the_server_s_folder(identity: IdentityFolder, tmp_path: Path) -> None:
    claim = identity.make_claim(None, HOUR)
    identity.close()
    for path in (tmp_path / "state").rglob("*"):
        if path.is_file():
            assert claim.secret not in path.read_bytes()


def damage(file: Path) -> None:
    file.write_bytes(b"x" * 5000)


def reformat(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE meta SET value = 'fedprune.database/0' WHERE key = 'format'")


def spoil(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE members SET status = 'perhaps'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, r"server\.db: file is not a database"),
        (reformat, r"expected fedprune\.database/2, got fedprune\.database/0"),
        (spoil, r"row of the member pi-1 is damaged: got 'perhaps'"),
    ],
)
def test_a_database_that_can_t_be_used_is_one_clear_error(
    identity: IdentityFolder, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    identity.store.request_approval("pi-1", "a" * 64, 1)
    identity.close()
    change(tmp_path / "state" / DATABASE_FILE)
    with IdentityFolder(tmp_path / "state") as damaged, pytest.raises(StorageError, match=message):
        damaged.store.devices()


def test_a_transaction_that_is_repeated_though_it_was_committed_has_the_same_answer(
    identity: IdentityFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patiently(self: Database, work: Callable[[], object]) -> object:
        work()  # the connection is lost before the answer
        return work()

    monkeypatch.setattr(Database, "retry_while_away", patiently)
    now = int(NOW[0])
    assert [identity.store.request_approval("pi-1", key * 64, now) for key in "ab"] == [WAITING, WAITING]
    assert approval.deny(identity, "pi-1") == "pi-1: 2 keys turned away"
    with pytest.raises(JoinError, match="no such device waits"):
        approval.deny(identity, "pi-1")
    identity.store.approve("pi-1", "c" * 64, now)
    assert approval.revoke(identity, "pi-1").startswith("pi-1: 1 key and 0 certificates revoked")
    with pytest.raises(JoinError, match="pi-1 is revoked already"):
        approval.revoke(identity, "pi-1")


def test_a_revocation_of_one_name_forgets_nothing_of_another_one(identity: IdentityFolder) -> None:
    for name in ("pi-1", "pi-2"):
        identity.store.approve(name, "a" * 64, 1)
    identity.store.defer_epochs([("a" * 64, "up", 5)])
    identity.store._require_database().flush()
    identity.store.revoke("pi-1", 2)
    assert identity.store.latest_epochs() == {"a" * 64: {"up": 5}}
    identity.store.revoke("pi-2", 2)
    assert identity.store.latest_epochs() == {}


def test_without_a_database_nothing_is_known_and_nothing_is_made(identity: IdentityFolder, tmp_path: Path) -> None:
    with IdentityFolder(tmp_path / "state", read_only=True) as looking:
        looking.update_revocations()
        assert (looking.store.devices(), looking.store.version(), looking.store.is_empty) == ([], "", True)
    assert not (tmp_path / "state" / DATABASE_FILE).exists()
    identity.make_claim(None, HOUR)
    assert stat.S_IMODE((tmp_path / "state" / DATABASE_FILE).stat().st_mode) == 0o600


def test_a_revoked_device_s_certificates_are_listed_again_when_the_list_was_lost(
    identity: IdentityFolder, tmp_path: Path
) -> None:
    for name in ("pi-1", "pi-2"):
        member_certificate(identity, name)
    before = identity.authority.crl_path.read_bytes()
    identity.revoke("pi-1")
    for lost in (before, b"", None):
        identity.close()
        identity.authority.crl_path.unlink()
        if lost is not None:
            identity.authority.crl_path.write_bytes(lost)
        identity.update_revocations()
        listed = {r.serial_number for r in x509.load_pem_x509_crl(identity.authority.crl_path.read_bytes())}
        assert listed == serials_of(tmp_path / "state", "pi-1") != set()


def test_a_revocation_broken_off_before_the_list_was_written_is_completed(
    identity: IdentityFolder, tmp_path: Path
) -> None:
    """The member's row alone says that its certificates are revoked."""
    member_certificate(identity, "pi-1")
    identity.store.revoke("pi-1", 7)
    with IdentityFolder(tmp_path / "state") as restarted:
        assert restarted.store.revoked_certificates() == dict.fromkeys(serials_of(tmp_path / "state", "pi-1"), 7)
        assert restarted.authority.is_list_current(restarted.store.revoked_certificates())


def test_a_member_has_so_many_certificates_and_no_more(identity: IdentityFolder) -> None:
    key = SigningKey.make()
    assert answer(identity, bare(identity.make_claim(None, HOUR), key=key))[0] == APPROVED
    statuses = [answer(identity, bare(None, key=key))[0] for _ in range(MAX_CERTIFICATES)]
    assert statuses == [APPROVED] * (MAX_CERTIFICATES - 1) + [REFUSED]
    NOW[0] += 2 * 365 * DAY  # they are over
    assert answer(identity, bare(None, key=key))[0] == APPROVED


def test_of_two_servers_that_answer_a_request_at_once_both_give_one_certificate(identity: IdentityFolder) -> None:
    request = bare(identity.make_claim(None, HOUR))
    certificates = [identity.authority.issue_device("lab", "pi-1", request.csr) for _ in range(2)]
    assert certificates[0] != certificates[1]
    assert {identity.store.add_certificate(request, pem) for pem in certificates} == {certificates[0]}


def test_a_name_that_is_taken_leaves_the_claim_for_another(identity: IdentityFolder) -> None:
    answer(identity, bare(identity.make_claim(None, HOUR)))
    claim = identity.make_claim(None, HOUR)

    status, reason = answer(identity, bare(claim))
    assert (status, reason.startswith("another board is pi-1 already")) == (REFUSED, True)
    assert answer(identity, bare(claim, "fedprune-server"))[0] == REFUSED
    assert answer(identity, bare(claim, "pi-2"))[0] == APPROVED


def test_a_full_disk_keeps_the_server_s_old_certificate_in_use(
    identity: IdentityFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    NOW[0] += 700 * DAY
    before = ends(identity)
    with monkeypatch.context() as patched:
        patched.setattr(identity.authority, "issue_server", lambda _csr: (_ for _ in ()).throw(StorageError("full")))
        identity.tls_context()
    assert ends(identity) == before
    assert "no new certificate for the server yet: full" in caplog.text


def test_a_half_written_request_is_made_anew(tmp_path: Path) -> None:
    device = board(tmp_path / "board")
    first = device.request()
    assert device.request() == first
    (tmp_path / "board" / "request.json").write_bytes(first.to_bytes()[:50])
    second = device.request()
    assert second != first
    assert device.request() == second
