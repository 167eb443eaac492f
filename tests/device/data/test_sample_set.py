import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, DataError, StorageFullError
from fedprune.model.lengths import Lengths, pad_to_bound
from fedprune_device.data.labels import Targets
from fedprune_device.data.reservoir import SampleLimits
from fedprune_device.data.sample_store import NoSampleError, SampleConflictError, SampleStore
from fedprune_device.data.segment_log import payload_name
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_samples import encode_sample, sample_outline
from support.faults.failing_disk import Crash, fault

pytestmark = pytest.mark.board

ROOM = 64 * 1024
SHARES = SplitShares(0.25, 0.25, seed=3, device="d")


def open_store(root: Path, samples: int = 40, room: int = ROOM, shares: SplitShares = SHARES) -> SampleStore:
    return SampleStore(root, SampleLimits(samples, room), shares)


def x_of(number: int, size: int = 6) -> Any:
    return np.full(size, number, np.float32)


def labels_by_number(store: SampleStore) -> dict[float, int]:
    """Numbers and labels of all that would be trained or tested on."""
    data = store.snapshot()
    arrays = [(data.x_train, data.y_train), (data.x_test, data.y_test), (data.x_val, data.y_val)]
    return {float(x[0]): int(y) for xs, ys in arrays for x, y in zip(xs, ys, strict=True)}


@pytest.fixture
def samples(tmp_path: Path) -> Iterator[SampleStore]:
    with open_store(tmp_path / "samples") as store:
        yield store


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.sampled_from([np.float32, np.int64, np.uint8, np.int16, np.bool_]),
)
def test_a_sample_comes_out_as_it_went_in(shape: list[int], kind: Any) -> None:
    x = np.arange(int(np.prod(shape))).reshape(shape).astype(kind)
    payload = encode_sample(x)
    outline = sample_outline(payload)
    assert (outline.dtype, outline.shape) == (x.dtype, x.shape)
    assert payload.endswith(x.tobytes())
    assert encode_sample(np.asfortranarray(x)) == encode_sample(x)


@pytest.mark.parametrize("x", [np.zeros(3), np.array(1, np.float32), np.array([np.nan], np.float32), np.array([-1])])
def test_what_is_no_sample_is_refused(samples: SampleStore, x: Any) -> None:
    with pytest.raises(DataError):
        samples.add(x, 0)
    assert samples.counts()["disk_bytes"] == 0


def test_a_part_is_for_ever_and_as_large_as_asked_for() -> None:
    names = [f"{n:032x}" for n in range(4000)]
    splits = [SHARES.split_of(n) for n in names]
    assert splits == [SHARES.split_of(n) for n in names]
    for split, share in (("test", 0.25), ("val", 0.75 * 0.25), ("train", 0.75 * 0.75)):
        assert abs(splits.count(split) / len(names) - share) < 4 * ((share * (1 - share) / len(names)) ** 0.5)
    assert [SplitShares(0.25, 0.25, seed=4, device="d").split_of(n) for n in names] != splits


def test_a_held_out_sample_never_gets_into_training(tmp_path: Path) -> None:
    splits: dict[float, str] = {}
    with open_store(tmp_path, samples=16) as samples:
        for n in range(300):
            samples.add(x_of(n), n % 3)
            if samples.samples and n % 20 == 0:
                data = samples.snapshot()
                for split in ("train", "val", "test"):
                    for x in getattr(data, f"x_{split}"):
                        assert splits.setdefault(float(x[0]), split) == split
    assert set(splits.values()) == {"train", "val", "test"}


def test_other_shares_than_the_sets_are_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with pytest.raises(ConfigError, match=str(tmp_path)):
        open_store(tmp_path, shares=SplitShares(0.2, 0.25, seed=3, device="d"))


