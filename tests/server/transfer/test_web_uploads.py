"""Updates uploaded to the server's own web server: only what is awaited, from whom it is awaited, whole and right."""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.security.certificates import save_tls_key
from fedprune.security.tls import pinned_context
from fedprune.wire.messages import PUT_ABILITY, UploadRequest
from fedprune.wire.urls import UploadUrl
from fedprune_device.network.update_sender import HttpUpload
from fedprune_export.importing import import_onnx
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.server import Server
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.simulation.digits import digits_model
from fedprune_server.storage.s3.store import BucketStore
from fedprune_server.transfer import http_server
from fedprune_server.transfer.http import WebBlobs, web_blobs
from fedprune_server.transfer.http_server import BlobServer
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.served_job import ServedJob
from fedprune_server.transfer.upload_place import UploadEnd
from fedprune_server.transfer.web_uploads import HttpUploads
from support.fakes.fleet import SIZE, Fleet, ToyWorker, counted_devices, models
from support.fakes.members import member_certificate
from support.fakes.secure_fleet import SecureFleet
from support.processes.s3 import S3
from support.waiting import until

UPDATE = np.random.default_rng(1).bytes(5 * LEAF_BYTES + 77)
REF = BlobRef.of(UPDATE)
OTHER_REF = BlobRef.of(b"an update of another job")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", durable=False)


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer("127.0.0.1", 0, None) as server:
        yield server


@pytest.fixture
def uploads(server: BlobServer, store: BlobStore) -> HttpUploads:
    uploads = HttpUploads(store, f"http://127.0.0.1:{server.port}/x")
    server.jobs = [ServedJob(store, lambda device, sha256: True, uploads)]
    uploads.request_upload("pi", REF)
    return uploads


def path_of(ref: BlobRef) -> str:
    return f"/x/{ref.sha256[:2]}/{ref.sha256}"


