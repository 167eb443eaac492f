"""An aggregator's start: with its parent, without it, and with other jobs than before."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core.closing import Closing
from fedprune.core.errors import BrokerError
from fedprune.jobs.job import Job
from fedprune_server.aggregators import parent
from fedprune_server.aggregators.connections import RegionConnections, RegionDown, RegionUp
from fedprune_server.aggregators.dispatcher import ParentJob, RegionDispatcher
from fedprune_server.aggregators.place import LANDING, configurations, models, parent_of
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_directory import StateFolder
from fedprune_server.simulation.digits import digits_model
from support.fakes.opened_job import open_job

pytestmark = pytest.mark.soak


class Upper(Closing):
    """A parent of these jobs, which lets aggregators in."""

    def __init__(self, folder: Path, names: Sequence[str], port: int = 0) -> None:
        raw = digits_model()
        about = models({n: (Job(name=n), "net", raw) for n in names}, ServerConfig(state=folder))
        self._connections = RegionConnections("127.0.0.1", port, None, BlobStore(folder / LANDING, durable=False))
        self._dispatcher = RegionDispatcher(
            self._connections, {n: ParentJob(about[n], State(about[n]["model"])) for n in names}
        )
        self._connections.serve({n: BlobStore(folder / n, durable=False) for n in names}, lambda: None)
        self.port = self._connections.port
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            for item in self._connections.collect():
                if isinstance(item, RegionUp):
                    self._dispatcher.up(item.region)
                elif isinstance(item, RegionDown):
                    self._dispatcher.down(item.region)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._connections.close()


def aggregator(folder: Path, port: int) -> ServerConfig:
    return ServerConfig(state=folder / "north", parent=f"ws://127.0.0.1:{port}", region="north")


def started(config: ServerConfig) -> list[ServerConfig]:
    """An aggregator's configurations of its jobs."""
    with parent_of(config, None) as link:
        return configurations(config, link)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An aggregator that doesn't wait long for a parent that it knows."""
    monkeypatch.setattr(parent, "_AGAIN_S", 0.1)
    monkeypatch.setattr(parent, "FIRST_S", 0.01)


@pytest.mark.usefixtures("hasty")
def test_an_aggregator_starts_without_its_parent_with_the_jobs_that_it_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Upper(tmp_path / "parent", ["tier", "second"]) as upper:
        config = aggregator(tmp_path, upper.port)
        before = started(config)
    assert [c.job.name for c in before] == ["tier", "second"]
    assert [c.state for c in before] == [config.state, config.state / "jobs" / "second"]
    with caplog.at_level(logging.WARNING), parent_of(config, None) as link:
        assert configurations(config, link) == before
        assert "boards are served by the parent's latest orders" in caplog.text
        assert not link.connected
        with Upper(tmp_path / "parent", ["tier", "second"], upper.port):
            until(lambda: link.connected)
            assert not link.outdated


@pytest.mark.usefixtures("hasty")
def test_an_aggregator_that_started_alone_begins_anew_if_its_parent_has_other_jobs(tmp_path: Path) -> None:
    with Upper(tmp_path / "parent", ["tier"]) as upper:
        config = aggregator(tmp_path, upper.port)
        started(config)
    with parent_of(config, None) as link, Upper(tmp_path / "parent", ["other"], upper.port):
        assert list(link.jobs) == ["tier"]
        until(lambda: link.outdated)
        link.close()
        assert [c.job.name for c in started(config)] == ["other"]


@pytest.mark.usefixtures("hasty")
def test_without_its_parent_an_aggregator_needs_its_record_and_its_model(tmp_path: Path) -> None:
    with Upper(tmp_path / "parent", ["tier"]) as upper:
        config = aggregator(tmp_path, upper.port)
        (known,) = started(config)
    landing, path = config.state / LANDING, Path(str(known.model))
    path.write_bytes(b"no model")
    with parent_of(config, None) as link, pytest.raises(BrokerError, match="the parent isn't connected"):
        configurations(config, link)
    (landing / "jobs.json").write_text("{")
    link = parent.ParentLink(config.parent, "north", None, BlobStore(landing, durable=False))
    with link, pytest.raises(BrokerError, match="no parent answers"):
        link.start(patience_s=0.1)
    with Upper(tmp_path / "parent", ["tier"], upper.port):
        assert started(config) == [known]
        assert path.read_bytes() == digits_model()


def test_a_parent_s_job_of_another_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with Upper(tmp_path / "parent", ["tier"]) as upper:
        config = replace(aggregator(tmp_path, upper.port), blobs="s3://fleet/north")
        (first,) = started(config)
    assert (first.state, first.blobs) == (config.state, config.blobs)
    with StateFolder(first.state) as folder:
        open_job(folder, replace(first, blobs="folder"))
    with Upper(tmp_path / "parent", ["other"], upper.port):
        (other,) = started(config)
    assert (other.state, other.blobs) == (config.state / "jobs" / "other", "s3://fleet/north/other")
    with Upper(tmp_path / "parent", ["other", "tier"], upper.port):
        assert [(c.job.name, c.state) for c in started(config)] == [("other", other.state), ("tier", config.state)]
