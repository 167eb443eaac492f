"""A board whose server is away: it trains on, on a schedule, keeps what it still has to send, and catches up."""

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from fedprune.core import tensorfile
from fedprune.core.errors import FedpruneError, StorageFullError
from fedprune.model.selection import Tensors
from fedprune.wire.messages import Offer, UpdateAnnouncement
from fedprune_device.agent.agent import Agent
from fedprune_device.agent.offer_handler import OfferHandler
from fedprune_device.data.dataset import LocalData
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.secure_update import SecureUpdate
from fedprune_device.network.update_sender import UpdateSender
from fedprune_device.network.uplink import Uplink
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training import offline_training as alone
from fedprune_device.training import training_thread
from fedprune_device.training.offline_training import OfflineTraining
from fedprune_device.training.round_runner import RoundRunner
from fedprune_device.training.training_thread import NICENESS
from support.fakes.agent_fleet import MemoryLink, MemoryServer
from support.fakes.agent_harness import agent_on, expected_tensors, same
from support.faults.power_cuts import EACH_KIND, CutError, cuts, power
from support.waiting import until

pytestmark = pytest.mark.board

HOUR = 3600.0
DAY = 24 * HOUR


class Board:
    """An agent, its server, and the link between them that a test cuts."""

    def __init__(self, root: Path, graphs: Path, weights: Tensors, data: LocalData) -> None:
        self.root, self.data = root, data
        self.server = MemoryServer(root / "server", graphs, weights)
        self.server.ends = False

    def run_agent(
        self, script: Callable[[MemoryLink, Agent], None], every: float = 0.0, guard: ThermalGuard | None = None
    ) -> None:
        """Run the agent while a script of a thread goes on; what the script raises is raised here."""
        raised: list[BaseException] = []
        with DeviceStore(self.root / "state", owner=DirectoryOwner("d", "site")) as store:
            link = MemoryLink(self.server)
            agent = agent_on(store, link, self.data, train_alone_s=every, guard=guard)

            def play() -> None:
                try:
                    script(link, agent)
                except BaseException as error:  # noqa: BLE001 - raised below
                    raised.append(error)
                finally:
                    agent.stop()

            thread = threading.Thread(target=play)
            thread.start()
            agent.run()
            thread.join()
        if raised:
            raise raised[0]

    def note_serving(self, served: list[Tensors]) -> bool:
        """Add what serves while the agent runs; False if it changes just then."""
        slots = ModelSlots(self.root / "state" / "serving")
        record = slots.current()
        with contextlib.suppress(FedpruneError, OSError):
            served.append(tensorfile.decode(slots.weights(record)) if record is not None else {})
            return True
        return False

    def serving_weights(self) -> Tensors:
        with DeviceStore(self.root / "state") as store:
            record = store.slots.current()
            assert record is not None
            return tensorfile.decode(store.slots.weights(record))