def put(server: BlobServer, body: bytes = UPDATE, path: str = path_of(REF), **headers: str | None) -> int:
    """The status of a PUT, with the right length by default; 0 if the server hangs up instead."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.putrequest("PUT", path)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        with suppress(ConnectionError):
            connection.endheaders(body)
        try:
            return connection.getresponse().status
        except (http.client.HTTPException, OSError):
            return 0


def left_over(uploads: HttpUploads) -> list[Path]:
    return [*(uploads.store.root / "tmp").iterdir(), *(uploads.store.root / "partial").iterdir()]


def test_an_update_is_stored_once_with_its_leaf_table(server: BlobServer, uploads: HttpUploads) -> None:
    assert uploads.request_upload("pi", REF).url == f"http://127.0.0.1:{server.port}{path_of(REF)}"
    assert put(server) == 201
    assert uploads.store.read(REF.sha256) == UPDATE
    assert uploads.store.ref(REF.sha256) == REF
    assert uploads.take_ended() == [UploadEnd("pi", REF, stored=True)]
    assert uploads.take_byte_counts() == {"pi": len(UPDATE)}
    assert server.received == 1
    assert put(server) == 404  # a second time
    assert uploads.take_ended() == []
    assert left_over(uploads) == []


@pytest.mark.parametrize("size", [0, LEAF_BYTES, LEAF_BYTES + 1])
def test_updates_of_any_length(server: BlobServer, uploads: HttpUploads, size: int) -> None:
    body = UPDATE[:size]
    uploads.request_upload("pi", BlobRef.of(body))
    assert put(server, body, path_of(BlobRef.of(body))) == 201
    assert uploads.store.ref(BlobRef.of(body).sha256) == BlobRef.of(body)


def test_a_connection_is_kept_for_what_follows(server: BlobServer, uploads: HttpUploads) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("PUT", path_of(REF), UPDATE)
        with connection.getresponse() as answer:
            assert (answer.status, answer.read()) == (201, b"")
        connection.request("GET", path_of(REF))
        with connection.getresponse() as answer:
            assert (answer.status, answer.read()) == (200, UPDATE)


@pytest.mark.parametrize(
    ("body", "ref"), [(UPDATE[:-1] + b"?", REF), (UPDATE, BlobRef(REF.sha256, REF.size, OTHER_REF.leaves))]
)
def test_bytes_that_are_not_those_of_its_reference_end_it(
    server: BlobServer, uploads: HttpUploads, body: bytes, ref: BlobRef
) -> None:
    uploads.request_upload("pi", ref)
    assert put(server, body) == 422
    assert not uploads.store.has(REF.sha256)
    assert uploads.take_ended() == [UploadEnd("pi", ref, stored=False)]
    assert put(server) == 404  # it is pulled from now on
    assert left_over(uploads) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Length": None},
        {"Content_Length": str(len(UPDATE) + 1)},
        {"Content_Length": str(len(UPDATE) - 1)},
        {"Content_Length": "-1"},
        {"Content_Length": f"0{len(UPDATE)}"},
    ],
    ids=str,
)
def test_only_the_announced_length_is_taken(
    server: BlobServer, uploads: HttpUploads, headers: dict[str, str | None]
) -> None:
    renamed = {"Content-Length" if name == "Content_Length" else name: value for name, value in headers.items()}
    assert put(server, **renamed) in (0, 400)
    assert not uploads.store.has(REF.sha256)
    assert left_over(uploads) == []
    assert put(server) == 201  # nothing is lost by that


def test_an_encoding_beside_the_length_is_refused(server: BlobServer, uploads: HttpUploads) -> None:
    head = f"PUT {path_of(REF)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(UPDATE)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 400"  # a server that takes it waits for the body
    assert not uploads.store.has(REF.sha256)


@pytest.mark.parametrize(
    "path",
    [
        path_of(REF) + ".leaves", path_of(REF) + "?x", path_of(OTHER_REF), f"/x/00/{REF.sha256}",
        f"/%2e%2e/{REF.sha256[:2]}/{REF.sha256}", "/../../identity/signing.key",
    ],
)  # fmt: skip
def test_nothing_else_can_be_written(server: BlobServer, uploads: HttpUploads, path: str) -> None:
    assert put(server, path=path) in (0, 404)
    assert uploads.store.names() == []
    assert uploads.take_ended() == []


def begin_upload(server: BlobServer, sent: int = 2 * LEAF_BYTES, ref: BlobRef = REF) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(
        f"PUT {path_of(ref)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(UPDATE)}\r\n\r\n".encode() + UPDATE[:sent]
    )
    return client


def is_closed(client: socket.socket) -> bool:
    client.settimeout(10)
    with suppress(ConnectionError):
        while client.recv(1000):
            pass
    return True


def test_who_hangs_up_leaves_nothing_and_may_come_again(server: BlobServer, uploads: HttpUploads) -> None:
    with begin_upload(server):
        until(lambda: uploads.arrived_bytes("pi") == 2 * LEAF_BYTES)
    until(lambda: left_over(uploads) == [])
    assert uploads.take_ended() == []
    assert put(server) == 201
    assert uploads.take_byte_counts() == {"pi": len(UPDATE) + 2 * LEAF_BYTES}


def test_a_new_connection_takes_the_place_of_the_one_before(server: BlobServer, uploads: HttpUploads) -> None:
    with begin_upload(server) as first:
        until(lambda: uploads.arrived_bytes("pi") == 2 * LEAF_BYTES)
        assert put(server) == 201
        assert is_closed(first)
    until(lambda: left_over(uploads) == [])
    assert uploads.take_ended() == [UploadEnd("pi", REF, stored=True)]


def test_one_that_is_dropped_in_the_middle_is_cut(server: BlobServer, uploads: HttpUploads) -> None:
    with begin_upload(server) as client:
        until(lambda: uploads.arrived_bytes("pi") == 2 * LEAF_BYTES)
        uploads.drop("pi")
        assert is_closed(client)
        assert put(server) == 404
    until(lambda: left_over(uploads) == [])
    assert not uploads.store.has(REF.sha256)
    assert uploads.take_ended() == []


def test_who_sends_slowly_is_cut(server: BlobServer, uploads: HttpUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "UPLOAD_LEAF_TIMEOUT_S", 0.2)

    def send(pieces: Iterable[bytes], every_s: float) -> None:
        with begin_upload(server, 10) as client:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(every_s)

    with pytest.raises(ConnectionError):
        send([b"x"] * 250, 0.02)  # now and then a byte, so that no socket's time-out ends
    monkeypatch.setattr(http_server, "UPLOAD_LEAF_TIMEOUT_S", 1.0)
    monkeypatch.setattr(http_server, "MIN_BYTES_PER_S", 10**9)  # each leaf in time, but not all of them
    with pytest.raises(ConnectionError):
        send([UPDATE[at : at + LEAF_BYTES // 2] for at in range(10, len(UPDATE), LEAF_BYTES // 2)], 0.3)
    until(lambda: left_over(uploads) == [])
    assert not uploads.store.has(REF.sha256)
    assert uploads.take_ended() == []


def test_a_full_disk_is_the_server_s_fault(server: BlobServer, uploads: HttpUploads) -> None:
    reserve, uploads.store.reserve = uploads.store.reserve, 2**60
    assert put(server) in (0, 507)
    assert uploads.take_ended() == []
    uploads.store.reserve = reserve
    assert put(server) == 201


def test_a_report_of_what_went_elsewhere_is_no_upload(server: BlobServer, uploads: HttpUploads) -> None:
    uploads.on_report("pi")
    assert uploads.take_ended() == [UploadEnd("pi", REF, stored=False)]
    uploads.on_report("a stranger")
    assert uploads.take_ended() == []
    assert put(server) == 201
    uploads.on_report("pi")  # which is what the device says a moment later
    assert uploads.take_ended() == [UploadEnd("pi", REF, stored=True)]


def test_each_job_takes_and_gives_its_own(server: BlobServer, tmp_path: Path) -> None:
    jobs = []
    for ref in (REF, OTHER_REF):
        store = BlobStore(tmp_path / ref.sha256, durable=False)
        uploads = HttpUploads(store, f"http://127.0.0.1:{server.port}/x")
        uploads.request_upload("pi", ref)
        jobs.append(ServedJob(store, lambda device, sha256, ref=ref: sha256 == ref.sha256, uploads))  # type: ignore[misc]
    server.jobs = jobs
    assert put(server, b"an update of another job", path_of(OTHER_REF)) == 201
    assert put(server) == 201
    assert [job.store.names() for job in jobs] == [[REF.sha256], [OTHER_REF.sha256]]
    for ref, body in ((REF, UPDATE), (OTHER_REF, b"an update of another job")):
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
            connection.request("GET", path_of(ref))
            with connection.getresponse() as answer:
                assert (answer.status, answer.read()) == (200, body)


def test_only_the_board_whose_update_it_is_may_upload_it(tmp_path: Path, store: BlobStore) -> None:
    board = BlobStore(tmp_path / "board", durable=False)
    assert board.put(UPDATE) == REF
    with IdentityFolder.make(tmp_path / "state", "default") as identity:
        for device in ("attic", "cellar"):
            issued, key = member_certificate(identity, device)
            save_tls_key(key, tmp_path / f"{device}.key")
            (tmp_path / f"{device}.pem").write_text(issued)

        def failure_of(device: str | None, url: str) -> str:
            def context() -> ssl.SSLContext:
                files = (None, None) if device is None else (tmp_path / f"{device}.pem", tmp_path / f"{device}.key")
                return pinned_context(identity.path / "authority.pem", *files, lambda: 0)

            upload = HttpUpload(board, UploadUrl.parse(url), REF, context)
            upload.join(20)
            return upload.failure

        woken = threading.Event()
        config = ServerConfig(state=tmp_path / "state", serve_blobs="0", uploads="https")
        with web_blobs(config, identity, woken.set) as web:
            place = web.uploads(BucketSync(store))
            assert isinstance(place, HttpUploads)
            web.serve([ServedJob(store, lambda device, sha256: False, place)])
            url = place.request_upload("attic", REF).url
            assert failure_of("cellar", url) == "it answers 404"
            assert failure_of(None, url) not in ("", "it answers 404")
            assert not woken.is_set()
            assert failure_of("attic", url) == ""
            assert woken.is_set()
            assert place.take_ended() == [UploadEnd("attic", REF, stored=True)]
            store.delete(REF.sha256)
            place.request_upload("cellar", REF)
            identity.revoke("cellar")
            assert failure_of("cellar", url) not in ("", "it answers 404")
        assert store.names() == []


def test_without_the_setting_nothing_is_uploaded(store: BlobStore) -> None:
    with web_blobs(ServerConfig(serve_blobs="127.0.0.1:0"), None) as web:
        assert not web.uploads(BucketSync(store)).accepts_uploads
    with web_blobs(ServerConfig(), None) as web:
        assert not web.uploads(BucketSync(store)).accepts_uploads


# A job whose boards upload.


def is_served(server: BlobServer) -> bool:
    """Whether one that connects now is served."""
    return put(server, path=path_of(OTHER_REF)) == 404


def test_uploads_have_connections_of_their_own(uploads: HttpUploads, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [BlobRef.of(bytes([n]) * len(UPDATE)) for n in range(6)]
    with BlobServer("127.0.0.1", 0, None, connections=2) as server, ExitStack() as stack:
        for n, ref in enumerate(refs):
            uploads.request_upload(f"pi-{n}", ref)

        def begin(*numbers: int) -> None:
            for n in numbers:
                stack.enter_context(begin_upload(server, ref=refs[n]))
                until(lambda n=n: uploads.arrived_bytes(f"pi-{n}") == 2 * LEAF_BYTES)  # type: ignore[misc]

        server.jobs = [ServedJob(uploads.store, lambda device, sha256: True, uploads, 1) for _ in range(2)]
        begin(0, 1)
        assert is_served(server)
        begin(2, 3)
        assert not is_served(server)  # those that are at work are left alone
        server.jobs = [ServedJob(uploads.store, lambda device, sha256: True, uploads, 1000)]
        monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 5)
        begin(4)
        assert not is_served(server)
        server.jobs = [ServedJob(uploads.store, lambda device, sha256: True, None, 1000)]
        uploads.drop("pi-0")
        assert not is_served(server)


def put_update(request: UploadRequest, body: bytes) -> str | None:
    """Upload as a board does; the reason why it failed."""
    url = UploadUrl.parse(request.url)
    with closing(http.client.HTTPConnection(url.host, url.port, timeout=10)) as connection:
        connection.request("PUT", url.target, body)
        with connection.getresponse() as answer:
            return None if answer.status == 201 else f"it answers {answer.status}"


class Uploading(Fleet):
    """A fleet whose devices upload to the server's own web server."""

    def __init__(self, folder: Path, server: BlobServer, *fleet: Any, **settings: Any) -> None:
        super().__init__(folder, *fleet, **settings)
        self.server = server
        for device in self.air.devices.values():
            device.abilities, device.upload = (PUT_ABILITY,), put_update

    def daemon(self, **options: Any) -> Server:
        url = f"http://127.0.0.1:{self.server.port}"
        daemon = super().daemon(
            blobs=WebBlobs(url, self.server, lambda shipping: HttpUploads(shipping.local_store, url)), **options
        )
        self.server.jobs = [daemon.main_runner.served_job]
        return daemon


