import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core import tensorfile
from fedprune.core.errors import StorageError, StorageFullError
from fedprune.wire.messages import Offer, UpdateAnnouncement
from fedprune_device.serving.model_slots import ServingRecord
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore
from support.faults.failing_disk import Crash, fault
from support.faults.power_cuts import power

pytestmark = pytest.mark.board

Snapshot = tuple[Any, ...]

MOST_SYNCS = 20  # in a round, connecting included


def weights_of(number: int) -> bytes:
    return tensorfile.encode({"w": np.full((3, 6), number, np.float32), "b": np.zeros(3, np.float32)})


class Life:
    """The writes of a device's life, two rounds of it."""

    def __init__(self, root: Path, graphs: Path) -> None:
        self.root = root
        self.graph = (graphs / "inference.onnx").read_bytes()
        self.store: DeviceStore | None = None
        self.done = 0

    def open(self) -> DeviceStore:
        self.store = DeviceStore(self.root, clock=lambda: 0.0)
        return self.store

    def run(self, watch: Callable[[DeviceStore], object] = lambda _: None) -> None:
        store = self.open()
        watch(store)
        for step in self.steps():
            step(store)
            self.done += 1
            watch(store)

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def steps(self) -> list[Callable[[DeviceStore], object]]:
        rounds: list[Callable[[DeviceStore], object]] = [DeviceStore.next_session]
        for n in (1, 2):
            rounds += [
                lambda s, n=n: s.accept(self.offer(n)),
                lambda s: s.delete_unneeded_blobs(),
                lambda s, n=n: s.blobs.put(weights_of(n)),
                lambda s: s.blobs.put(self.graph),
                lambda s, n=n: s.slots.stage(s.blobs.path(BlobRef.of(self.graph).sha256), weights_of(10 + n)),
                lambda s, n=n: s.slots.install(self.record(n)),
                lambda s, n=n: (s.blobs.put(weights_of(10 + n)), s.keep_update(self.update(n))),
                lambda s: s.finish_offer(),
                lambda s: s.forget_update(),
            ]
        return rounds

    def offer(self, n: int) -> Offer:
        blob = BlobRef.of(weights_of(n))
        graph = BlobRef.of(self.graph)
        return Offer("job", n, 0, 7, "a" * 64, "b" * 64, (3,), 3, blob, graph, graph, {})

    def update(self, n: int) -> UpdateAnnouncement:
        return UpdateAnnouncement("d", "job", n, 0, "0" * 64, BlobRef.of(weights_of(10 + n)), 5, 5, {})

    def record(self, n: int) -> ServingRecord:
        files = {"inference.onnx": self.graph, "weights.safetensors": weights_of(10 + n)}
        return ServingRecord("job", n, 3, {name: BlobRef.of(raw).sha256 for name, raw in files.items()})


def snapshot(store: DeviceStore) -> Snapshot:
    """What a device would continue with; a blob that nobody refers to doesn't count."""
    serving = store.slots.current()
    task = store.task
    return (
        store.session,
        None if task is None else (task.offer.round, task.done),
        None if store.pending is None else store.pending.round,
        None if serving is None else serving.round,
    )


def fails_for_room(step: Callable[[DeviceStore], object], store: DeviceStore) -> bool:
    try:
        step(store)
    except StorageFullError:
        return True
    return False


def run_undisturbed(root: Path, graphs: Path) -> tuple[list[Snapshot], int]:
    life = Life(root, graphs)
    states: list[Snapshot] = []
    with fault(0, None) as count:
        life.run(lambda s: states.append(snapshot(s)))
    life.close()
    return states, count[0]


def test_a_death_at_any_write_leaves_the_state_before_or_after_it(tmp_path: Path, graphs: Path) -> None:
    states, writes = run_undisturbed(tmp_path / "dry", graphs)
    assert writes > 60
    for at in range(1, writes + 1):
        life = Life(tmp_path / str(at), graphs)
        with fault(at, Crash()), pytest.raises(Crash):
            life.run()
        life.close()
        done = life.done
        with DeviceStore(life.root) as reopened:
            assert snapshot(reopened) in (states[done], states[done + 1]), (at, done)


def test_a_full_disk_at_any_write_loses_nothing_and_the_write_can_be_repeated(tmp_path: Path, graphs: Path) -> None:
    states, writes = run_undisturbed(tmp_path / "dry", graphs)
    for at in range(1, writes + 1):
        life = Life(tmp_path / str(at), graphs)
        store = life.open()
        with fault(at, OSError(errno.ENOSPC, "No space left on device")):
            for number, step in enumerate(life.steps()):
                if fails_for_room(step, store):
                    assert snapshot(store) in (states[number], states[number + 1])
                    if number % 9 == 6:  # the stage may be used up by an install that got that far
                        life.steps()[number - 1](store)
                    step(store)
        assert snapshot(store) == states[-1]
        life.close()


