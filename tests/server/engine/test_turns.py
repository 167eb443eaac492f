"""What a turn of the server's loop takes in."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.wire.queues import ConnectionUp
from fedprune_server.engine.server import Server
from fedprune_server.messaging.transport import DroppedMessage, Item
from support.fakes.fleet import Fleet


class Waiting:
    """A connection on which all of this has come."""

    connected, room, unsent = True, True, 0

    def __init__(self, items: list[Item | DroppedMessage]) -> None:
        self.items = deque(items)

    def get(self, timeout: float | None = 0.0) -> Item | DroppedMessage | None:
        return self.items.popleft() if self.items else None


@pytest.fixture
def server(tmp_path: Path) -> Any:
    return Fleet(tmp_path).daemon()


def test_what_is_dropped_neither_ends_a_turn_nor_counts_as_silence(server: Server, monkeypatch: Any) -> None:
    """A flood that is dropped before others' answers must not make those seem silent."""
    items: list[Item | DroppedMessage] = [
        ConnectionUp(),
        DroppedMessage(),
        ("a", b"1"),
        DroppedMessage(),
        DroppedMessage(),
        ("b", b"2"),
    ]
    taken: list[Item] = []

    def take(item: Item) -> None:
        taken.append(item)
        assert server._caught_up == 0.0

    monkeypatch.setattr(server, "_link", Waiting(items))
    monkeypatch.setattr(server, "_site", replace(server._site, monotonic=lambda: 5.0))
    monkeypatch.setattr(server, "_take", take)
    server._turn()
    assert taken == [i for i in items if not isinstance(i, DroppedMessage)]
    assert server._caught_up == 5.0
