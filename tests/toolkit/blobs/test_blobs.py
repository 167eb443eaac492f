import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs import blob_store
from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import process_name
from fedprune.core.errors import ProtocolError, StorageError, StorageFullError
from support.faults.power_cuts import KINDS, CutError, power
from support.processes import machine

pytestmark = pytest.mark.board

sizes = st.one_of(
    st.integers(0, 5 * LEAF_BYTES), st.sampled_from([0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES])
)


def noise(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(f"{size}-{seed}".encode()).digest(size)


def leaf(data: bytes, index: int) -> bytes:
    return data[index * LEAF_BYTES : (index + 1) * LEAF_BYTES]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@given(size=sizes)
@settings(max_examples=30, deadline=None)
def test_what_is_put_can_be_read_under_its_sha256(size: int) -> None:
    data = noise(size)
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        ref = store.put(data)

        assert ref.sha256 == hashlib.sha256(data).hexdigest()
        assert ref.size == size
        digests = [hashlib.sha256(leaf(data, i)).digest() for i in range(ref.leaf_count)]
        assert ref.leaves == hashlib.sha256(b"".join(digests)).hexdigest()
        assert store.read(ref.sha256) == store.path(ref.sha256).read_bytes() == data
        assert store.ref(ref.sha256) == ref == BlobRef.of(data)
        assert store.names() == [ref.sha256]


def test_a_damaged_blob_is_not_read(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    ref = store.put(noise(2 * LEAF_BYTES))
    with store.path(ref.sha256).open("r+b") as file:
        file.seek(LEAF_BYTES)
        file.write(b"?")

    with pytest.raises(StorageError, match="is damaged"):
        store.read(ref.sha256)


@pytest.mark.parametrize("size", [0, 1, 2 * LEAF_BYTES])
def test_a_mapped_blob_holds_what_was_put(tmp_path: Path, size: int) -> None:
    store = BlobStore(tmp_path)
    ref = store.put(noise(size))
    assert store.map(ref.sha256) == store.map(ref.sha256) == noise(size)
    store.delete(ref.sha256)
    with pytest.raises(StorageError, match="is not in"):
        store.map(ref.sha256)


def test_a_store_that_has_mapped_many_blobs_verifies_them_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_store, "_MAX_VERIFIED_FILES", 2)
    store = BlobStore(tmp_path)
    digests = [store.put(noise(7, seed)).sha256 for seed in range(3)]
    for digest in digests:
        store.map(digest)
    for digest in digests:
        path = store.path(digest)
        modified_ns = path.stat().st_mtime_ns
        path.write_bytes(b"damaged")
        os.utime(path, ns=(modified_ns, modified_ns))  # as by a failing disk
    assert store.map(digests[2]) == b"damaged"  # still remembered
    with pytest.raises(StorageError, match="is damaged"):
        store.map(digests[0])


@pytest.mark.parametrize("name", ["../../etc/passwd", ".." + "a" * 62])
def test_only_digests_are_names(tmp_path: Path, name: str) -> None:
    store = BlobStore(tmp_path)
    for ask in (store.has, store.path, store.read, store.ref, store.delete, store.table):
        with pytest.raises(StorageError, match="64 hex digits"):
            ask(name)


@given(size=st.integers(2 * LEAF_BYTES, 8 * LEAF_BYTES), chosen=st.sets(st.integers(0, 7)), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_partial_blob_resumes_with_exactly_what_has_arrived(size: int, chosen: set[int], data: st.DataObject) -> None:
    blob = noise(size)
    ref = BlobRef.of(blob)
    order = data.draw(st.permutations(sorted(i for i in chosen if i < ref.leaf_count)))
    with tempfile.TemporaryDirectory() as folder:
        first = BlobStore(Path(folder)).partial(ref)
        assert first.set_table(leaf_table(blob))
        assert all(first.write(i, leaf(blob, i)) for i in order)

        reopened = BlobStore(Path(folder)).partial(ref)  # as another process would

        assert [i for i, here in enumerate(reopened.present_leaves) if here] == sorted(order)
        assert reopened.present_count == len(order)
        for i in range(ref.leaf_count):
            assert reopened.write(i, leaf(blob, i))
        reopened.finish()
        assert reopened.store.read(ref.sha256) == blob
        assert files(Path(folder) / "partial") == []


def test_a_leaf_damaged_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    data = noise(4 * LEAF_BYTES)
    ref = BlobRef.of(data)
    partial = BlobStore(tmp_path).partial(ref)
    partial.set_table(leaf_table(data))
    for i in range(3):
        partial.write(i, leaf(data, i))
    with (tmp_path / "partial" / ref.sha256).open("r+b") as file:
        file.seek(LEAF_BYTES + 5)
        file.write(b"????")

    assert list(BlobStore(tmp_path).partial(ref).present_leaves) == [1, 0, 1, 0]


def test_a_wrong_leaf_is_refused(tmp_path: Path) -> None:
    data = noise(2 * LEAF_BYTES + 10)
    partial = BlobStore(tmp_path).partial(BlobRef.of(data))
    assert not partial.write(0, leaf(data, 0))  # nothing to check it against yet
    assert not partial.set_table(leaf_table(noise(2 * LEAF_BYTES + 10, 1)))
    partial.set_table(leaf_table(data))

    for index, payload in [(0, leaf(data, 1)), (2, leaf(data, 2) + b"\0"), (-1, leaf(data, 2)), (3, b""), (0, b"")]:
        assert not partial.write(index, payload)
    assert partial.present_count == 0


@given(size=st.integers(2 * LEAF_BYTES, 9 * LEAF_BYTES), damaged=st.sets(st.integers(0, 8)), data=st.data())
@settings(max_examples=30, deadline=None)
def test_of_leaves_that_come_together_the_right_ones_are_kept(
    size: int, damaged: set[int], data: st.DataObject
) -> None:
    blob = noise(size)
    ref = BlobRef.of(blob)
    first = data.draw(st.integers(0, ref.leaf_count - 1))
    last = data.draw(st.integers(first, ref.leaf_count - 1))
    arrived = bytearray(blob[first * LEAF_BYTES : (last + 1) * LEAF_BYTES])
    bad = sorted(i for i in damaged if first <= i <= last)
    for index in bad:
        arrived[(index - first) * LEAF_BYTES] ^= 1
    with tempfile.TemporaryDirectory() as folder:
        partial = BlobStore(Path(folder), durable=False).partial(ref)
        partial.set_table(leaf_table(blob))

        assert partial.write_leaves(first, bytes(arrived)) == bad
        assert [i for i, here in enumerate(partial.present_leaves) if here] == [
            i for i in range(first, last + 1) if i not in bad
        ]
        assert partial.write_leaves(0, blob) == []
        assert partial.present_count == ref.leaf_count
        partial.finish()
        assert partial.store.read(ref.sha256) == blob


def test_a_reference_whose_leaves_are_another_blob_s_is_found_out(tmp_path: Path) -> None:
    data = noise(2 * LEAF_BYTES)
    ref = BlobRef("ab" * 32, len(data), BlobRef.of(data).leaves)
    partial = BlobStore(tmp_path).partial(ref)
    partial.set_table(leaf_table(data))
    for i in range(2):
        partial.write(i, leaf(data, i))

    with pytest.raises(ProtocolError, match=ref.sha256):
        partial.finish()
    assert files(tmp_path) == []


def test_a_name_that_is_vouched_for_is_checked_by_who_reads_it(tmp_path: Path) -> None:
    data = noise(3 * LEAF_BYTES)
    ref = BlobRef("ab" * 32, len(data), BlobRef.of(data).leaves)
    store = BlobStore(tmp_path)
    first = store.partial(ref, vouched=True)
    first.set_table(leaf_table(data))
    first.write(2, leaf(data, 2))
    first.close()

    partial = store.partial(ref, vouched=True)
    assert partial.write_leaves(0, data[: LEAF_BYTES - 1] + b"?" + data[LEAF_BYTES : 2 * LEAF_BYTES]) == [0]
    with pytest.raises(StorageError, match="not complete"):
        partial.finish()
    assert partial.write_leaves(0, data[:LEAF_BYTES]) == []
    partial.finish()

    assert store.path(ref.sha256).read_bytes() == data
    for read in (store.read, store.map):
        with pytest.raises(StorageError, match="is damaged"):
            read(ref.sha256)


def test_a_small_reference_that_contradicts_itself_is_found_out_at_once(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="contradicts itself"):
        BlobStore(tmp_path).partial(BlobRef("ab" * 32, 5, "cd" * 32))


def test_what_was_deleted_and_begun_anew_gets_no_name_from_who_was_whole_before(tmp_path: Path) -> None:
    data = noise(3 * LEAF_BYTES)
    store = BlobStore(tmp_path)
    ref = BlobRef.of(data)
    first = store.partial(ref)
    first.set_table(leaf_table(data))
    first.write_leaves(0, data)
    store.drop_partials(set())
    second = store.partial(ref, vouched=True)
    second.set_table(leaf_table(data))
    second.write(2, leaf(data, 2))
    with pytest.raises(StorageError, match="was replaced"):
        first.finish()
    assert not store.has(ref.sha256)
    second.write_leaves(0, data[: 2 * LEAF_BYTES])
    second.finish()
    assert store.read(ref.sha256) == data


def test_a_blob_above_the_limit_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, max_size=1000)
    huge = BlobRef("ab" * 32, 2**40, "cd" * 32)

    with pytest.raises(StorageFullError, match="at most 1000 bytes"):
        store.partial(huge)
    with pytest.raises(StorageFullError, match="at most 1000 bytes"):
        store.put(bytes(1001))
    assert files(tmp_path) == []


def test_a_blob_that_the_disk_has_no_room_for_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, reserve=2**60)

    with pytest.raises(StorageFullError, match="nothing was written"):
        store.put(b"abc")
    with pytest.raises(StorageFullError, match="nothing was written"):
        store.partial(BlobRef.of(noise(2 * LEAF_BYTES)))
    assert files(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with machine.small_disk(tmp_path / "tiny", "1m") as folder:
        yield folder


def test_a_disk_that_fills_up_leaves_the_store_as_it_was(tiny_disk: Path) -> None:
    store = BlobStore(tiny_disk, reserve=-(2**30))  # let the preflight pass
    stored_ref = store.put(noise(300_000))
    large = noise(30 * LEAF_BYTES)
    before = files(tiny_disk)

    with pytest.raises(StorageFullError, match="No space left"):
        store.put(large)

    assert files(tiny_disk) == before
    assert store.names() == [stored_ref.sha256]
    assert store.read(stored_ref.sha256) == noise(300_000)


def test_a_pull_onto_a_full_disk_keeps_what_has_arrived_and_goes_on_when_there_is_room(tiny_disk: Path) -> None:
    store = BlobStore(tiny_disk, reserve=-(2**30))
    ballast = store.put(noise(300_000))
    data = noise(28 * LEAF_BYTES)
    partial = store.partial(BlobRef.of(data))
    partial.set_table(leaf_table(data))

    with pytest.raises(StorageFullError):
        all(partial.write(i, leaf(data, i)) for i in range(28))
    arrived = partial.present_count
    store.delete(ballast.sha256)
    reopened = BlobStore(tiny_disk, reserve=0).partial(BlobRef.of(data))

    assert 0 < arrived <= reopened.present_count < 28
    for i in range(28):
        assert reopened.write(i, leaf(data, i))
    reopened.finish()
    assert store.read(reopened.ref.sha256) == data


def test_temporary_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    BlobStore(tmp_path)
    with subprocess.Popen(["sleep", "9"]) as process:
        dead, alive = process_name(process.pid), process_name(os.getpid())
        process.kill()
    for owner in (dead, str(process.pid), f"{os.getpid()}.1", alive):  # the third had the same id earlier
        (tmp_path / "tmp" / f"{owner}-00").write_bytes(b"x")

    BlobStore(tmp_path)

    assert files(tmp_path) == [f"tmp/{alive}-00"]


def test_a_process_is_told_from_an_earlier_one_with_its_id(tmp_path: Path) -> None:
    program = tmp_path / "a) b 1 2 3"  # whose name is in the middle of what the kernel reports
    program.symlink_to("/bin/sleep")
    began = set()
    for _ in range(2):
        process = subprocess.Popen([program, "9"])
        began.add(process_name(process.pid).removeprefix(f"{process.pid}."))
        time.sleep(0.05)
        process.kill()
        process.wait()
        assert process_name(process.pid) == f"{process.pid}."
    assert len(began) == 2
    assert all(start.isdecimal() for start in began)


def receive(store: BlobStore, data: bytes) -> BlobRef:
    ref = BlobRef.of(data)
    partial = store.partial(ref)
    partial.set_table(leaf_table(data))
    assert partial.write_leaves(0, data) == []
    partial.finish()
    return ref


@pytest.mark.parametrize("size", [1, 9 * LEAF_BYTES + 1])
def test_a_blob_costs_two_syncs_however_it_comes(tmp_path: Path, size: int) -> None:
    """Its data and its folder; leaf tables and what is partial cost none."""
    for number, deliver in enumerate((receive, lambda store, data: store.put(data))):
        store = BlobStore(tmp_path / str(number))
        with power() as supply:
            deliver(store, noise(size))
        assert supply.names.count("fsync") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_at_any_moment_leaves_no_wrong_blob_and_no_wrong_table(tmp_path: Path, kind: str) -> None:
    data, table = noise(3 * LEAF_BYTES + 5), leaf_table(noise(3 * LEAF_BYTES + 5))
    for deliver in (receive, lambda store, data: store.put(data)):
        with power() as supply:
            deliver(BlobStore(tmp_path / f"dry-{deliver.__name__}"), data)
        for at in range(1, supply.count + 1):
            root = tmp_path / f"{deliver.__name__}-{at}"
            with power(at, kind), pytest.raises(CutError):
                deliver(BlobStore(root), data)
            store = BlobStore(root)
            for name in store.names():
                assert store.read(name) == data
                assert store.table(name) == table
            deliver(store, data)
            assert store.ref(hashlib.sha256(data).hexdigest()) == BlobRef.of(data)


@given(cut=st.integers(0, 3 * 32 + 31), zeros=st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_table_that_a_power_cut_tore_is_not_believed(cut: int, zeros: bool) -> None:
    data = noise(3 * LEAF_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder), durable=False)
        ref = store.put(data)
        path = store.path(ref.sha256).with_name(ref.sha256 + ".leaves")
        intact_table = path.read_bytes()
        path.write_bytes(intact_table[:cut].ljust(len(intact_table) if zeros else cut, b"\0"))

        assert store.table(ref.sha256) == leaf_table(data)
        assert path.read_bytes() == intact_table


def test_blobs_are_their_owners_alone(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    store = BlobStore(root)
    ref = store.put(b"an update")
    data = bytes(3 * LEAF_BYTES)
    partial = store.partial(BlobStore(tmp_path / "other").put(data))
    partial.set_table(leaf_table(data))
    partial.write(1, data[LEAF_BYTES : 2 * LEAF_BYTES])
    assert root.stat().st_mode & 0o777 == 0o700
    assert store.path(ref.sha256).stat().st_mode & 0o777 == 0o600
    assert {p.stat().st_mode & 0o777 for p in root.rglob("*") if p.is_file()} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in root.rglob("*") if p.is_dir()} == {0o700}
