"""Updates that boards put into the bucket: counted once they are verified, whatever is put and whichever side dies."""

import base64
import http.client
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from msgspec.structs import replace

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ConfigError
from fedprune.wire.link import tls_context
from fedprune.wire.messages import PUT_ABILITY, UploadRequest
from fedprune.wire.urls import UploadUrl
from fedprune_device.network.update_sender import HttpUpload
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.server import Server
from fedprune_server.storage.s3.bucket import BLOBS_PREFIX, Bucket, BucketError, parse_bucket_url
from fedprune_server.storage.s3.store import BucketStore
from fedprune_server.transfer import s3_uploads
from fedprune_server.transfer.http import WebBlobs
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.s3_uploads import URL_LIFETIME_S, S3Uploads
from fedprune_server.transfer.upload_place import UploadEnd
from support.fakes.fleet import SIZE, Fleet, ToyWorker, counted_devices, models
from support.processes.s3 import S3
from support.waiting import until

UPDATE = np.random.default_rng(3).bytes(20 * LEAF_BYTES + 5)
REF = BlobRef.of(UPDATE)


@pytest.fixture
def url(at_s3: S3) -> str:
    return f"s3://{at_s3.bucket()}/fleet"


@pytest.fixture
def store(tmp_path: Path, url: str) -> Iterator[BucketStore]:
    store = BucketStore(tmp_path / "blobs", url)
    store.retry.is_endless = True
    yield store
    store.close()


class Bench:
    """A bucket's uploads, whose clock a test turns."""

    def __init__(self, store: BucketStore) -> None:
        self.store, self.now = store, 0.0
        self.bucket_sync = BucketSync(store)
        self.uploads = S3Uploads(self.bucket_sync, lambda: self.now)

    def ask(self, ref: BlobRef = REF) -> UploadRequest:
        request = self.uploads.request_upload("pi", ref)
        assert request is not None
        return request

    def ask_later(self) -> UploadRequest:
        """A request with another address: the last one is too old to be given again."""
        self.now += URL_LIFETIME_S / 2
        return self.ask()

    def end(self) -> bool:
        """Whether the update was right, once it has been looked at."""
        self.uploads.on_report("pi")
        (end,) = until(self.uploads.take_ended)
        assert (end.device, end.ref) == ("pi", REF)
        return end.stored

    def await_deletions(self) -> None:
        self.store._deletions.wait(10)


@pytest.fixture
def bench(store: BucketStore) -> Iterator[Bench]:
    bench = Bench(store)
    yield bench
    bench.bucket_sync.close()


def put(request: UploadRequest, body: bytes = UPDATE) -> int:
    """The status of an upload of any bytes, as who has the address could do it."""
    url, announced = UploadUrl.parse(request.url), base64.b64encode(bytes.fromhex(request.sha256)).decode()
    with closing(http.client.HTTPConnection(url.host, url.port, timeout=10)) as connection:
        connection.request("PUT", url.target, body, {"x-amz-checksum-sha256": announced})
        with connection.getresponse() as answer:
            return answer.status


def objects(s3: S3, url: str) -> dict[str, int]:
    name, prefix = parse_bucket_url(url)
    return {k.removeprefix(prefix): n for k, n in s3.keys(name).items()}


def test_a_board_puts_its_update_into_the_bucket(
    at_s3: S3, url: str, bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = BlobStore(tmp_path / "board", durable=False)
    assert board.put(UPDATE) == REF
    with caplog.at_level(logging.DEBUG):
        upload = HttpUpload(board, UploadUrl.parse(bench.ask().url), REF, tls_context)
        upload.join(20)
        assert upload.is_over()
        assert upload.failure == ""
        assert not bench.store.has(REF.sha256)  # not before it is verified
        assert bench.end()
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("fedprune")]
    assert not any("Signature" in line or "Credential" in line for line in ours)
    assert bench.store.has(REF.sha256)
    assert BlobStore(bench.store.root).ref(REF.sha256) == REF  # and in the folder
    assert list(objects(at_s3, url).values()) == [len(UPDATE)]
    assert bench.uploads.take_byte_counts() == {"pi": len(UPDATE)}
    assert bench.uploads.take_byte_counts() == {}


