"""How a board joins and stays a member, with its command line and code, over the embedded broker."""

import os
import shutil
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fedprune.core.errors import BrokerError, ConfigError, ExitCode, IdentityError, JoinError
from fedprune.security.certificates import read_certificate
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune.security.keys import grouped_digits
from fedprune.wire.link import BrokerLink
from fedprune_device.cli.main import main
from fedprune_device.network import enrollment
from fedprune_device.network.enrollment import enrol, join_urls
from fedprune_device.network.membership import Renewal
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.authentication import AuthenticatedLink
from fedprune_server.messaging.broker.embedded import EmbeddedBroker
from fedprune_server.messaging.broker.programs import TlsFiles
from fedprune_server.messaging.connection import open_identity
from support.processes.machine import free_port
from support.waiting import until

Captured = pytest.CaptureFixture[str]


class Server:
    """A server's identity, its broker, and a thread that answers requests to join."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.identity = stack.enter_context(IdentityFolder.make(folder, "lab"))
        broker = stack.enter_context(
            EmbeddedBroker(port=0, tls=TlsFiles(*self.identity.listener_files("broker", ["127.0.0.1"]), "lab"))
        )
        self.url, self.join_url = broker.url, join_urls(broker.url)[0]
        link = BrokerLink(broker.url, "server", tls=self.identity.tls_context)
        stack.callback(link.close)
        link.subscribe(["fedprune/1/lab/+/-/join"])
        link.start()
        running = stack.enter_context(IdentityFolder(folder))  # as another process has it
        self._sign_answer, self._stop = AuthenticatedLink(link, running), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        stack.callback(self._thread.join)
        stack.callback(self._stop.set)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._sign_answer.get(0.05)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrollment, "_REQUEST_INTERVAL_S", 0.3)
    monkeypatch.setattr(enrollment, "_APPROVAL_INTERVAL_S", 0.3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(tmp_path / "server", stack)


def claim_file(server: Server, path: Path, device: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(server.identity.make_claim(device, 3600).text + "\n")
    return path


def join(server: Server, state: Path, *options: str, device: str = "attic") -> int:
    return main(["join", "--broker", server.url, "--site", "lab", "--device", device, "--state", str(state), *options])


def test_a_board_joins_with_the_claim_in_its_state_folder_which_is_gone_then(
    server: Server, tmp_path: Path, capsys: Captured
) -> None:
    claim = claim_file(server, tmp_path / "board" / "claim")
    assert join(server, tmp_path / "board") == ExitCode.OK
    board = DeviceIdentity(tmp_path / "board" / "identity", "lab", "attic")
    assert board.has_joined
    assert server.identity.store.key_of("attic") == board.key.verifying_key.hex
    assert not claim.exists()
    assert board.key.verifying_key.fingerprint in capsys.readouterr().err
    secrets = [p for p in (tmp_path / "board" / "identity").iterdir() if p.suffix == ".key"]
    assert [stat.S_IMODE(p.stat().st_mode) for p in secrets] == [0o600] * len(secrets) != []
    assert join(server, tmp_path / "board") == ExitCode.OK
    assert "is a member already" in capsys.readouterr().out


def test_a_claim_that_does_not_count_is_one_clear_error_and_stays(
    server: Server, tmp_path: Path, capsys: Captured
) -> None:
    claim = claim_file(server, tmp_path / "board" / "claim", device="shed")
    assert join(server, tmp_path / "board") == ExitCode.JOIN
    assert "expected one for attic, got one for shed" in capsys.readouterr().err
    claim.write_text(claim.read_text().partition("@")[0])  # the server knows the device without its name
    assert join(server, tmp_path / "board") == ExitCode.JOIN
    assert "refuses attic: the claim is for another device" in capsys.readouterr().err
    assert claim.exists()
    claim.write_text("FP1-NONSENSE")
    assert join(server, tmp_path / "board") == ExitCode.JOIN
    claim.unlink()
    assert join(server, tmp_path / "board") == ExitCode.IDENTITY
    assert "--claim" in capsys.readouterr().err


def test_without_a_claim_the_operator_lets_a_board_in_that_knows_the_pin(
    server: Server, tmp_path: Path, capsys: Captured
) -> None:
    pin = grouped_digits(server.identity.authority.pin.hex())
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(join(server, tmp_path / "board", "--pin", pin)))
    thread.start()
    # The output is read when the thread has ended: capsys loses what is written while it reads.
    (waiting,) = until(server.identity.store.devices)
    assert waiting.status == "waiting"
    server.identity.store.approve("attic", waiting.key, 0)
    thread.join(60)
    assert codes == [ExitCode.OK]
    assert "waiting for the operator" in capsys.readouterr().err
    assert join(server, tmp_path / "other", "--pin", "12-34") == ExitCode.USAGE


def test_insecure_and_a_broker_of_a_fleet_with_an_identity_exclude_each_other(tmp_path: Path, capsys: Captured) -> None:
    words = ["--broker", "mqtts://127.0.0.1", "--device", "attic", "--state", str(tmp_path / "b"), "--data", "x.npz"]
    assert main(["run", *words, "--insecure"]) == ExitCode.CONFIG
    assert "--insecure: expected a broker at mqtt://" in capsys.readouterr().err
    with (
        pytest.raises(ConfigError, match="leave --insecure out"),
        open_identity(ServerConfig(broker="mqtts://127.0.0.1"), insecure=True),
    ):
        pass


def test_an_answer_of_another_server_is_not_believed(server: Server, tmp_path: Path) -> None:
    with IdentityFolder.make(tmp_path / "other", "lab") as impostor:
        claim = impostor.make_claim(None, 3600)
    board = DeviceIdentity(tmp_path / "board", "lab", "attic")
    messages: list[str] = []
    with pytest.raises(JoinError, match="didn't count"):
        enrol(board, [server.join_url], JoinClaim.parse(claim.text), patience_s=3, report=messages.append)
    assert not board.has_joined
    assert any("doesn't count" in line for line in messages)


def test_where_nobody_answers_the_next_address_is_tried_and_a_stop_ends_it(server: Server, tmp_path: Path) -> None:
    closed = f"mqtts://127.0.0.1:{free_port()}"
    board = DeviceIdentity(tmp_path / "board", "lab", "attic")
    messages: list[str] = []
    assert enrol(
        board, [closed, server.join_url], server.identity.make_claim(None, 3600), patience_s=30, report=messages.append
    )
    assert board.has_joined
    assert messages == []  # what failed first is no news where the next one answers
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(BrokerError):
        enrol(DeviceIdentity(tmp_path / "b", "lab", "b"), [closed], None, b"x" * 12, stopped=stopped)
    with pytest.raises(BrokerError, match="127"):
        enrol(DeviceIdentity(tmp_path / "b", "lab", "b"), [closed], None, b"x" * 12, patience_s=0.5)
    with pytest.raises(IdentityError):
        enrol(DeviceIdentity(tmp_path / "b", "lab", "b"), [closed], None)


def test_a_certificate_is_renewed_over_the_same_broker_and_works(server: Server, tmp_path: Path) -> None:
    board = DeviceIdentity(tmp_path / "board", "lab", "attic")
    enrol(board, [server.join_url], server.identity.make_claim(None, 3600), patience_s=30)
    before = (tmp_path / "board" / "device.pem").read_bytes()
    Renewal(board, [server.url], lambda: True).renew(30)
    after = (tmp_path / "board" / "device.pem").read_bytes()
    old, new = (read_certificate(pem, "certificate") for pem in (before, after))
    assert old.public_key() != new.public_key()
    with BrokerLink(server.url, "board", tls=board.tls_context) as link:
        link.start()
    server.identity.revoke("attic")
    with pytest.raises(JoinError):
        Renewal(board, [server.url], lambda: True).renew(30)
    assert (tmp_path / "board" / "device.pem").read_bytes() == after


class Stranger:
    """Who answers in the broker's place, with a certificate of its own making; it notes what clients say first."""

    def __init__(self, folder: Path) -> None:
        with IdentityFolder.make(folder, "lab") as identity:
            certificate, key, _ = identity.listener_files("broker", ["127.0.0.1"])
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtts://fleet:hunter2@127.0.0.1:{self.listener.getsockname()[1]}"
        self.heard = b""
        self.clients = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self.listener.accept()
                self.clients += 1
                with suppress(OSError), self.context.wrap_socket(raw, server_side=True) as client:
                    client.settimeout(1)
                    self.heard += client.recv(4096)


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("who", ["new", "with an authority", "member"])
def test_a_stranger_hears_no_password_whoever_asks(server: Server, tmp_path: Path, who: str) -> None:
    board = DeviceIdentity(tmp_path / "board", "lab", "attic")
    claim, authority = server.identity.make_claim(None, 3600), None
    if who == "member":
        enrol(board, [server.join_url], claim, patience_s=30)
    if who == "with an authority":
        authority = server.identity.path / "authority.pem"
    stranger = Stranger(tmp_path / "stranger")
    pin = board.pin if who == "member" else None
    with pytest.raises(BrokerError):
        enrol(board, [stranger.url], None if pin else claim, pin, authority=authority, patience_s=3)
    stranger.listener.close()
    assert stranger.clients > 0
    assert b"hunter2" not in stranger.heard
    assert b"fleet" not in stranger.heard
    assert bool(stranger.heard) == (who == "new")  # who knows an authority says nothing to others at all


