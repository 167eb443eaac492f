"""`fedprune-server init`, `claim`, `devices` and `broker-config`."""

import errno
import json
import shlex
import ssl
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ExitCode
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune_server.cli.main import build_parser, main
from fedprune_server.devices.crash_store import CrashStore
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.storage.folder_lock import folder_lock
from support.faults.power_cuts import CutError, power

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def state(tmp_path: Path, capsys: Captured) -> str:
    path = str(tmp_path / "state")
    assert main(["init", "--state", path, "--site", "lab"]) == ExitCode.OK
    assert "pin of the authority" in capsys.readouterr().out
    return path


def test_the_command_that_an_empty_folder_needs_can_be_pasted(tmp_path: Path, capsys: Captured) -> None:
    folder = str(tmp_path / "a folder")
    assert main(["identity", "--state", folder]) == ExitCode.IDENTITY
    _, command, _ = capsys.readouterr().err.split("`")
    assert [main(words) for words in (shlex.split(command)[1:], ["identity", "--state", folder])] == [ExitCode.OK] * 2


def asks(state: str, folder: Path, name: str, claim: JoinClaim | None = None) -> tuple[DeviceIdentity, str]:
    """A board asks; its identity, and what it is told."""
    device = DeviceIdentity(folder, "lab", name)
    with IdentityFolder(Path(state)) as identity:
        answer = EnrollmentService(identity).answer(device.request(claim))
        if answer.status == "approved":
            device.admit(answer, identity.authority.pin)
    return device, answer.status


def statuses_by_device(state: str, capsys: Captured) -> dict[str, list[str]]:
    capsys.readouterr()
    assert main(["devices", "--state", state, "--json"]) == ExitCode.OK
    statuses: dict[str, list[str]] = {}
    for row in json.loads(capsys.readouterr().out):
        statuses.setdefault(row["device"], []).append(row["status"])
    return statuses


def test_claims_are_printed_one_a_line_and_let_boards_in(state: str, tmp_path: Path, capsys: Captured) -> None:
    assert main(["claim", "--state", state, "--count", "3"]) == ExitCode.OK
    assert main(["claim", "--state", state, "--device", "attic", "shed"]) == ExitCode.OK
    claims = [JoinClaim.parse(line) for line in capsys.readouterr().out.splitlines()]
    assert len(claims) == len({c.secret for c in claims}) == 5
    assert [c.device for c in claims] == [None, None, None, "attic", "shed"]

    assert asks(state, tmp_path / "1", "pi-1", claims[0])[1] == "approved"
    assert asks(state, tmp_path / "2", "cellar", claims[3])[1] == "refused"
    assert asks(state, tmp_path / "3", "attic", claims[3])[1] == "approved"
    assert statuses_by_device(state, capsys) == {"attic": ["approved"], "pi-1": ["approved"]}
    with CrashStore(Path(state)) as store:
        store.note_warnings("attic", [{"at": 9, "text": "the disk is full\x1b[2J"}])
        store.save()
    assert main(["devices", "attic", "--state", state]) == ExitCode.OK
    row, warning = capsys.readouterr().out.splitlines()
    assert (row.split()[0], warning.isprintable(), "the disk is full" in warning) == ("attic", True, True)
    assert main(["devices", "attic", "--json", "--state", state]) == ExitCode.OK
    assert [w["at"] for w in json.loads(capsys.readouterr().out)[0]["warnings"]] == [9]


@pytest.mark.parametrize("words", ["--device attic shed", "--devices attic,shed", "--device=attic, --devices shed"])
@pytest.mark.parametrize("command", ["claim", "rollout start release"])
def test_boards_are_listed_alike_wherever_they_are_listed(command: str, words: str) -> None:
    assert build_parser().parse_args([*command.split(), *words.split()]).devices == ["attic", "shed"]


