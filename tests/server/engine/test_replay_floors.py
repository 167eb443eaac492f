"""Replay floors are stored in one transaction with the effects of the messages."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sql

from fedprune.coordination import State
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import stream_of
from fedprune.security.signed_envelope import seal
from fedprune.wire.messages import Alive, Birth
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.runnable_job import DeviceServices, RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.messaging.authentication import AuthenticatedLink
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import ToyWorker
from support.fakes.inbox import Inbox
from support.fakes.tiny_job import ARCHITECTURE, JOB

TOPICS = Topics("default")
KEY = SigningKey.make()
UP = TOPICS.up("a")


def signed(message: Birth | Alive, epoch: int) -> tuple[str, bytes]:
    return UP, seal(KEY, UP, epoch, 0, message.to_bytes())


class PowerCutError(Exception):
    """The power fails."""


@contextmanager
def server(folder: Path, *sent: tuple[str, bytes], fails: bool = False) -> Iterator[Server]:
    """A server that is about to read these messages; the power may fail as their epochs are committed."""
    with ExitStack() as stack:
        identity = stack.enter_context(IdentityFolder(folder))
        state_folder = stack.enter_context(StateFolder(folder))
        storage, worker = state_folder.storage, ToyWorker(state_folder.store)
        identity.use_database(storage.database)
        site = SiteLink(AuthenticatedLink(Inbox([ConnectionUp(), *sent]), identity), TOPICS)
        state = storage.load() or State(model=worker.initial())
        job = RunnableJob(JOB, ARCHITECTURE, state, storage, state_folder.store, worker)
        runner = JobRunner(job, site, DeviceServices(members=identity.store.members))
        runner.open()
        stack.callback(runner.close)
        statements: list[str] = []

        def cut(_connection: sql.Connection) -> None:
            if any("INTO epochs" in statement for statement in statements):
                raise PowerCutError

        if fails:
            sql.event.listen(storage.database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
            sql.event.listen(storage.database.engine, "commit", cut)
        yield Server([runner], site)


def stored_devices_and_epochs(folder: Path) -> tuple[set[str], dict[str, int]]:
    """Devices that the job knows, and the epochs of the board."""
    with Storage.open_in(folder) as storage:
        state, store = storage.load(), IdentityStore(storage.database)
        return set(state.devices if state is not None else ()), store.latest_epochs().get(KEY.verifying_key.hex, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with IdentityFolder.make(tmp_path, "default") as identity:
        identity.store.approve("a", KEY.verifying_key.hex, 1)
    return tmp_path


def test_an_epoch_is_stored_with_what_its_messages_led_to_or_not_at_all(folder: Path) -> None:
    birth = signed(Birth("a", 7, "raspberry-pi-5", 10, "test"), 5)
    with server(folder, birth, fails=True) as first, pytest.raises(PowerCutError):
        first._turn()
    assert stored_devices_and_epochs(folder) == (set(), {})
    with server(folder, birth) as second:
        second._turn()
        assert "a" in second.connected
        second._turn()
    assert stored_devices_and_epochs(folder) == ({"a"}, {stream_of(UP): 5})
    with server(folder, birth) as third:
        third._turn()
        assert "a" not in third.connected, "it is a repetition"


def test_an_epoch_is_stored_where_nothing_else_is(folder: Path) -> None:
    with server(folder, signed(Alive("a", 7), 6)) as daemon:
        daemon._turn()
    assert stored_devices_and_epochs(folder) == (set(), {stream_of(UP): 6})
