"""What a turn of the server's loop takes in."""

from __future__ import annotations

import itertools
from collections import deque

from fedprune.wire.connection_events import ConnectionUp
from fedprune_server.messaging.intake import TURN_S, Intake
from fedprune_server.messaging.transport import Item, Unheard


class Waiting:
    """A connection on which all of this has come."""

    connected, room, unsent = True, True, 0

    def __init__(self, items: list[Item | Unheard]) -> None:
        self.items = deque(items)

    def get(self, timeout: float | None = 0.0) -> Item | Unheard | None:
        return self.items.popleft() if self.items else None

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        return True

    def flush(self, timeout: float) -> bool:
        return True


def test_what_is_not_heard_neither_ends_a_turn_nor_counts_as_silence() -> None:
    """A flood that is dropped before others' answers must not make those seem silent."""
    link = Waiting([ConnectionUp(), Unheard(), ("a", b"1"), Unheard(), Unheard(), ("b", b"2")])
    intake = Intake(link, lambda: 5.0)
    turn = intake.turn(0.0)
    assert next(turn) == ConnectionUp()
    assert next(turn) == ("a", b"1")
    assert intake.caught_up == 0.0
    assert [*turn] == [("b", b"2")]
    assert intake.caught_up == 5.0


def test_a_turn_ends_in_time_and_says_that_more_may_wait() -> None:
    for flood in ([("a", b"1")] * 100, [Unheard()] * 100):
        link = Waiting([*flood])
        intake = Intake(link, itertools.count(1.0, TURN_S / 2).__next__)
        assert len([*intake.turn(0.0)]) < 10
        assert len(link.items) > 90
        assert intake.caught_up == 0.0