def test_a_new_key_costs_the_old_identity_only_if_it_is_let_in(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "board" / "identity"
    claim_file(server, tmp_path / "board" / "claim")
    assert join(server, tmp_path / "board") == ExitCode.OK
    first = DeviceIdentity(folder, "lab", "attic").key.verifying_key.hex

    def has_first_key() -> bool:
        return DeviceIdentity(folder, "lab", "attic").key.verifying_key.hex == first

    nowhere = ["join", "--new-key", "--site", "lab", "--device", "attic", "--state", str(tmp_path / "board")]
    assert main(nowhere) == ExitCode.CONFIG
    assert has_first_key()
    assert join(server, tmp_path / "board", "--new-key") == ExitCode.IDENTITY  # neither claim nor pin
    assert has_first_key()
    with DeviceStore(tmp_path / "board"):  # a service that runs
        assert join(server, tmp_path / "board", "--new-key") == ExitCode.STORAGE
    assert has_first_key()
    claim_file(server, tmp_path / "board" / "claim", device="shed")
    assert join(server, tmp_path / "board", "--new-key") == ExitCode.JOIN
    assert has_first_key()
    assert not (tmp_path / "board" / "identity.old").exists()
    server.identity.revoke("attic")
    claim_file(server, tmp_path / "board" / "claim", device="attic")
    assert join(server, tmp_path / "board", "--new-key") == ExitCode.OK
    assert not has_first_key()
    assert server.identity.store.key_of("attic") == DeviceIdentity(folder, "lab", "attic").key.verifying_key.hex


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (["signing.key"], "signing.key"),
        (["tls.key"], "tls.key"),
        (["device.pem", "server.pub"], "device.pem, server.pub"),
    ],
)
def test_a_folder_that_was_restored_in_part_is_one_clear_error_and_no_new_identity(
    server: Server, tmp_path: Path, capsys: Captured, lost: list[str], named: str
) -> None:
    folder = tmp_path / "board" / "identity"
    claim_file(server, tmp_path / "board" / "claim")
    assert join(server, tmp_path / "board") == ExitCode.OK
    for name in lost:
        (folder / name).unlink()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert join(server, tmp_path / "board") == ExitCode.IDENTITY
    assert named in (text := capsys.readouterr().err)
    assert "join --new-key" in text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_copy_of_another_boards_identity_is_refused(server: Server, tmp_path: Path, capsys: Captured) -> None:
    claim_file(server, tmp_path / "board" / "claim")
    assert join(server, tmp_path / "board") == ExitCode.OK
    shutil.copytree(tmp_path / "board" / "identity", tmp_path / "copy" / "identity")
    assert join(server, tmp_path / "copy", device="shed") == ExitCode.IDENTITY
    assert "expected a certificate for shed of site lab, got one for attic of site lab" in capsys.readouterr().err
    with pytest.raises(IdentityError, match="for attic of site barn, got one for attic of site lab"):
        DeviceIdentity(tmp_path / "copy" / "identity", "barn", "attic")


def test_public_files_stay_readable_whatever_umask_root_has(tmp_path: Path) -> None:
    """Root may revoke a board; the service reads the folder as its own user."""
    before = os.umask(0o077)
    try:
        with IdentityFolder.make(tmp_path, "lab") as identity:
            identity.revoke("attic")
            identity.listener_files("broker", ["localhost"])
    finally:
        os.umask(before)
    public = {p.name for p in (tmp_path / "identity").iterdir() if p.stat().st_mode & 0o077}
    assert public == {"site", "authority.pem", "crl.pem", "server.pem", "broker.pem"}
    assert all((tmp_path / "identity" / name).stat().st_mode & 0o777 == 0o644 for name in public)