@pytest.fixture
def board(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Board:
    return Board(tmp_path, graphs, weights, data)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is away at once."""
    monkeypatch.setattr(alone, "AWAY_S", 1.0)


def times(board: Board) -> int:
    path = board.root / "state" / "alone.json"
    return int(alone.atomic_file.read_document(path)["times"]) if path.exists() else 0  # type: ignore[index]


def test_a_board_trains_on_while_its_server_is_away_and_then_goes_on_with_the_fleet(
    board: Board, graphs: Path, weights: Tensors, data: LocalData, soon: None
) -> None:
    board.server.plan = [board.server.offer(1)]
    served: list[Tensors] = []

    def script(link: MemoryLink, agent: Agent) -> None:
        until(lambda: 1 in board.server.updates, "round 1")
        link.drop()
        sent_count = len(board.server.seen)
        until(lambda: times(board) >= 2, "training alone, twice")
        assert len(board.server.seen) == sent_count
        until(lambda: board.note_serving(served), "what serves meanwhile")
        board.server.plan.append(board.server.offer(2))
        link.restore()
        until(lambda: 2 in board.server.updates, "round 2")

    board.run_agent(script, every=0.2)
    # What was trained alone is in no update: round 2 began with the weights of the server.
    assert same(board.server.result(1), expected_tensors(graphs, weights, data, 1))
    assert same(board.server.result(2), expected_tensors(graphs, weights, data, 2))
    assert same(board.serving_weights(), expected_tensors(graphs, weights, data, 2))
    # It served all the same.
    assert len(served) == 1
    assert not same(served[0], expected_tensors(graphs, weights, data, 1))


class Gate(ThermalGuard):
    """Holds training between two steps while it is shut, as heat would."""

    def __init__(self) -> None:
        super().__init__()
        self.shut = False

    def pause(self, stop: Callable[[], bool]) -> bool:
        while self.shut and not stop():
            time.sleep(0.01)
        return stop()


def test_an_offer_ends_training_alone(board: Board, soon: None) -> None:
    board.server.plan = [board.server.offer(1)]
    gate = Gate()

    def script(link: MemoryLink, agent: Agent) -> None:
        until(lambda: 1 in board.server.updates)
        gate.shut = True
        link.drop()
        until(lambda: agent.status.to_dict()["alone"])
        assert not agent.is_quiet, "a restart would cost what was trained"
        board.server.plan.append(board.server.offer(2))
        link.restore()
        until(lambda: not agent.status.to_dict()["alone"], "the end of training alone")
        gate.shut = False
        until(lambda: 2 in board.server.updates)

    board.run_agent(script, every=0.2, guard=gate)
    assert times(board) == 0


# When


def test_threads_that_train_have_the_lowest_priority(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_thread, "NICENESS", NICENESS)
    board.server.plan = [board.server.offer(1)]
    priorities: set[int] = set()

    class Noting(ThermalGuard):
        def pause(self, stop: Callable[[], bool]) -> bool:
            priorities.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return stop()

    priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    board.run_agent(lambda *_: until(lambda: 1 in board.server.updates), guard=Noting())
    assert priorities == {19}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == priority


class Silent(MemoryLink):
    """A link that leads nowhere."""

    def __init__(self) -> None:
        pass

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        return False


class At:
    """A board with a finished round, and clocks that a test sets."""

    def __init__(self, root: Path, data: LocalData) -> None:
        self.store = DeviceStore(root, owner=DirectoryOwner("d", "site"))
        self.wall = self.store.slots.installed_at()
        self.now = 1000.0
        self.alone = self.handler_at(data)

    def handler_at(self, data: LocalData, every: float = DAY) -> OfferHandler:
        return handler(self.store, data, every, lambda: self.wall)

    def turn(self) -> None:
        self.alone.turn(self.now, connected=False)

    def goes_by(self, seconds: float, *, connected: bool = False) -> bool:
        """Let time go by; whether it trains then, or did."""
        self.wall += seconds
        self.now += seconds
        self.alone.turn(self.now, connected=connected)
        worker = self.alone._worker
        if worker is not None:
            worker.join(30)
            self.alone.turn(self.now, connected=connected)
        return worker is not None


def handler(store: DeviceStore, data: LocalData, every: float, wall: Callable[[], float] = time.time) -> OfferHandler:
    connection = BoardConnection(Silent(), MessageChannel("d", "site"))
    uplink, runner = Uplink(connection), RoundRunner("d", store.blobs, store.slots, data)
    offline = OfflineTraining(store, runner, every, wall)
    downloader = Downloader(store.blobs, connection, uplink)
    secure = SecureUpdate(connection, uplink, store.blobs)
    sender = UpdateSender(connection, uplink, store.blobs)
    return OfferHandler(store, downloader, uplink, sender, runner, offline, secure)


@pytest.fixture
def at(board: Board, data: LocalData) -> Iterator[At]:
    board.server.plan = [board.server.offer(1)]
    board.run_agent(lambda *_: until(lambda: 1 in board.server.updates))
    at = At(board.root / "state", data)
    at.turn()
    yield at
    at.store.close()


def test_it_trains_as_often_as_it_is_told_to(at: At) -> None:
    assert [at.goes_by(6 * HOUR) for _ in range(12)] == 3 * [False, False, False, True]


def test_a_server_that_was_heard_of_is_not_away(at: At) -> None:
    assert not at.goes_by(DAY - 60, connected=True)
    at.alone.note_contact(at.now)
    assert not at.goes_by(120, connected=True)
    assert not at.goes_by(DAY / 2, connected=True)
    assert at.goes_by(DAY / 2, connected=True)


def test_a_moment_without_a_connection_is_no_absence(at: At) -> None:
    at.wall += DAY
    at.alone.note_contact(at.now)
    assert not at.goes_by(alone.AWAY_S - 1)
    assert at.goes_by(2)


def test_the_schedule_outlives_restarts_and_a_clock_that_was_set_back(at: At, data: LocalData) -> None:
    assert at.goes_by(DAY)
    for restart in range(3):
        at.alone = at.handler_at(data)
        at.turn()
        assert at.goes_by(8 * HOUR) == (restart == 2)
    at.wall -= 1000 * DAY
    assert not at.goes_by(DAY / 2)
    assert at.goes_by(DAY / 2)


def test_it_never_trains_alone_unless_it_is_told_to(at: At, data: LocalData) -> None:
    at.alone = at.handler_at(data, 0.0)
    assert not at.goes_by(1000 * DAY)


def test_only_the_model_of_the_last_offer_is_trained_on(at: At) -> None:
    task = at.store.task
    other_offers: list[Offer] = [
        replace(task.offer, round=2),
        replace(task.offer, job="another"),
        replace(task.offer, mask=task.offer.weights),
    ]
    for offer in other_offers:
        at.store.accept(offer)
        assert not at.goes_by(DAY)
    at.store.drop_offer()
    assert not at.goes_by(DAY)


def test_what_was_added_to_gradients_in_the_last_round_is_left_out(at: At) -> None:
    before = at.store.slots.current()
    at.store.accept(replace(at.store.task.offer, drift=at.store.task.offer.weights))
    assert at.goes_by(DAY)
    assert at.store.slots.current() != before


def test_what_validation_samples_call_worse_does_not_serve(
    at: At, data: LocalData, caplog: pytest.LogCaptureFixture
) -> None:
    before = at.store.slots.current()
    wrong = LocalData(data.x_train, data.y_train, data.x_test, data.y_test, data.x_train, (data.y_train + 1) % 3)
    at.alone = at.handler_at(wrong)
    at.turn()
    with caplog.at_level("INFO"):
        assert at.goes_by(DAY)
    assert "the old model serves" in caplog.text
    assert not re.search(r"_(seconds|bytes|before|after|test)\b", caplog.text), "names of metrics are no sentence"
    assert at.store.slots.current() == before
    assert not at.goes_by(DAY / 2)
    at.alone = at.handler_at(
        LocalData(data.x_train, data.y_train, data.x_test, data.y_test, data.x_train, data.y_train)
    )
    at.turn()
    assert at.goes_by(DAY)
    assert at.store.slots.current() != before


def test_a_full_disk_changes_nothing(at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    before = at.store.slots.current()

    def full(*_: Any) -> Any:
        raise StorageFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(at.store.blobs, "put", full)
        with pytest.raises(StorageFullError):
            at.goes_by(DAY)
        assert not at.goes_by(DAY / 2)
    assert at.goes_by(DAY / 2)
    assert at.store.slots.current() != before


# The power fails


def train(root: Path, data: LocalData) -> None:
    """One training alone, in this thread."""
    with DeviceStore(root, owner=DirectoryOwner("d", "site")) as store:
        store.delete_unneeded_blobs()
        offers = handler(store, data, DAY)
        runner, offer = offers._offline.runner, offers._offline._offer()
        assert offer is not None
        worker: Any = SimpleNamespace(offline=True, offer=offer, runner=runner)
        offers._commit(worker, runner.carry_out(offer), 0.0)
        store.delete_unneeded_blobs()


def state_of(root: Path) -> tuple[str, UpdateAnnouncement | None, Any]:
    with DeviceStore(root, owner=DirectoryOwner("d", "site")) as store:
        predictor, record = store.slots.open()
        predictor.check(3)
        return record.weights, store.pending, store.task


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_cut_at_any_write_leaves_the_old_or_the_new_model_and_the_update_that_waits(
    board: Board, data: LocalData, kind: str
) -> None:
    board.server.plan = [board.server.offer(1)]
    board.server.accepts = False
    board.run_agent(lambda *_: until(lambda: board.server.of(UpdateAnnouncement)))
    state, cut = board.root / "state", board.root / "cut"
    old, pending, task = state_of(state)
    assert pending is not None
    shutil.copytree(state, board.root / "calm")
    with power() as supply:
        train(board.root / "calm", data)
    new = state_of(board.root / "calm")[0]
    assert new != old
    for at, how in cuts(kind, supply.names):
        shutil.copytree(state, cut)
        with power(at, how), pytest.raises(CutError):
            train(cut, data)
        assert state_of(cut) in [(old, pending, task), (new, pending, task)]
        train(cut, data)
        after_cut = state_of(cut)
        assert after_cut[1:] == (pending, task)
        assert after_cut[0] != old
        shutil.rmtree(cut)
    assert supply.count > 20