def test_a_round_costs_a_card_few_syncs_however_large_its_model_is(tmp_path: Path, graphs: Path) -> None:
    """What `docs/update-the-fleet.md` says of wear; every sync is at least one erased block somewhere."""
    life = Life(tmp_path, graphs)
    with power() as supply:
        life.run()
    life.close()
    assert supply.names.count("fsync") <= 2 * MOST_SYNCS


def test_two_processes_cannot_share_a_state_directory(tmp_path: Path) -> None:
    with DeviceStore(tmp_path), pytest.raises(StorageError, match=str(tmp_path)):
        DeviceStore(tmp_path)


def test_a_directory_belongs_to_one_device_of_one_site(tmp_path: Path) -> None:
    attic, shed = DirectoryOwner("attic", "home"), DirectoryOwner("shed", "home")
    for _ in range(2):
        with DeviceStore(tmp_path, owner=attic):
            attic.claim(tmp_path)
    for refused in (lambda: DeviceStore(tmp_path, owner=shed), lambda: shed.claim(tmp_path)):
        with pytest.raises(StorageError, match="device attic"):
            refused()
    with pytest.raises(StorageError, match="site field"):
        DeviceStore(tmp_path, owner=DirectoryOwner("attic", "field"))
    DeviceStore(tmp_path, owner=attic).close()


@pytest.mark.parametrize("name", ["server.db", "identity/authority.key"])
def test_a_servers_folder_is_no_device_s(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(StorageError, match=name):
        DeviceStore(tmp_path, owner=DirectoryOwner("attic", "home"))
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("name", ["session.json", "offer.json", "pending.json", "serving/serving.json"])
@pytest.mark.parametrize("damage", [b"", b'{"body":"{}","sha256":"0"}', b"\xff" * 99])
def test_a_damaged_file_costs_only_what_it_says(tmp_path: Path, graphs: Path, name: str, damage: bytes) -> None:
    life = Life(tmp_path, graphs)
    store = life.open()
    for step in life.steps()[:8]:
        step(store)
    before = snapshot(store)
    life.close()
    (tmp_path / name).write_bytes(damage)
    with DeviceStore(tmp_path) as reopened:
        after = snapshot(reopened)
    lost = ["session.json", "offer.json", "pending.json", "serving/serving.json"].index(name)
    assert after[lost] in (None, 0)
    assert [v for i, v in enumerate(after) if i != lost] == [v for i, v in enumerate(before) if i != lost]


def test_an_install_of_other_files_than_recorded_is_refused(tmp_path: Path, graphs: Path) -> None:
    life = Life(tmp_path, graphs)
    store = life.open()
    (tmp_path / "graph").write_bytes(life.graph)
    store.slots.stage(tmp_path / "graph", weights_of(1))
    with pytest.raises(StorageError, match="staged"):
        store.slots.install(life.record(1))
    assert store.slots.current() is None
    life.close()


def test_a_pending_update_without_its_weights_is_given_up_for_its_offer(tmp_path: Path, graphs: Path) -> None:
    life = Life(tmp_path, graphs)
    store = life.open()
    for step in life.steps()[:8]:
        step(store)
    store.blobs.path(life.update(1).weights.sha256).write_bytes(b"rot")
    life.close()
    with DeviceStore(tmp_path) as reopened:
        assert reopened.pending is None
        assert not reopened.task.done
        assert not reopened.blobs.has(life.update(1).weights.sha256)


@pytest.mark.parametrize(
    ("times", "numbers"),
    [
        ((0.0, 0.0, 0.0), (1, 2, 3)),
        ((5.0, 5.0, 2.0), (5000, 5001, 5002)),
        ((5.0, 7.5, 9.0), (5000, 7500, 9000)),
        ((1e300, 1e300, 9.0), (2**53, 2**53 + 1, 2**53 + 2)),  # a clock far in the future leaves numbers for later
    ],
)
def test_session_numbers_grow_over_restarts(tmp_path: Path, times: tuple[float, ...], numbers: tuple[int, ...]) -> None:
    sessions = []
    for now in times:
        with DeviceStore(tmp_path, clock=lambda now=now: now) as store:
            sessions.append(store.next_session())
    assert tuple(sessions) == numbers
