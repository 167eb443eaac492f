"""TLS as a board speaks it, with a server of Python's own on the other side."""

import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError, IdentityError
from fedprune.security.authority import Authority
from fedprune.security.certificates import make_request, make_tls_key, save_tls_key
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.tls import check_local_host, check_peer, pinned_context, unpinned_context
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.connection_failure import connection_failure

pytestmark = pytest.mark.board


class Peer:
    """A TLS server that greets whoever completes the handshake."""

    def __init__(self, certificate: Path, key: Path, authority: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._context.load_verify_locations(authority)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, suppress(OSError):
                    connection.settimeout(5)
                    with self._context.wrap_socket(connection, server_side=True) as secured:
                        secured.sendall(b"hello")
                        secured.recv(1)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority", "lab", clock=lambda: float(BUILD_TIME))


@pytest.fixture
def serve(authority: Authority, tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Serves with a certificate; gives the port."""
    with ExitStack() as stack:
        key = make_tls_key()
        save_tls_key(key, tmp_path / "server.key")

        def start(kind: str) -> int:
            request = make_request(key, "server")
            pem = (
                authority.issue_broker(["127.0.0.1", "localhost"], request, days=1)
                if kind == "broker"
                else authority.issue_device("lab", "localhost", request)
            )
            (tmp_path / "server.pem").write_text(pem)
            peer = Peer(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "authority" / "authority.pem")
            stack.callback(peer.close)
            return int(peer.port)

        yield start


def greeting(context: ssl.SSLContext, port: int, host: str = "127.0.0.1") -> bytes:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        return secured.recv(5)


def test_the_machine_s_clock_is_not_asked_and_the_time_floor_is(
    authority: Authority, serve: Callable[[str], int]
) -> None:
    """The broker's certificate ended a day after this software was built: long ago for any right clock."""
    ca = authority.crl_path.parent / "authority.pem"
    port, now = serve("broker"), [BUILD_TIME]
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        greeting(ssl.create_default_context(cafile=str(ca)), port)
    context = pinned_context(ca, None, None, lambda: now[0])

    assert greeting(context, port) == b"hello"
    assert greeting(context, port, "localhost") == b"hello"
    now[0] += 2 * 24 * 3600
    with pytest.raises(ssl.SSLCertVerificationError, match="its certificate ended on 2026-11-02") as caught:
        greeting(context, port)
    assert connection_failure(caught.value) == "TLS failed (its certificate ended on 2026-11-02)"


def test_all_else_is_checked(authority: Authority, serve: Callable[[str], int], tmp_path: Path) -> None:
    ca = authority.crl_path.parent / "authority.pem"
    port = serve("broker")
    context = pinned_context(ca, None, None, lambda: BUILD_TIME)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname mismatch") as caught:
        greeting(context, port, "other.example")
    assert "--ca" not in connection_failure(caught.value), "another authority can't help"
    assert "another address" in connection_failure(caught.value)
    foreign_authority = Authority.make(tmp_path / "other", "lab").crl_path.parent / "authority.pem"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)verify failed") as caught:
        greeting(pinned_context(foreign_authority, None, None, lambda: BUILD_TIME), port)
    assert "--ca" in connection_failure(caught.value)
    assert greeting(unpinned_context(), port) == b"hello"  # for joining alone: the answer proves itself


def test_a_device_can_t_pose_as_the_broker(authority: Authority, serve: Callable[[str], int]) -> None:
    context = pinned_context(authority.crl_path.parent / "authority.pem", None, None, lambda: BUILD_TIME)
    context.check_hostname = False  # so that its purpose alone is what is wrong
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)unsuitable certificate purpose|unsupported"):
        greeting(context, serve("device"))


def test_a_peer_without_a_certificate_is_refused() -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="no certificate"):
        check_peer(None, 0)


def test_missing_and_unfit_files_are_named(authority: Authority, tmp_path: Path) -> None:
    ca = authority.crl_path.parent / "authority.pem"
    save_tls_key(make_tls_key(), tmp_path / "other.key")
    with pytest.raises(IdentityError, match="none"):
        pinned_context(tmp_path / "none", None, None, lambda: 0)
    with pytest.raises(IdentityError, match=r"other\.key"):
        pinned_context(ca, ca, tmp_path / "other.key", lambda: 0)


def test_without_tls_nothing_leaves_the_machine() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_local_host(host)
    for host in ("192.0.2.1", "broker.example", "localhost.example", ""):
        with pytest.raises(ConfigError, match="without TLS"):
            check_local_host(host)


def test_a_board_says_that_its_broker_is_another_server_s(serve: Callable[[str], int], tmp_path: Path) -> None:
    """Authorities of one name, as of a server for which `init` was run again."""
    port = serve("broker")
    board = DeviceIdentity(tmp_path / "board", "lab", "attic")
    board_authority = Authority.make(tmp_path / "own", "lab").crl_path.parent / "authority.pem"
    shutil.copy(board_authority, board.folder / "authority.pem")
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        greeting(board.tls_context(with_certificate=False), port)
    assert "another server's" in connection_failure(caught.value)
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        greeting(board.tls_context(board_authority, with_certificate=False), port)
    assert "another server's" not in connection_failure(caught.value), "with --ca the authority may be the wrong one"