@pytest.mark.parametrize("source", ["file", "init"])
def test_members_are_in_the_database_that_is_named(
    state: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    if source == "file":
        (tmp_path / "url").write_text(f"{url}\n")
        monkeypatch.setenv("FEDPRUNE_SERVER_DATABASE_FILE", str(tmp_path / "url"))
    else:
        state = str(tmp_path / "new")
        assert main(["init", "--state", state, "--database", url]) == ExitCode.OK
    with IdentityFolder(Path(state), database=url) as identity:
        identity.store.request_approval("attic", "ab" * 32, 1)
    capsys.readouterr()
    assert main(["devices", "--state", state]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("attic")
    assert main(["devices", "revoke", "--state", state, "attic"]) == ExitCode.OK
    with IdentityFolder(Path(state), database=url) as identity:
        assert [d.status for d in identity.store.devices()] == ["revoked"]
    assert not (Path(state) / "server.db").exists()


def test_the_console_gets_a_certificate_for_the_names_that_are_given(state: str, capsys: Captured) -> None:
    assert main(["identity", "certificate", "--state", state]) == ExitCode.USAGE
    assert main(["identity", "--host", "fleet.example", "--state", state]) == ExitCode.USAGE
    capsys.readouterr()
    words = ["identity", "certificate", "--host", "fleet.example", "--host", "10.0.0.9", "--state", state]
    assert main(words) == ExitCode.OK
    lines = (line.split(" = ") for line in capsys.readouterr().out.splitlines())
    settings = {name: json.loads(value) for name, value in lines}
    certificate, key = (Path(settings[f"console_{name}"]) for name in ("certificate", "key"))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    server.load_cert_chain(certificate, key)
    client.load_verify_locations(Path(state) / "identity" / "authority.pem")
    for host in ("fleet.example", "10.0.0.9"):
        shake_hands(client, server, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client, server, "other.example")
    capsys.readouterr()
    assert main([*words, "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["console_key"] == str(key)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """The client's side of a handshake, up to its check of the server's certificate."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    mine, its = client.wrap_bio(back, there, server_hostname=host), server.wrap_bio(there, back, server_side=True)
    for side in (mine, its, mine):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()


def test_claims_go_to_a_new_file_that_its_owner_alone_reads(state: str, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "claims"
    capsys.readouterr()
    assert main(["claim", "--state", state, "--count", "2", "--hours", "24", "--out", str(out)]) == ExitCode.OK
    assert capsys.readouterr().out.startswith(f"{out}: 2 claims for any name that is free, valid until ")
    assert len({JoinClaim.parse(line).id for line in out.read_text().splitlines()}) == 2
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert main(["claim", "--state", state, "--out", str(out)]) == ExitCode.USAGE
    assert main(["claim", "--state", state, "--out", str(tmp_path / "no" / "folder")]) == ExitCode.STORAGE
    assert capsys.readouterr().out == ""


def test_the_operator_lets_in_the_board_whose_fingerprint_is_right(
    state: str, tmp_path: Path, capsys: Captured
) -> None:
    right, status = asks(state, tmp_path / "1", "pi-1")
    asks(state, tmp_path / "2", "pi-1")
    assert status == "waiting"
    approve = ["devices", "--state", state, "approve", "pi-1"]
    assert main([*approve, "--key", "0000-0000-0000-0000-0000"]) == ExitCode.JOIN
    assert "no key with this fingerprint waits as pi-1" in capsys.readouterr().err

    assert main([*approve, "--key", right.key.verifying_key.fingerprint.upper()]) == ExitCode.OK

    assert statuses_by_device(state, capsys) == {"pi-1": ["approved"]}
    assert asks(state, tmp_path / "1", "pi-1")[1] == "approved"
    assert main([*approve, "--key", right.key.verifying_key.fingerprint]) == ExitCode.JOIN


def test_nobody_is_let_in_before_the_fingerprint_was_compared(state: str, tmp_path: Path, capsys: Captured) -> None:
    waits, _ = asks(state, tmp_path / "1", "pi-1")  # alone under its name, and still another's, perhaps
    capsys.readouterr()

    assert main(["devices", "--state", state, "approve", "pi-1"]) == ExitCode.USAGE

    captured = capsys.readouterr()
    assert "--key FINGERPRINT, as the board shows it" in captured.err
    assert waits.key.verifying_key.fingerprint not in captured.out + captured.err  # nothing to copy without looking
    assert statuses_by_device(state, capsys) == {"pi-1": ["waiting"]}


def test_a_board_that_is_gone_is_revoked_or_replaced(state: str, tmp_path: Path, capsys: Captured) -> None:
    main(["claim", "--state", state])
    asks(state, tmp_path / "1", "pi-1", JoinClaim.parse(capsys.readouterr().out.strip()))

    assert main(["devices", "--state", state, "replace", "pi-1"]) == ExitCode.OK
    printed = capsys.readouterr()
    text = printed.out.strip()
    message, where = printed.err.splitlines()
    assert message == "pi-1: 1 key and 1 certificate revoked."
    assert "crl.pem" in where
    assert asks(state, tmp_path / "1", "pi-1")[1] == "refused"
    assert asks(state, tmp_path / "2", "pi-1", JoinClaim.parse(text))[1] == "approved"
    assert main(["devices", "revoke", "pi-1", "--state", state]) == ExitCode.OK
    assert statuses_by_device(state, capsys) == {"pi-1": ["revoked", "revoked"]}
    assert main(["devices", "--state", state, "revoke", "pi-1"]) == ExitCode.JOIN
    assert "pi-1 is revoked already" in capsys.readouterr().err
    assert main(["devices", "--state", state, "list", "pi-2"]) == ExitCode.JOIN
    assert "no device pi-2 (did you mean 'pi-1'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "files"), [("mosquitto", {"mosquitto.conf", "acl", "acl-join"}), ("emqx", {"emqx.conf", "acl.conf"})]
)
def test_a_broker_s_files_are_written(state: str, tmp_path: Path, capsys: Captured, kind: str, files: set[str]) -> None:
    out = tmp_path / "broker"
    capsys.readouterr()
    command = ["broker-config", kind, "--state", state, "--host", "broker.example", "--out", str(out), "--at", "/etc/b"]
    assert main([*command, "--json"]) == ExitCode.OK

    assert {Path(name) for name in json.loads(capsys.readouterr().out)} == set(out.iterdir())
    assert {p.name for p in out.iterdir()} == {"authority.pem", "broker.pem", "broker.key", "crl.pem", *files}
    assert stat.S_IMODE((out / "broker.key").stat().st_mode) == 0o600
    assert "/etc/b/broker.key" in (out / f"{kind}.conf").read_text()


@pytest.mark.parametrize("name", ["authority.pem", "crl.pem", "epoch", "site", "../database"])
def test_root_gives_the_broker_nothing_through_a_link_of_the_servers_user(
    state: str, tmp_path: Path, capsys: Captured, name: str
) -> None:
    path, elsewhere, out = Path(state, "identity", name), tmp_path / "elsewhere", tmp_path / "broker"
    elsewhere.write_bytes(path.read_bytes() if path.exists() else f"sqlite:///{tmp_path}/db".encode())
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    assert main(["broker-config", "emqx", "--state", state, "--host", "b", "--out", str(out)]) != ExitCode.OK
    assert "a link, where a file is expected" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["claim", "--count", "2", "--device", "x"], ExitCode.USAGE, "--count and --device"),
        (["claim", "--device", "x", "x"], ExitCode.USAGE, "--device"),
        (["claim", "--device", "fedprune-server"], ExitCode.JOIN, "no device may be called 'fedprune-server'"),
        (["devices", "approve", "nobody", "--key", "0000-0000"], ExitCode.JOIN, "no such device waits"),
        (["broker-config", "mosquitto", "--host", "a b", "--out", "{out}"], ExitCode.IDENTITY, "host of a broker"),
        (["devices", "aprove", "x"], ExitCode.USAGE, "approve"),
        (["devices", "nobody"], ExitCode.JOIN, "no device nobody"),
        (["init"], ExitCode.IDENTITY, "has an identity already"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(
    state: str, tmp_path: Path, capsys: Captured, arguments: list[str], code: ExitCode, message: str
) -> None:
    full = [a.replace("{out}", str(tmp_path / "out")) for a in arguments]
    assert (
        main([full[0], "--state", state, *full[1:]] if full[0] != "broker-config" else [*full, "--state", state])
        == code
    )
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_keys_and_authority_are_replaced_while_no_server_runs(state: str, tmp_path: Path, capsys: Captured) -> None:
    def output_of(*words: str) -> str:
        capsys.readouterr()
        assert main([*words, "--state", state]) == ExitCode.OK
        return capsys.readouterr().out

    assert asks(state, tmp_path / "1", "pi-1", JoinClaim.parse(new_claim(state, capsys)))[1] == "approved"
    before, left = output_of("identity"), new_claim(state, capsys)
    with folder_lock(Path(state)):
        assert main(["identity", "replace", "--state", state]) == ExitCode.STORAGE
    assert output_of("identity") == before
    output = output_of("identity", "replace")
    assert "back the identity up" in output
    assert "fedprune-device join --new-key" in output
    assert output_of("identity") != before
    assert stat.S_IMODE((Path(state) / "identity" / "signing.key").stat().st_mode) == 0o600
    assert not list(Path(state).glob("identity.*")), "a copy of the old keys was left"
    assert output_of("devices").split()[:2] == ["pi-1", "revoked"]
    assert asks(state, tmp_path / "2", "pi-2", JoinClaim.parse(left))[1] == "refused"
    assert asks(state, tmp_path / "3", "pi-1", JoinClaim.parse(new_claim(state, capsys)))[1] == "approved"


def test_where_the_power_fails_while_an_identity_is_replaced_another_try_completes_it(state: str) -> None:
    with power(0, "before") as supply, IdentityFolder(Path(state)) as identity:
        identity.replace().close()
    for at in range(1, len(supply.names) + 1, 2):
        before = identity_of(state)
        with suppress(CutError), power(at, "before"), IdentityFolder(Path(state)) as identity:
            identity.replace().close()
        if not (Path(state) / "identity" / "site").exists():
            assert main(["init", "--state", state]) == ExitCode.OK  # as the error says, where there is no identity
        assert main(["identity", "replace", "--state", state]) == ExitCode.OK
        assert identity_of(state) != before
        assert not list(Path(state).glob("identity.*")), "a copy of the old keys was left"


def identity_of(state: str) -> tuple[str, str]:
    with IdentityFolder(Path(state), read_only=True) as identity:
        return identity.key.verifying_key.hex, identity.authority.pin.hex()


def new_claim(state: str, capsys: Captured) -> str:
    capsys.readouterr()
    assert main(["claim", "--state", state]) == ExitCode.OK
    return capsys.readouterr().out.strip()


def test_a_file_of_claims_is_whole_or_not_there(
    state: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_claim, claims = IdentityFolder.make_claim, []

    def claim(*arguments: Any) -> JoinClaim:
        if claims:
            raise OSError(errno.ENOSPC, "No space left on device")
        claims.append(make_claim(*arguments))
        return claims[0]

    monkeypatch.setattr(IdentityFolder, "make_claim", claim)
    out = tmp_path / "claims"
    assert main(["claim", "--state", state, "--count", "2", "--out", str(out)]) == ExitCode.STORAGE_FULL
    assert not out.exists()
    monkeypatch.undo()
    assert main(["claim", "--state", state, "--count", "2", "--out", str(out)]) == ExitCode.OK