def test_the_disk_never_holds_more_than_it_may(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with open_store(tmp_path, samples=10_000) as samples:
        for n in range(900):
            x = rng.standard_normal(int(rng.integers(1, 250))).astype(np.float32)
            added = samples.add(x, int(rng.integers(5)) if n % 4 else None)
            if n % 7 == 0 and added.kept:
                samples.delete(added.id)
            assert sum(p.stat().st_size for p in tmp_path.glob("segment-*")) <= ROOM
        counts = samples.counts()
    assert counts.pop("disk_bytes") > ROOM // 2
    with open_store(tmp_path, samples=10_000) as reopened:
        assert reopened.counts().pop("disk_bytes") <= ROOM
        assert {**reopened.counts(), **counts} == reopened.counts()


@given(st.lists(st.tuples(st.sampled_from("aldo"), st.integers(0, 25), st.integers(0, 3)), max_size=60))
@example([("a", 1, 2), ("o", 1, 0)])
def test_the_set_has_what_was_added_labelled_and_not_deleted_also_after_a_restart(
    moves: list[tuple[str, int, int]],
) -> None:
    """As a dictionary has it; with few samples each move also makes room, and the numbers stay those of the counts."""
    for room in (200, 12):
        labels: dict[int, int | None] = {}
        with tempfile.TemporaryDirectory() as root:
            with open_store(Path(root), samples=room) as samples:
                for move, n, label in moves:
                    apply_move(samples, labels, move, n, label)
                    assert samples.samples == sum(SHARES.split_of(name) == "train" for name in samples.names())
                before = samples.counts()
            with open_store(Path(root), samples=room) as reopened:
                assert reopened.counts() == before
                if before["parts"]["train"] and room == 200:
                    assert labels_by_number(reopened) == {n: label for n, label in labels.items() if label is not None}
                    assert reopened.counts()["unlabelled"] == sum(label is None for label in labels.values())


def apply_move(samples: SampleStore, labels: dict[int, int | None], move: str, n: int, label: int) -> None:
    """Add, label, delete or add without a label (`aldo`), and note in `labels` what is there then."""
    name = payload_name(encode_sample(x_of(n))).hex()
    if move == "o":  # one that has a label keeps it
        samples.add(x_of(n))
        labels.setdefault(n, None)
        return
    with contextlib.suppress(NoSampleError, SampleConflictError):
        if move == "a":
            samples.add(x_of(n), label)
            labels[n] = label
        elif move == "l":
            samples.label(name, label)
            labels[n] = label
        else:
            samples.delete(name)
            del labels[n]


def test_less_room_than_before_lets_samples_go(tmp_path: Path) -> None:
    with open_store(tmp_path, samples=40) as samples:
        for n in range(30):
            samples.add(x_of(n), n % 2)
    with open_store(tmp_path, samples=16) as reopened:
        assert [c["kept"] for c in reopened.counts()["classes"].values()] == [6, 6]


def test_samples_of_any_length_within_the_bounds_are_padded(tmp_path: Path) -> None:
    shape, shares = (1, Lengths(2, 6)), SplitShares(0.2, 0.2, seed=3)
    inputs = [np.full((1, 1 + n % 7), n, np.float32) for n in range(1, 30)]
    with open_store(tmp_path, shares=shares) as store:
        for x in inputs:
            store.add(x, 0)
        data = store.snapshot(shape, Targets("cross_entropy", 2))
    with open_store(tmp_path, shares=shares) as reopened:
        assert reopened.input_shape == shape
    stored = np.concatenate([data.x_train[:], data.x_test[:], data.x_val[:]])
    expected = [pad_to_bound(x[None], shape)[0] for x in inputs if 2 <= x.shape[1] <= 6]
    assert sorted(x.tobytes() for x in stored) == sorted(x.tobytes() for x in expected)


def test_samples_that_wait_are_listed_newest_first_and_can_be_read(tmp_path: Path) -> None:
    with open_store(tmp_path) as samples:  # a quarter of 40
        names = [samples.add(x_of(n)).id for n in range(25)]
        labelled = samples.add(np.arange(4), 0).id
        assert samples.unlabelled_names(100) == names[:14:-1]
        assert samples.unlabelled_names(3) == names[:21:-1]
        assert samples.counts()["unlabelled_dropped"] == 15
        samples.label(names[20], 1)
        samples.delete(names[21])
        assert samples.counts()["unlabelled_dropped"] == 15
        assert samples.read(names[24]).tolist() == [24] * 6
        assert samples.read(labelled).tolist() == [0, 1, 2, 3]
        with pytest.raises(NoSampleError):
            samples.read(names[0])
        waiting = samples.unlabelled_names(100)
    with open_store(tmp_path) as reopened:
        assert reopened.unlabelled_names(100) == waiting
        assert reopened.counts()["unlabelled_dropped"] == 15


@pytest.mark.parametrize(("loss", "shape"), [("cross_entropy", ()), ("mse", (6,))])
def test_samples_without_a_label_count_until_a_model_that_needs_labels_has_come(
    tmp_path: Path, loss: str, shape: tuple[int, ...]
) -> None:
    with open_store(tmp_path) as samples:
        for n in range(8):
            samples.add(x_of(n))
        train_count = sum(SHARES.split_of(name) == "train" for name in samples.names())
        assert samples.samples == train_count > 0
        with contextlib.suppress(DataError):  # an offer that finds nothing to train on
            samples.snapshot((6,), Targets(loss, 3, shape))
        assert samples.samples == (0 if loss == "cross_entropy" else train_count)
        after = samples.samples
    with open_store(tmp_path) as reopened:
        assert reopened.samples == after


def test_a_damaged_sample_is_skipped_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as samples:
        names = [samples.add(x_of(n, 40), 0).id for n in range(12)]
        labels = labels_by_number(samples)
        path = next(tmp_path.glob("segment-*"))
        raw = bytearray(path.read_bytes())
        raw[raw.index(encode_sample(x_of(5, 40))) + 100] ^= 1
        path.write_bytes(raw)
        assert labels_by_number(samples) == {n: c for n, c in labels.items() if n != 5}
        assert f"sample {names[5]} is damaged" in caplog.text
    with open_store(tmp_path) as reopened:
        assert labels_by_number(reopened) == {n: c for n, c in labels.items() if n != 5}


@pytest.mark.parametrize("where", range(0, 1200, 97))
def test_a_bit_that_flips_anywhere_costs_one_sample_at_most(tmp_path: Path, where: int) -> None:
    with open_store(tmp_path) as samples:
        for n in range(10):
            samples.add(x_of(n), n % 2)
        before = labels_by_number(samples)
    path = next(tmp_path.glob("segment-*"))
    raw = bytearray(path.read_bytes())
    raw[where % len(raw)] ^= 0x10
    path.write_bytes(raw)
    with open_store(tmp_path) as reopened:
        after = labels_by_number(reopened)
        assert reopened.add(x_of(50), 1).kept
    assert len(after) >= len(before) - 1
    assert after.items() <= before.items()
    with open_store(tmp_path) as reopened:
        assert labels_by_number(reopened).keys() >= {*after}


def test_a_sample_that_looks_like_records_is_a_sample(tmp_path: Path) -> None:
    """What an application sends can't write the log, even where damage makes the reader look for the next record."""
    with open_store(tmp_path / "a") as records:
        for n in range(8):
            records.add(x_of(n), 1)
    forged = next((tmp_path / "a").glob("segment-*")).read_bytes()
    forged += bytes(-len(forged) % 4)
    x = np.nan_to_num(np.frombuffer(forged, np.float32))  # every number finite
    with open_store(tmp_path / "b") as samples:
        samples.add(x_of(100), 0)
        samples.add(x, 0)
        samples.add(x_of(101), 0)
    path = next((tmp_path / "b").glob("segment-*"))
    raw = bytearray(path.read_bytes())
    raw[raw.index(encode_sample(x)) - 5] ^= 1  # the head of the sample with the forged records in it
    path.write_bytes(raw)
    with open_store(tmp_path / "b") as reopened:
        assert reopened.counts()["classes"] == {"0": {"kept": 2, "seen": 3}}


def history(samples: SampleStore) -> Iterator[None]:
    """What an application does; the set is small, so that much of it makes room."""
    names = []
    for n in range(30):
        names.append(samples.add(x_of(n, 40), n % 3 if n % 4 else None).id)
        yield
        if n % 5 == 4:
            samples.add(x_of(n, 40), 1) if n % 4 == 0 else samples.add(x_of(100 + n, 90), 2)
            yield
        if n % 6 == 5:
            try:
                samples.delete(names[n - 2])
            except NoSampleError:
                samples.add(x_of(200 + n), 0)
            yield


def small(root: Path) -> SampleStore:
    return open_store(root, samples=12, room=8 * 1024)


def numbers(samples: SampleStore) -> frozenset[str]:
    return frozenset(samples.names())


def test_a_power_cut_at_any_write_leaves_the_set_as_before_or_after(tmp_path: Path) -> None:
    states: list[frozenset[str]] = []
    with fault(0, None) as count, small(tmp_path / "dry") as samples:
        states.append(numbers(samples))
        states.extend(numbers(samples) for _ in history(samples))
    writes = count[0]
    assert writes > 100
    assert len(list((tmp_path / "dry").glob("segment-*"))) > 3
    for at in range(1, writes + 1):
        root, done = tmp_path / str(at), 0
        with fault(at, Crash()):
            try:
                with small(root) as samples:
                    for _ in history(samples):
                        done += 1
            except Crash:
                pass
        with small(root) as reopened:
            present = numbers(reopened)
            if done + 1 < len(states):
                before, after = states[done], states[done + 1]
                # Where the newcomer is written and what makes room for it isn't gone yet, anything may have made room.
                assert present in (before, after) or (present < before | after and len(present) >= len(before) - 1), at
                assert len(present) >= min(len(before), len(after)) - 1
            reopened.add(x_of(1000), 0)
            assert reopened.counts()["disk_bytes"] <= 8 * 1024


def test_a_power_cut_within_a_write_tears_nothing_that_was_there(tmp_path: Path) -> None:
    with small(tmp_path / "a") as samples:
        for n in range(4):
            samples.add(x_of(n), 0)
        before = numbers(samples)
        path = next((tmp_path / "a").glob("segment-*"))
        size = path.stat().st_size
        samples.add(x_of(9), 1)
        after = numbers(samples)
    log = path.read_bytes()
    for cut in range(size, len(log) + 1):
        root = tmp_path / "cut"
        shutil.copytree(tmp_path / "a", root)
        (root / path.name).write_bytes(log[:cut])
        with small(root) as reopened:
            assert numbers(reopened) == (after if cut == len(log) else before)
            reopened.add(x_of(50), 1)
            repaired = numbers(reopened)
        with small(root) as reopened:
            assert numbers(reopened) == repaired
        shutil.rmtree(root)


def test_a_full_disk_at_any_write_changes_nothing_and_later_there_is_room_again(tmp_path: Path) -> None:
    with fault(0, None) as count, small(tmp_path / "dry") as samples:
        for n in range(30):
            samples.add(x_of(n, 40), n % 3)
        expected = numbers(samples)
    for at in range(8, count[0] + 1):
        root = tmp_path / str(at)
        with fault(at, OSError(errno.ENOSPC, "No space left on device")), small(root) as samples:
            for n in range(30):
                before = numbers(samples)
                try:
                    samples.add(x_of(n, 40), n % 3)
                except StorageFullError:
                    assert numbers(samples) == before
                    samples.add(x_of(n, 40), n % 3)
            assert numbers(samples) == expected, at
        with small(root) as reopened:
            assert numbers(reopened) == expected, at


@pytest.mark.parametrize("room", [0, 2**20])
def test_short_whole_numbers_keep_their_type_and_sign_in_memory_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr("fedprune_device.data.stored_samples.MAX_SAMPLES_IN_MEMORY", room)
    with open_store(tmp_path, shares=SplitShares(0.0)) as store:
        for n in range(4):
            store.add(np.array([-n, 7], np.int16), 0)
        x = store.snapshot((2,), Targets("cross_entropy", 1)).x_train
        assert x.dtype == np.int16
        assert sorted(np.asarray(x).tolist()) == [[-3, 7], [-2, 7], [-1, 7], [0, 7]]


@pytest.mark.parametrize("room", [0, 2**20])
def test_short_whole_numbers_are_padded_as_wider_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    for module in ("stored_samples", "spooled_arrays"):
        monkeypatch.setattr(f"fedprune_device.data.{module}.MAX_SAMPLES_IN_MEMORY", room)
    shape = (Lengths(1, 4),)
    with open_store(tmp_path, shares=SplitShares(0.0)) as store:
        for n in (1, 2, 3):
            store.add(np.full(n, 255, np.uint8), 0)
        x = np.asarray(store.snapshot(shape, Targets("cross_entropy", 1)).x_train)
    expected = [pad_to_bound(np.full((1, n), 255), shape)[0].tolist() for n in (1, 2, 3)]
    assert sorted(x.tolist()) == sorted(expected)
