"""The log of a job's events: in order, read a page at a time, and never longer than it has to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import events as on
from fedprune_server.storage.storage import FILE, Storage
from support.fakes.stored_job import born
from support.fakes.tiny_job import ARCHITECTURE, JOB


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage.at(tmp_path) as made:
        yield made


def test_events_are_kept_in_order_with_their_time(storage: Storage) -> None:
    state = State(model="m" * 64)
    coordinator = SynchronousCoordinator(replace(JOB, devices=9), ARCHITECTURE, state)
    for number, name in enumerate("cab"):
        coordinator.handle(born(name), float(number))
        storage.save(state, [born(name)], float(number))
    assert [(at, kind, body["device"]) for _, at, kind, body in storage.log.events()] == [
        (0.0, "DeviceBorn", "c"),
        (1.0, "DeviceBorn", "a"),
        (2.0, "DeviceBorn", "b"),
    ]


def test_the_log_is_read_page_by_page(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(model="m" * 64)
    for number in range(1, 8):
        state.round = number
        storage.save(state, [on.Scored(number, "r" * 64)], float(number))
    whole = list(storage.log.events())
    asked: list[int] = []
    transaction = storage.database.transaction
    monkeypatch.setattr(storage.database, "transaction", lambda: asked.append(1) or transaction())
    for page in (1, 3, 7):
        monkeypatch.setattr("fedprune_server.storage.storage._PAGE", page)
        asked.clear()
        assert list(storage.log.events()) == whole
        assert len(asked) == 7 // page + 1 + (7 % page > 0)
    assert list(storage.log.events(after=5)) == whole[5:]


def test_the_log_keeps_only_the_latest_events(tmp_path: Path) -> None:
    state = State(model="m" * 64)
    with Storage(f"sqlite:///{tmp_path / FILE}", logged=20) as storage:
        for number in range(100):
            state.round = number
            storage.save(state, [on.Scored(number, "r" * 64)], float(number))
        numbers = [body["round"] for _, _, _, body in storage.log.events()]
    assert numbers == list(range(80, 100))


def test_a_server_is_no_device_that_was_heard(storage: Storage) -> None:
    events: list[on.Event] = [born("a"), born("b"), on.DeviceDied("a", 1), on.Scored(1, "r" * 64)]
    for number, event in enumerate(events, 1):
        with storage.database.writing() as connection:
            storage.log.write(connection, [event], float(number))
    assert storage.log.heard() == (4.0, {"a": 3.0, "b": 2.0})