def test_an_address_is_for_one_object_of_one_length_and_digest_for_a_while(bench: Bench) -> None:
    first, second = bench.ask(), bench.ask_later()
    query = parse_qs(UploadUrl.parse(first.url).query.removeprefix("?"))
    assert query["X-Amz-SignedHeaders"] == ["content-length;host;x-amz-checksum-sha256"]
    assert query["X-Amz-Expires"] == [str(URL_LIFETIME_S)]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    paths = {UploadUrl.parse(request.url).path for request in (first, second)}
    assert len(paths) == 2  # no name is used twice
    assert all(f"/{BLOBS_PREFIX}{REF.sha256}." in path for path in paths)


@pytest.mark.parametrize("at_s3", ["ceph"], indirect=True)  # moto doesn't do it
def test_an_address_lets_nothing_else_be_put(at_s3: S3, url: str, bench: Bench) -> None:
    request = bench.ask()
    for target in (
        replace(request, sha256=BlobRef.of(b"").sha256),
        replace(request, url=request.url.replace(REF.sha256, BlobRef.of(b"").sha256)),
        replace(request, url=request.url.replace(f"Expires={URL_LIFETIME_S}", f"Expires={URL_LIFETIME_S + 1}")),
    ):
        assert put(target) == 403
    for body in (b"", UPDATE[:-1], UPDATE + b"x"):
        assert put(request, body) == 403
    assert objects(at_s3, url) == {}
    assert put(request) == 200
    late = bench.store.bucket.upload_url(f"{BLOBS_PREFIX}x", REF.sha256, REF.size, 1)
    time.sleep(2)
    assert put(replace(request, url=late)) == 403
    assert len(objects(at_s3, url)) == 1


@pytest.mark.parametrize("body", [b"", UPDATE + b"x", UPDATE[:-1] + b"?"], ids=lambda b: str(len(b)))
def test_other_bytes_are_not_counted_and_deleted(at_s3: S3, url: str, bench: Bench, body: bytes) -> None:
    put(bench.ask(), body)
    assert not bench.end()
    bench.await_deletions()
    assert objects(at_s3, url) == {}
    assert not bench.store.has(REF.sha256)
    assert not list((bench.store.root / "tmp").iterdir())
    assert bench.uploads.take_byte_counts() == {}


def test_who_is_asked_again_gets_the_same_address_while_it_lasts(bench: Bench) -> None:
    first = bench.ask()
    bench.now = URL_LIFETIME_S / 2 - 1
    assert bench.ask() == first
    bench.now = URL_LIFETIME_S / 2
    second = bench.ask()
    assert second.url.partition("?")[0] != first.url.partition("?")[0]
    bench.uploads.drop("pi")
    assert bench.ask() != second, "what was put there is deleted soon"
    second_ref = BlobRef.of(b"of another round")
    assert bench.ask(second_ref).sha256 == second_ref.sha256


def test_the_right_one_of_several_is_found_and_the_others_are_deleted(at_s3: S3, url: str, bench: Bench) -> None:
    for body in (bytes(len(UPDATE)), UPDATE, UPDATE[:7], UPDATE):
        put(bench.ask_later(), body)
    assert bench.end()
    bench.await_deletions()
    assert list(objects(at_s3, url).values()) == [len(UPDATE)]
    assert bench.store.fetch(REF.sha256) == UPDATE


def test_what_is_put_too_late_is_deleted(at_s3: S3, url: str, bench: Bench) -> None:
    late = bench.ask()
    bench.uploads.drop("pi")
    put(late)
    bench.now = float(URL_LIFETIME_S)
    assert bench.uploads.take_ended() == []
    assert len(objects(at_s3, url)) == 1
    bench.now = float(s3_uploads._LATE_UPLOAD_S)
    assert bench.uploads.take_ended() == []
    bench.await_deletions()
    assert objects(at_s3, url) == {}


def test_what_counts_is_not_deleted_with_it(at_s3: S3, url: str, bench: Bench) -> None:
    put(bench.ask())
    bench.ask_later()
    assert bench.end()
    bench.uploads.drop("pi")
    bench.now = 2.0 * s3_uploads._LATE_UPLOAD_S
    bench.uploads.take_ended()
    bench.await_deletions()
    assert list(objects(at_s3, url).values()) == [len(UPDATE)]


@pytest.mark.parametrize("right", [True, False])
def test_what_an_earlier_process_let_be_put_is_not_wanted_again(
    at_s3: S3, url: str, bench: Bench, tmp_path: Path, right: bool
) -> None:
    put(bench.ask(), UPDATE if right else bytes(len(UPDATE)))
    store = BucketStore(tmp_path / "standby", url)  # which lists the bucket
    later = Bench(store)
    assert later.uploads.request_upload("pi", REF) is None
    assert later.end() is right
    assert store.has(REF.sha256) is right
    later.bucket_sync.close()
    store.close()
    assert len(objects(at_s3, url)) == right