@pytest.fixture(scope="module")
def expected_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Models of the job over MQTT."""
    return models(Fleet(tmp_path_factory.mktemp("mqtt")).run())


@pytest.fixture
def fleet(tmp_path: Path, server: BlobServer) -> Uploading:
    return Uploading(tmp_path, server)


class MaskedUploads(Uploading, SecureFleet):
    """The same of boards that mask their updates."""


def test_masked_updates_may_be_uploaded_and_nothing_else_is(tmp_path: Path, server: BlobServer) -> None:
    names = ("a", "b", "c")
    fleet = MaskedUploads(tmp_path / "https", server, import_onnx(digits_model(), "digits"), names)
    fleet.job = replace(fleet.job, secure_aggregation=True)
    bodies: list[bytes] = []

    def upload(request: UploadRequest, body: bytes) -> str | None:
        bodies.append(body)
        return put_update(request, body)

    for name in names:
        fleet.board(name).upload = upload
    state = fleet.run()
    assert counted_devices(state) == [list(names)] * 2
    over_mqtt = SecureFleet(tmp_path / "mqtt", fleet.model, names, secure_aggregation=True).run()
    assert models(state) == models(over_mqtt)
    assert server.received == len(bodies) == 6
    vectors = {fleet.board(name).vector for name in names}
    assert {len(body) for body in bodies} == {len(vector) for vector in vectors}
    assert not vectors & set(bodies), "an update that is not masked"
    assert not any(fleet.store.has(BlobRef.of(body).sha256) for body in bodies), "they are added, and needed no longer"
    assert not any(topic.endswith("blob") for topic, _ in fleet.published), "nothing has come over MQTT"


def test_uploads_to_the_server_are_brought_into_the_bucket(
    tmp_path: Path, server: BlobServer, expected_models: list[str], at_s3: S3
) -> None:
    fleet = Uploading(tmp_path, server)
    fleet.store = BucketStore(tmp_path / "blobs", f"s3://{at_s3.bucket()}/fleet")
    fleet.store.retry.is_endless = True
    fleet.worker = ToyWorker(fleet.store)
    assert models(fleet.run()) == expected_models
    assert server.received == 9
    updates = [t.update["sha256"] for t in fleet.storage.load().tasks.values() if t.update]  # type: ignore[union-attr]
    assert len(updates) == 3
    assert set(updates) <= fleet.store.objects().keys()
    fleet.store.close()


def test_a_job_whose_boards_upload_ends_in_the_same_models(fleet: Uploading, expected_models: list[str]) -> None:
    state = fleet.run()
    assert models(state) == expected_models
    assert counted_devices(state) == [["a", "b", "c"]] * 3
    assert fleet.server.received == 9
    ups = [up for _, up in fleet.storage.traffic().values()]
    assert min(ups) > 3 * SIZE
    assert max(ups) < 4 * SIZE


def test_boards_that_can_t_upload_are_pulled_from(fleet: Uploading, expected_models: list[str]) -> None:
    fleet.air.devices["a"].abilities = ()
    fleet.air.devices["b"].upload = lambda request, body: "no route"
    fleet.air.devices["c"].upload = lambda request, body: put_update(request, bytes(len(body)))
    assert models(fleet.run()) == expected_models
    assert fleet.server.received == 0


def test_messages_that_come_twice_count_once(fleet: Uploading, expected_models: list[str]) -> None:
    fleet.air.doubled = True
    state = fleet.run()
    assert models(state) == expected_models
    assert counted_devices(state) == [["a", "b", "c"]] * 3


def test_a_server_that_dies_with_an_update_in_hand_counts_it_once(fleet: Uploading, expected_models: list[str]) -> None:
    uploaded = 0

    def upload(request: UploadRequest, body: bytes) -> str | None:
        nonlocal uploaded
        uploaded += 1
        reason = put_update(request, body)
        if uploaded == 4:
            raise KeyboardInterrupt
        return reason

    for device in fleet.air.devices.values():
        device.upload = upload
    with pytest.raises(KeyboardInterrupt):
        fleet.run()
    fleet.restart()
    state = fleet.run()
    assert models(state) == expected_models
    assert counted_devices(state) == [["a", "b", "c"]] * 3
    assert uploaded == 9  # what is on the disk isn't wanted again
