"""A blob store whose home is a bucket: what it has is there for whoever comes later, and nothing else counts."""

import base64
import hashlib
import logging
import pickle
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ConfigError, StorageError, StorageFullError
from fedprune.wire.urls import UploadUrl
from fedprune_server.storage.s3 import bucket
from fedprune_server.storage.s3 import store as bucket_store
from fedprune_server.storage.s3.bucket import BLOBS_PREFIX, Bucket, BucketError, digest_of, parse_bucket_url
from fedprune_server.storage.s3.retry_policy import StoppedError
from fedprune_server.storage.s3.store import BucketStore
from support.processes.s3 import S3, SECRETS, Ceph
from support.waiting import until


@pytest.fixture(autouse=True)
def evicting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used a moment ago may be evicted, unless the test is about that."""
    if "lately" not in request.node.name:
        monkeypatch.setattr(bucket_store, "RECENT_USE_S", 0.0)


class Watched(Bucket):
    """A bucket that is away for so many calls that read or write an object, and notes what is read.

    Args:
        away: How many.
    """

    def __init__(self, url: str, away: int = 0) -> None:
        super().__init__(url)
        self.away, self.read = away, list[str]()

    def _ask(self) -> None:
        if self.away:
            self.away -= 1
            raise BucketError("away")

    def get(self, key: str, limit: int) -> bytes | None:
        self._ask()
        self.read.append(digest_of(key) or key)
        return super().get(key, limit)

    def put(self, key: str, data: bytes | memoryview, sha256: str, *, replace: bool = True) -> None:
        self._ask()
        super().put(key, data, sha256, replace=replace)


@pytest.fixture
def url(at_s3: S3) -> str:
    return f"s3://{at_s3.bucket()}/a/fleet"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def objects(s3: S3, url: str) -> list[str]:
    return sorted(k for k in s3.keys(parse_bucket_url(url)[0]) if k.startswith(f"a/fleet/{BLOBS_PREFIX}"))


@pytest.mark.parametrize("url", ["s3://b", "http://bucket/x", "s3://bucket/../x", "s3://key:hush@bucket/x"])
def test_what_is_no_address_of_a_bucket_is_refused_and_no_secret_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as raised:
        parse_bucket_url(url)
    assert "hush" not in str(raised.value)


def test_what_was_put_is_there_for_another_folder(url: str, tmp_path: Path) -> None:
    one = BucketStore(tmp_path / "one", url)
    data = [b"", b"small", bytes(range(256)) * 600]
    refs = [one.put(d) for d in data]
    two = BucketStore(tmp_path / "two", url)
    for d, ref in zip(data, refs, strict=True):
        assert two.has(ref.sha256)
        assert not BlobStore.has(two, ref.sha256)
        assert two.ref(ref.sha256) == ref
        assert two.read(ref.sha256) == d == bytes(two.map(ref.sha256))
        assert two.read_leaves(ref.sha256, 0, 2) == d[: 2 * LEAF_BYTES]
    assert two.names() == sorted(r.sha256 for r in refs)


def test_putting_twice_writes_one_object(at_s3: S3, url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path / "one", url)
    for _ in range(2):
        store.put(b"same")
    BucketStore(tmp_path / "two", url).put(b"same")
    assert len(objects(at_s3, url)) == 1


def test_a_listing_goes_on_beyond_its_first_page(at_s3: S3, url: str, tmp_path: Path) -> None:
    name, prefix = parse_bucket_url(url)
    client = at_s3.client()
    for n in range(7):
        client.put_object(Bucket=name, Key=f"{prefix}{BLOBS_PREFIX}{digest(bytes([n]))}.{'0' * 16}", Body=bytes([n]))
    store = BucketStore(tmp_path, url)
    real = store.bucket._client.list_objects_v2
    store.bucket._client.list_objects_v2 = lambda **options: real(MaxKeys=3, **options)
    assert [size for _, size in store.bucket.list(BLOBS_PREFIX)] == [1] * 7


def test_an_object_is_read_whole_or_in_pieces_and_not_beyond_a_limit(url: str) -> None:
    remote = Bucket(url)
    remote.put("there", b"here" * LEAF_BYTES, digest(b"here" * LEAF_BYTES))
    assert b"".join(remote.stream("there")) == remote.get("there", 2**20) == b"here" * LEAF_BYTES
    assert remote.get("there", 5) is None
    assert remote.get("missing", 5) is None
    assert not list(remote.stream("missing"))


def test_a_damaged_or_missing_copy_in_the_folder_costs_a_fetch(url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url)
    ref = store.put(b"good" * LEAF_BYTES)
    for look in (store.read, store.map):
        store.path(ref.sha256).write_bytes(b"bad!" * LEAF_BYTES)
        assert bytes(look(ref.sha256)) == b"good" * LEAF_BYTES
        store.path(ref.sha256).unlink()
        assert bytes(look(ref.sha256)) == b"good" * LEAF_BYTES


def test_a_reader_fetches_what_the_folder_has_not_or_has_damaged_and_leaves_the_folder_as_it_is(
    url: str, tmp_path: Path
) -> None:
    server = BucketStore(tmp_path, url)
    intact, damaged, absent = blobs = [server.put(name * 100).sha256 for name in (b"a", b"b", b"c")]
    server.path(damaged).write_bytes(b"x")
    server.path(absent).unlink()
    reader = BucketStore(tmp_path, url, caching=False)
    reader.bucket = watched = Watched(url)
    for look in (reader.read, reader.map):
        assert [bytes(look(sha256)) for sha256 in blobs] == [b"a" * 100, b"b" * 100, b"c" * 100]
        assert watched.read == [damaged, absent]
        watched.read.clear()
    assert [reader.size(sha256) for sha256 in blobs] == [100] * 3
    assert {sha256: BlobStore.has(server, sha256) for sha256 in blobs} == {intact: True, damaged: True, absent: False}
    assert server.path(damaged).read_bytes() == b"x"


def test_a_blob_that_is_evicted_as_soon_as_it_was_fetched_is_mapped_nevertheless(url: str, tmp_path: Path) -> None:
    ref = BucketStore(tmp_path / "one", url).put(b"good" * LEAF_BYTES)
    store = BucketStore(tmp_path / "two", url, cache=0)
    assert bytes(store.map(ref.sha256)) == b"good" * LEAF_BYTES
    assert not BlobStore.has(store, ref.sha256)


def test_what_a_power_cut_left_of_a_cached_file_is_fetched_again(url: str, tmp_path: Path) -> None:
    refs = [BucketStore(tmp_path / "one", url).put(data * LEAF_BYTES) for data in (b"good", b"fine", b"more")]
    folder = tmp_path / "two"
    store = BucketStore(folder, url)
    for ref in refs[:2]:
        store.read(ref.sha256)
    store.path(refs[0].sha256).write_bytes(b"")
    only = BlobStore(folder).put(b"an update that has just arrived")

    BucketStore(folder, url, caching=False)  # only looks
    assert BlobStore(folder).size(refs[0].sha256) == 0

    restarted = BucketStore(folder, url)
    assert BlobStore(folder).names() == sorted([refs[1].sha256, only.sha256])
    assert restarted.size(refs[0].sha256) == 4 * LEAF_BYTES
    assert restarted.read_leaves(refs[0].sha256, 0, 9) == b"good" * LEAF_BYTES


def test_a_damaged_object_is_an_error_and_never_in_the_folder(at_s3: S3, url: str, tmp_path: Path) -> None:
    ref = BucketStore(tmp_path / "one", url).put(b"good")
    (key,) = objects(at_s3, url)
    at_s3.client().put_object(Bucket=parse_bucket_url(url)[0], Key=key, Body=b"bad!")
    store = BucketStore(tmp_path / "two", url)
    with pytest.raises(StorageError, match=f"{ref.sha256}.* is damaged"):
        store.read(ref.sha256)
    assert not BlobStore.has(store, ref.sha256)


def test_the_bucket_is_told_the_digest_to_compare_what_it_gets_with(at_s3: S3, url: str, tmp_path: Path) -> None:
    store, sent = BucketStore(tmp_path, url), []

    def look(request: Any, **_: object) -> None:
        sent.append(base64.b64decode(request.headers["x-amz-checksum-sha256"]).hex())

    store.bucket._client.meta.events.register("before-send.s3.PutObject", look)
    assert sent == [store.put(b"good").sha256]


@pytest.mark.parametrize("secure", [False, True])
def test_bytes_that_were_changed_on_their_way_are_refused(
    ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    for name, value in (ceph.secure_environment if secure else ceph.environment).items():
        monkeypatch.setenv(name, value)
    url = f"s3://{ceph.bucket()}/a/fleet"
    store = BucketStore(tmp_path, url)
    store.put(b"fine")
    before = objects(ceph, url)

    def change(request: Any, **_: object) -> None:
        request.body = b"bad!"

    store.bucket._client.meta.events.register("before-send.s3.PutObject", change)
    with pytest.raises(BucketError, match="can't write to"):
        store.put(b"good")
    assert objects(ceph, url) == before


@pytest.mark.parametrize("at_s3", ["ceph"], indirect=True)
@pytest.mark.parametrize("secret", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv(secret, "wrong")
    with pytest.raises(BucketError, match=f"{secret}.* right"):
        BucketStore(tmp_path, url)


def test_the_folder_holds_no_more_than_it_may_and_what_was_used_last_stays(url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url, cache=2500)
    refs = [store.put(bytes([n]) * 1000) for n in range(3)]
    assert [BlobStore.has(store, r.sha256) for r in refs] == [False, True, True]
    near = store.local()
    assert near.has(refs[1].sha256)
    store.put(b"z" * 1000)
    assert [near.has(r.sha256) for r in refs] == [False, True, False]
    assert all(store.has(r.sha256) for r in refs)
    assert store.read(refs[0].sha256) == bytes(1000)
    assert sum(p.stat().st_size for p in tmp_path.glob("??/*")) <= 2500


def test_what_was_used_lately_stays_unless_the_disk_is_full_and_then_nothing_is_fetched(
    url: str, tmp_path: Path
) -> None:
    store = BucketStore(tmp_path, url, cache=10)
    ref = store.put(b"x" * 100)
    assert BlobStore.has(store, ref.sha256)
    store.reserve = 2**60
    with pytest.raises(StorageFullError):
        store.check_room(60)
    assert not BlobStore.has(store, ref.sha256)
    store.bucket = watched = Watched(url)
    with pytest.raises(StorageFullError):
        store.fetch(ref.sha256)
    assert watched.read == []


def test_what_the_bucket_does_not_have_is_never_let_go_of(url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url, cache=10)
    only = BlobStore(tmp_path).put(b"an update that has just arrived").sha256
    store.put(b"x" * 100)
    assert BlobStore.has(store, only)
    assert not store.has(only)
    store.flush(only)
    assert store.has(only)
    assert not BlobStore.has(store, only)


def test_a_blob_of_the_folder_that_is_damaged_is_not_shipped(at_s3: S3, url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url)
    ref = BlobStore(tmp_path).put(b"good")
    store.path(ref.sha256).write_bytes(b"bad!")
    with pytest.raises(StorageError, match="damaged"):
        store.flush(ref.sha256)
    assert objects(at_s3, url) == []


def test_a_deletion_that_comes_late_does_not_hit_what_was_put_again(at_s3: S3, url: str, tmp_path: Path) -> None:
    old = BucketStore(tmp_path / "old", url)
    ref = old.put(b"same bytes")
    late: list[str] = []
    old.bucket.delete = late.extend  # type: ignore[method-assign]
    old.delete(ref.sha256)
    assert old.put(b"same bytes") == ref
    new = BucketStore(tmp_path / "new", url)  # and so for another server, which has the job by now
    until(lambda: late)
    (key,) = late
    Bucket(url).delete([key])
    assert len(objects(at_s3, url)) == 1
    assert BucketStore(tmp_path / "third", url).read(ref.sha256) == b"same bytes"
    assert new.read(ref.sha256) == b"same bytes"


def test_a_deletion_that_fails_keeps_no_other_from_being_done(at_s3: S3, url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url)
    first, second = store.put(b"first").sha256, store.put(b"second").sha256
    store = BucketStore(tmp_path, url)
    real, failures = store.bucket.delete, [BucketError("no")]

    def failing(keys: Sequence[str]) -> None:
        if failures:
            raise failures.pop()
        real(keys)

    store.bucket.delete = failing  # type: ignore[method-assign]
    store.delete(first)
    until(lambda: not failures)
    store.delete(second)
    until(lambda: [digest_of(k.removeprefix("a/fleet/")) for k in objects(at_s3, url)] == [first])
    until(lambda: not any(t.name == "fedprune-bucket" for t in threading.enumerate()))  # though it isn't closed


@pytest.mark.parametrize(
    ("name", "host"), [("bucket", "bucket.s3.eu-central-1.amazonaws.com"), ("buc.ket", "s3.eu-central-1.amazonaws.com")]
)
def test_an_address_for_an_upload_to_amazon_names_the_region(
    monkeypatch: pytest.MonkeyPatch, name: str, host: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for key, value in (SECRETS | {"AWS_REGION": "eu-central-1"}).items():
        monkeypatch.setenv(key, value)
    assert UploadUrl.parse(Bucket(f"s3://{name}/x").upload_url("key", digest(b"x"), 1, 900)).host == host


def test_more_objects_are_deleted_than_one_request_may_name(at_s3: S3, url: str) -> None:
    remote = Bucket(url)
    keys = [f"{BLOBS_PREFIX}{n:04d}" for n in range(1200)]
    for key in (keys[0], keys[1100], keys[1199]):
        remote.put(key, b"x", digest(b"x"))
    remote.delete(keys[:1199])
    assert objects(at_s3, url) == [f"a/fleet/{keys[1199]}"]


def test_an_object_that_can_not_be_deleted_is_named(at_s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Bucket(url)
    wrong = {"Key": f"a/fleet/{BLOBS_PREFIX}1", "Code": "AccessDenied", "Message": "it is locked"}
    monkeypatch.setattr(remote._client, "delete_objects", lambda **_: {"Errors": [wrong]})
    with pytest.raises(BucketError, match="it is locked"):
        remote.delete([f"{BLOBS_PREFIX}1"])


def test_a_helper_puts_what_its_parent_then_knows(at_s3: S3, url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url)
    before = store.put(b"before").sha256
    helper = pickle.loads(pickle.dumps(store))  # noqa: S301 - as a process gets it
    later = store.put(b"later").sha256
    assert helper.has(before)
    assert helper.has(later)  # though it was put after the helper began
    assert not helper.has(digest(b"never"))
    cached = helper.put(b"made").sha256
    assert not store.has(cached)
    store.note_objects(helper.take_new_objects())
    assert store.has(cached)
    assert helper.take_new_objects() == {}
    store.delete(cached)
    store.close()
    assert len(objects(at_s3, url)) == 2


@pytest.fixture
def held_s3(at_s3: S3) -> Iterator[S3]:
    yield at_s3
    at_s3.resume()


def test_a_bucket_that_is_away_is_waited_for_and_said_once(
    held_s3: S3, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = BucketStore(tmp_path, url)
    store.retry.is_endless = True
    store.bucket = Watched(url, 2)
    assert store.has(store.put(b"patience").sha256)
    assert [r.message.partition(":")[0] for r in caplog.records if "bucket" in r.message] == [
        "waiting for the bucket, nothing is lost",
        "the bucket is back",
    ]


def test_a_server_that_stops_waits_no_longer(url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url)
    store.retry.is_endless = True
    store.bucket = Watched(url, 1000)
    threading.Timer(0.2, store.retry.stop).start()
    with pytest.raises(StoppedError):
        store.put(b"x")


def test_a_bucket_that_does_not_answer_is_an_error_and_not_for_ever(
    held_s3: S3, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = BucketStore(tmp_path / "patient", url)
    monkeypatch.setattr(bucket, "_READ_TIMEOUT_S", 1)
    store = BucketStore(tmp_path / "store", url)
    held_s3.hold()
    with pytest.raises(BucketError, match="AWS_ENDPOINT_URL"):
        store.put(b"x")
    held_s3.resume()
    patient.put(b"y")  # it is back for certain
    store.put(b"x")


def test_a_bucket_that_is_missing_denied_or_not_there_is_one_error(
    at_s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BucketError, match="no-such-bucket"):
        BucketStore(tmp_path, "s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(BucketError, match="AWS_ENDPOINT_URL"):
        BucketStore(tmp_path, "s3://bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(BucketError, match="AWS_ENDPOINT_URL"):
        BucketStore(tmp_path, "s3://bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", at_s3.endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(BucketError, match="AWS_ACCESS_KEY_ID"):
        BucketStore(tmp_path, "s3://bucket/x")


def test_a_prefix_belongs_to_one_job(at_s3: S3, url: str, tmp_path: Path) -> None:
    store = BucketStore(tmp_path, url)
    store.check_owner(None)
    store.claim("1" * 32, "leaves", b"a model")
    with pytest.raises(ConfigError, match="leaves"):
        store.claim("2" * 32, "other", b"another")  # somebody was faster
    store.claim("1" * 32, "leaves", b"a model")
    assert store.first_model() == b"a model"
    store.check_owner("1" * 32)
    for number in (None, "2" * 32):
        with pytest.raises(ConfigError, match="leaves"):
            store.check_owner(number)
    for body in (b"", b"[]", b"{}", b"\xff", b'{"format": "fedprune.blobs/9", "id": "1", "job": "x"}'):
        at_s3.client().put_object(Bucket=parse_bucket_url(url)[0], Key="a/fleet/job.json", Body=body)
        with pytest.raises(StorageError, match=r"job\.json"):
            store.check_owner("1" * 32)


def test_who_claims_a_prefix_a_moment_later_than_another_job_does_not_get_it(url: str, tmp_path: Path) -> None:
    one, two = BucketStore(tmp_path / "one", url), BucketStore(tmp_path / "two", url)

    class Slower(Bucket):
        looks = iter([1])

        def get(self, key: str, limit: int) -> bytes | None:
            content = super().get(key, limit)
            for _ in self.looks:
                one.claim("1" * 32, "first", b"model of the first")
            return content

    two.bucket = Slower(url)
    with pytest.raises(ConfigError, match="'first'"):
        two.claim("2" * 32, "second", b"another")
    one.check_owner("1" * 32)
    assert two.first_model() == b"model of the first"


@pytest.mark.parametrize("key", ["blobs/x", f"blobs/{'a' * 64}.", f"blobs/{'A' * 64}.{'0' * 16}"])
def test_what_no_store_wrote_has_no_digest(key: str) -> None:
    assert digest_of(key) is None
