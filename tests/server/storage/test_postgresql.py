"""The server's database in PostgreSQL: all that SQLite does, and it may be started again under the server."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.core.errors import ConfigError, StorageError
from fedprune_server.cli.status import job_status
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import parse_config
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.engine.stored_job import stored_tables
from fedprune_server.simulation.digits import digits_model
from fedprune_server.storage.database import LostConnectionError
from fedprune_server.storage.folder_layout import DATABASE_FILE
from fedprune_server.storage.storage import Storage
from support.fakes.opened_job import open_job
from support.fakes.stored_job import second_round_state
from support.processes.postgres import Postgres

pytestmark = pytest.mark.postgresql


@pytest.fixture
def storage(postgres: Postgres) -> Iterator[Storage]:
    with Storage(postgres.database()) as storage:
        yield storage


def again(storage: Storage, *, create: bool = True) -> Storage:
    return Storage(storage.database.engine.url.render_as_string(hide_password=False), create=create)


def test_every_commit_waits_for_the_disk_whatever_the_database_says(postgres: Postgres) -> None:
    url = postgres.database()
    name = url.rpartition("/")[2]
    for setting, expected in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = {setting}")
        with Storage(url) as storage, storage.database.transaction() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://root:hushhush@127.0.0.1:1/none", "can't reach .*127.0.0.1:1/none"),
        ("postgresql+psycopg://root@127.0.0.1:1/none?password=hushhush", "can't reach"),
    ],
)
def test_a_database_that_is_not_there_is_one_error_without_the_password(url: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as raised:
        Storage(url)
    assert "hushhush" not in str(raised.value)


# A database that is started again.


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server that may be killed."""
    with closing(Postgres()) as postgres:
        postgres.start()
        yield postgres


def test_a_killed_database_loses_nothing_and_the_server_waits_for_it(own_postgres: Postgres) -> None:
    state = State(model="m" * 64)
    with Storage(own_postgres.database()) as storage:
        for number in range(1, 31):
            state.round = number
            if number in (10, 20):
                own_postgres.kill() if number == 10 else own_postgres.stop()
                threading.Timer(1.0, own_postgres.start).start()
            storage.save(state, [on.Scored(number, "r" * 64)], float(number))
        assert storage.load() == state
        assert [body["round"] for _, _, _, body in storage.log.events()] == list(range(1, 31))


def test_a_database_that_stays_away_is_one_error(own_postgres: Postgres) -> None:
    state = State(model="m" * 64)
    with Storage(own_postgres.database()) as storage:
        storage.save(state, (), 0.0)
        storage.database.max_away_s = 1.0
        own_postgres.kill()
        state.round = 1
        with pytest.raises(LostConnectionError, match="1 s"):
            storage.save(state, [on.Scored(1, "r" * 64)], 1.0)
        own_postgres.start()
        storage.save(state, [on.Scored(1, "r" * 64)], 2.0)
        assert [at for _, at, _, _ in storage.log.events()] == [2.0]


class Cutting:
    """A relay to the database that cuts the connection as a commit is under way.

    Args:
        port: The database's.
        answered: Whether the database gets the commit, so that only its answer is lost.
    """

    def __init__(self, port: int, *, answered: bool) -> None:
        self._port, self._answered = port, answered
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def close(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._ends:
            end.close()

    def _start(self, work: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                self._start(self._pump, near, far, True)
                self._start(self._pump, far, near, False)

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if up and b"COMMIT" in data and self.cuts:
                    self.cuts -= 1
                    if self._answered:
                        source.shutdown(socket.SHUT_RDWR)  # nobody hears the answer
                        target.sendall(data)
                        time.sleep(0.2)
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("answered", [True, False])
def test_an_event_is_saved_once_where_the_commits_answer_is_lost(postgres: Postgres, answered: bool) -> None:
    url = postgres.database()
    with closing(Cutting(postgres.port, answered=answered)) as relay:
        state = second_round_state()
        with Storage(url.replace(f":{postgres.port}/", f":{relay.port}/")) as storage:
            for number in range(3, 8):
                state.round = number
                state.devices["a"].samples += 1
                if number in (4, 6):
                    relay.cuts = 2
                storage.save(state, [on.Scored(number, "r" * 64)], float(number))
            assert relay.cuts == 0
    with Storage(url) as storage:
        assert storage.load() == state
        assert [body["round"] for _, _, _, body in storage.log.events()] == list(range(3, 8))


# A state folder whose database is elsewhere.


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    return ServerConfig(model=str(tmp_path / "model.onnx"))


def test_a_folder_remembers_where_its_database_is(tmp_path: Path, postgres: Postgres, config: ServerConfig) -> None:
    url, state = postgres.database(), tmp_path / "state"
    with StateFolder(state, url) as folder:
        opened = open_job(folder, config)
    assert not (state / DATABASE_FILE).exists()
    assert (state / "database").stat().st_mode & 0o777 == 0o600
    with StateFolder(state) as folder:
        assert open_job(folder, parse_config(stored_tables(state, {}) or {}, Path())).state == opened.state
    assert job_status(state)["job"]["name"] == "job"


def test_a_start_that_fails_leaves_no_word_of_the_database(tmp_path: Path, postgres: Postgres) -> None:
    state = tmp_path / "state"
    with StateFolder(state, postgres.database()) as folder, pytest.raises(ConfigError, match="no model is given"):
        open_job(folder, ServerConfig())
    assert not (state / "database").exists()


@pytest.mark.parametrize("first", [True, False])
def test_a_job_is_not_begun_anew_in_another_database(
    tmp_path: Path, postgres: Postgres, config: ServerConfig, first: bool
) -> None:
    state = tmp_path / "state"
    with StateFolder(state, postgres.database() if first else None) as folder:
        open_job(folder, config)
    with pytest.raises(ConfigError, match=str(state)):
        StateFolder(state, postgres.database())
    with StateFolder(state) as folder:  # which nobody holds
        assert folder.storage.settings() is not None


def test_a_second_folder_of_a_job_takes_the_same_model_only(
    tmp_path: Path, postgres: Postgres, config: ServerConfig
) -> None:
    url = postgres.database()
    with StateFolder(tmp_path / "one", url) as folder:
        opened = open_job(folder, config)
        blobs = folder.store
    with StateFolder(tmp_path / "two", url) as folder:
        folder.store.put(blobs.read(opened.state.model))
        with pytest.raises(StorageError, match=r"model\.onnx"):
            folder.read_job(ServerConfig())
        assert folder.read_job(config).state == opened.state
    assert (tmp_path / "two" / "model.onnx").read_bytes() == (tmp_path / "one" / "model.onnx").read_bytes()