class Away(Bucket):
    """A bucket that can't be used for now, but tells one address: this one, or none."""

    away, address = True, ""

    def stream(self, key: str) -> Iterator[bytes]:
        if self.away:
            raise BucketError("the bucket is away")
        return super().stream(key)

    def upload_url(self, key: str, sha256: str, size: int, seconds: int) -> str:
        if not self.address:
            raise BucketError("no credentials")
        return self.address


def test_a_bucket_that_is_away_is_waited_for(url: str, bench: Bench) -> None:
    put(bench.ask())
    bench.store.bucket = bucket = Away(url)
    bench.uploads.on_report("pi")
    until(lambda: bench.bucket_sync.is_stuck)
    assert bench.bucket_sync.has_work
    assert bench.bucket_sync.digests == {REF.sha256}
    assert bench.uploads.request_upload("pi", REF) is None  # it is there, as far as is known
    bucket.away = False
    assert bench.end()
    assert not bench.bucket_sync.has_work
    assert not bench.bucket_sync.is_stuck


def test_without_credentials_updates_are_pulled(url: str, bench: Bench) -> None:
    bench.store.bucket = Away(url)
    assert bench.uploads.request_upload("pi", REF) is None
    assert bench.uploads.take_ended() == [UploadEnd("pi", REF, stored=False)]


def test_a_bucket_that_boards_may_not_reach_is_one_clear_error(url: str, store: BucketStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uploads"):
        ServerConfig(uploads="s3")
    with pytest.raises(ConfigError, match="s3://"):
        S3Uploads(BucketSync(BlobStore(tmp_path / "folder")))
    store.bucket = bucket = Away(url)
    bucket.address = "http://minio.example:9000/b/x?X-Amz-Signature=1"
    with pytest.raises(ConfigError, match="https://") as caught:
        S3Uploads(BucketSync(store))
    assert "Signature" not in str(caught.value)
    assert "minio.example:9000" in str(caught.value)


# A job whose boards put their updates into the bucket.


class Direct(Fleet):
    """A fleet whose blobs are in a bucket, to which its devices upload."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url
        self.uploaded, self.digests = 0, set[str]()
        self.on_upload: Callable[[int], None] = lambda count: None
        self.open()
        for device in self.air.devices.values():
            device.abilities, device.upload = (PUT_ABILITY,), self.upload

    def open(self) -> None:
        """The bucket, as a new process finds it."""
        self.store = BucketStore(self.folder / "blobs", self.url)
        self.store.retry.is_endless = True
        self.worker = ToyWorker(self.store)

    def upload(self, request: UploadRequest, body: bytes) -> str | None:
        status = put(request, body)
        self.digests.add(request.sha256)
        self.uploaded += 1
        self.on_upload(self.uploaded)
        return None if status == 200 else f"it answers {status}"

    def daemon(self, **options: Any) -> Server:
        return super().daemon(blobs=WebBlobs(uploads=S3Uploads), **options)


@pytest.fixture(scope="module")
def expected_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Models of the job over MQTT, in a folder."""
    return models(Fleet(tmp_path_factory.mktemp("mqtt")).run())


@pytest.fixture
def fleet(tmp_path: Path, url: str) -> Iterator[Direct]:
    fleet = Direct(tmp_path, url)
    yield fleet
    fleet.store.close()


def test_a_job_whose_boards_upload_to_the_bucket_ends_in_the_same_models(
    fleet: Direct, expected_models: list[str]
) -> None:
    state = fleet.run()
    assert models(state) == expected_models
    assert counted_devices(state) == [["a", "b", "c"]] * 3
    assert fleet.uploaded == 9
    ups = [up for _, up in fleet.storage.traffic().values()]
    assert min(ups) > 3 * SIZE
    assert max(ups) < 4 * SIZE


def test_boards_that_can_t_reach_the_bucket_are_pulled_from(fleet: Direct, expected_models: list[str]) -> None:
    fleet.air.devices["a"].abilities = ()
    fleet.air.devices["b"].upload = lambda request, body: "no route"
    fleet.air.devices["c"].upload = lambda request, body: None  # but something answers there
    assert models(fleet.run()) == expected_models
    assert fleet.uploaded == 0
