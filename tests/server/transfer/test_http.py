"""The web server of blobs: each board gets what it is offered, over TLS, and nobody anything else."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ConfigError
from fedprune.security.certificates import save_tls_key
from fedprune.security.tls import pinned_context
from fedprune.wire.urls import BlobUrl
from fedprune_device.network.http_download import HttpFetch
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.storage.s3.bucket import BucketError
from fedprune_server.storage.s3.store import BucketStore
from fedprune_server.transfer import http_server
from fedprune_server.transfer.http import WebBlobs, web_blobs
from fedprune_server.transfer.http_server import BlobServer
from fedprune_server.transfer.served_job import ServedJob
from support.fakes.members import member_certificate
from support.processes.s3 import S3
from support.waiting import attempts

BLOB = np.random.default_rng(0).bytes(9 * LEAF_BYTES + 100)
REF = BlobRef.of(BLOB)
SECRET = BlobRef.of(b"an update of another board")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "blobs", durable=False)
    assert store.put(BLOB) == REF
    assert store.put(b"an update of another board") == SECRET
    return store


@pytest.fixture
def server(store: BlobStore) -> Iterator[BlobServer]:
    with BlobServer("127.0.0.1", 0, None) as server:
        server.jobs = [ServedJob(store, lambda device, sha256: sha256 == REF.sha256)]
        yield server


def everything(store: BlobStore) -> ServedJob:
    return ServedJob(store, lambda device, sha256: True)


def place(ref: BlobRef, suffix: str = "") -> str:
    return f"/{ref.sha256[:2]}/{ref.sha256}{suffix}"


def ask(
    server: BlobServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as answer:
            return answer.status, answer.read(), answer.headers


def test_a_blob_its_table_and_parts_of_them(server: BlobServer, store: BlobStore) -> None:
    assert ask(server, place(REF))[:2] == (200, BLOB)
    table = ask(server, place(REF, ".leaves"))
    assert table[:2] == (200, store.path(REF.sha256).with_name(f"{REF.sha256}.leaves").read_bytes())
    size = len(BLOB)
    for first, last in ((0, 0), (1, LEAF_BYTES), (LEAF_BYTES - 1, LEAF_BYTES), (5, size - 1), (size - 1, size + 7)):
        status, body, headers = ask(server, place(REF), Range=f"bytes={first}-{last}")
        assert (status, body) == (206, BLOB[first : last + 1])
        assert headers["Content-Range"] == f"bytes {first}-{min(last, len(BLOB) - 1)}/{len(BLOB)}"
    assert ask(server, place(REF), Range=f"bytes={LEAF_BYTES}-")[:2] == (206, BLOB[LEAF_BYTES:])
    assert ask(server, f"/any/prefix{place(REF)}")[:2] == (200, BLOB)
    status, body, headers = ask(server, place(REF), "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(BLOB)))


def test_a_range_beyond_the_end_is_refused(server: BlobServer) -> None:
    status, body, headers = ask(server, place(REF), Range=f"bytes={len(BLOB)}-")
    assert (status, body, headers["Content-Range"]) == (416, b"", f"bytes */{len(BLOB)}")


@pytest.mark.parametrize(
    "path",
    [
        f"/{REF.sha256[:2]}/",
        place(SECRET),
        place(SECRET, ".leaves"),
        place(REF) + "?x",
        f"/00/{REF.sha256}",
        f"/%2e%2e/{REF.sha256[:2]}/{REF.sha256}",
        f"/{REF.sha256[:2]}/../../identity/signing.key",
        place(BlobRef.of(b"nowhere")),
    ],
)
def test_nothing_else_can_be_had(server: BlobServer, path: str) -> None:
    assert ask(server, path)[:2] == (404, b"")


def test_nothing_can_be_had_before_it_is_given_and_nothing_can_be_put() -> None:
    with BlobServer("127.0.0.1", 0, None) as server:
        for method in ("GET", "PUT"):
            assert ask(server, place(REF), method)[0] == 404
        for method in ("POST", "DELETE", "OPTIONS"):
            assert ask(server, place(REF), method)[0] == 501


def test_a_blob_that_has_vanished_or_is_damaged_is_not_given(server: BlobServer, store: BlobStore) -> None:
    store.delete(REF.sha256)
    assert ask(server, place(REF))[:2] == (404, b"")
    store.path(REF.sha256).write_bytes(BLOB[:-1] + b"?")
    assert ask(server, place(REF))[:2] == (404, b"")


def test_a_long_head_is_cut_off(server: BlobServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\n" + b"X-Much: " + b"a" * 20_000)
        with suppress(ConnectionResetError):
            assert client.recv(12) in (b"", b"HTTP/1.1 400")


def test_who_says_nothing_loses_its_place(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with BlobServer("127.0.0.1", 0, None, connections=3) as server, ExitStack() as stack:
        server.jobs = [everything(store)]
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10)) for _ in range(8)]
        assert ask(server, place(REF))[:2] == (200, BLOB)  # the longest made room
        assert sum(_is_closed(c) for c in clients) >= 5
    monkeypatch.setattr(http_server, "FIRST_REQUEST_TIMEOUT_S", 0.2)
    with (
        BlobServer("127.0.0.1", 0, None) as server,
        socket.create_connection(("127.0.0.1", server.port), 10) as client,
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        for _ in attempts("the server's end of the connection", pause_s=0.05):
            client.sendall(b"G")  # now and then a byte, so that no socket's time-out ends


def _is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_a_port_that_is_taken_is_one_clear_error(server: BlobServer) -> None:
    with pytest.raises(ConfigError, match=str(server.port)):
        BlobServer("127.0.0.1", server.port, None)


class Fleet:
    """A server with an identity, boards with certificates, and what they are offered."""

    def __init__(self, root: Path, store: BlobStore) -> None:
        self.root, self.store = root, store
        self.identity = IdentityFolder.make(root / "state", "default")
        self.offers: dict[str, set[str]] = {}

    def allowed_orders(self, device: str | None, sha256: str) -> bool:
        return sha256 in self.offers.get(device or "", ())

    def certify(self, device: str) -> None:
        issued, key = member_certificate(self.identity, device)
        save_tls_key(key, self.root / f"{device}.key")
        (self.root / f"{device}.pem").write_text(issued)

    def fetch(self, device: str | None, web: WebBlobs, ref: BlobRef = REF) -> str:
        def context() -> ssl.SSLContext:
            files = (None, None) if device is None else (self.root / f"{device}.pem", self.root / f"{device}.key")
            return pinned_context(self.identity.path / "authority.pem", *files, lambda: 0)

        store = BlobStore(self.root / f"of-{device}", durable=False)
        store.delete(ref.sha256)
        fetch = HttpFetch(store, BlobUrl.parse(web.url), [ref], context)
        fetch.join(20)
        assert fetch.failure or store.has(ref.sha256)
        return fetch.failure


@pytest.fixture
def fleet(tmp_path: Path, store: BlobStore) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, store)
    yield fleet
    fleet.identity.close()


def test_each_board_gets_what_it_is_offered_until_it_is_revoked(fleet: Fleet, store: BlobStore) -> None:
    for device in ("attic", "cellar"):
        fleet.certify(device)
    fleet.offers = {"attic": {REF.sha256}, "cellar": {SECRET.sha256}}
    with web_blobs(ServerConfig(state=fleet.root / "state", serve_blobs="0"), fleet.identity) as web:
        assert web.url is not None
        assert web.url.startswith("https://127.0.0.1:")
        assert "answers 404" in fleet.fetch("attic", web)  # nothing is given yet
        web.serve([served := ServedJob(store, fleet.allowed_orders)])
        assert fleet.fetch("attic", web) == ""
        assert "answers 404" in fleet.fetch("cellar", web)
        assert "answers 404" in fleet.fetch("attic", web, SECRET)
        assert fleet.fetch("cellar", web, SECRET) == ""
        assert fleet.fetch(None, web) != ""
        assert web.server is not None
        assert web.server.sent > len(BLOB)
        sent_bytes = served.take_sent_bytes()
        assert sum(sent_bytes.values()) == web.server.sent
        assert len(BLOB) < sent_bytes["attic"] < len(BLOB) + 2 * LEAF_BYTES
        assert 0 < sent_bytes["cellar"] < LEAF_BYTES
        assert served.take_sent_bytes() == {}
        fleet.identity.revoke("attic")
        assert "answers" not in (refused := fleet.fetch("attic", web))
        assert refused
        assert fleet.fetch("cellar", web, SECRET) == ""


def test_a_revoked_board_resumes_no_session(fleet: Fleet, store: BlobStore) -> None:
    fleet.certify("attic")
    fleet.offers = {"attic": {REF.sha256}}
    files = fleet.root / "attic.pem", fleet.root / "attic.key"
    context = pinned_context(fleet.identity.path / "authority.pem", *files, lambda: 0)

    def status(web: WebBlobs, session: ssl.SSLSession | None) -> tuple[int, ssl.SSLSession | None]:
        """The answer's number, 0 for none, and the session as the server has left it."""
        assert web.server is not None
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", web.server.port), 10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as client,
        ):
            client.sendall(f"GET {place(REF)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = client.recv(100)
            return int(head.split()[1]) if head else 0, client.session
        return 0, None

    with web_blobs(ServerConfig(state=fleet.root / "state", serve_blobs="0"), fleet.identity) as web:
        web.serve([ServedJob(store, fleet.allowed_orders)])
        first, session = status(web, None)
        assert first == 200
        fleet.identity.revoke("attic")
        assert status(web, session)[0] == 0


def test_an_earlier_tls_in_which_sessions_are_resumed_is_not_spoken(fleet: Fleet) -> None:
    fleet.certify("attic")
    files = fleet.root / "attic.pem", fleet.root / "attic.key"
    context = pinned_context(fleet.identity.path / "authority.pem", *files, lambda: 0)
    with web_blobs(ServerConfig(state=fleet.root / "state", serve_blobs="0"), fleet.identity) as web:
        assert web.server is not None
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context.minimum_version = context.maximum_version = version
            with socket.create_connection(("127.0.0.1", web.server.port), 10) as plain, ExitStack() as refused:
                if version is not ssl.TLSVersion.TLSv1_3:
                    refused.enter_context(pytest.raises(ssl.SSLError))
                context.wrap_socket(plain, server_hostname="127.0.0.1").close()


def test_without_identities_anybody_on_this_machine_gets_what_is_offered(store: BlobStore) -> None:
    with web_blobs(ServerConfig(serve_blobs="127.0.0.1:0"), None) as web:
        web.serve([ServedJob(store, lambda device, sha256: device is None and sha256 == REF.sha256)])
        assert web.url is not None
        assert web.url.startswith("http://127.0.0.1:")
        assert web.server is not None
        assert ask(web.server, place(REF))[:2] == (200, BLOB)
        assert ask(web.server, place(SECRET))[0] == 404
    with pytest.raises(ConfigError, match="serve_blobs"), web_blobs(ServerConfig(serve_blobs="0.0.0.0:0"), None):
        pass


def test_nobody_waits_for_a_bucket(at_s3: S3, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, f"s3://{at_s3.bucket()}/job")
    store.retry.is_endless = True
    here, away = store.put(BLOB), store.put(b"let go of")
    store._delete_cached(away.sha256)

    def refuse(key: str, limit: int) -> bytes | None:
        raise BucketError("the bucket is away")

    store.bucket.get = refuse  # type: ignore[method-assign]
    try:
        with web_blobs(ServerConfig(serve_blobs="127.0.0.1:0"), None) as web:
            assert web.server is not None
            web.serve([everything(store.local())])
            assert ask(web.server, place(away))[0] == 404
            assert ask(web.server, place(here))[:2] == (200, BLOB)
    finally:
        store.close()


def test_what_somebody_else_serves_is_only_named() -> None:
    with web_blobs(ServerConfig(), None) as web:
        assert (web.url, web.server) == (None, None)
    with web_blobs(ServerConfig(blob_url="https://models.example/fleet/"), None) as web:
        assert (web.url, web.server) == ("https://models.example/fleet", None)
    with web_blobs(ServerConfig(blob_url="http://localhost:9/x", serve_blobs="127.0.0.1:0"), None) as web:
        assert web.url == "http://localhost:9/x"
        assert web.server is not None


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("serve_blobs", ":80"),
        ("serve_blobs", "host:99999"),
        ("blob_url", "http://models.example"),
        ("blob_url", "https://u:p@h"),
    ],
)
def test_a_wrong_address_is_refused(setting: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=setting) as caught:
        ServerConfig(**{setting: wrong})
    assert "u:p" not in str(caught.value)
