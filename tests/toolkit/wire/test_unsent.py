"""What waits to be sent is counted until paho says that it is on its way."""

from __future__ import annotations

import pytest

from fedprune.wire.queues import Unsent

pytestmark = pytest.mark.board


class Message:
    published = False
    asked = 0

    def is_published(self) -> bool:
        self.asked += 1
        return self.published


def test_bytes_count_until_they_are_on_their_way() -> None:
    unsent, messages = Unsent(), [Message() for _ in range(4)]
    for i, message in enumerate(messages):
        unsent.add(message, 10**i, qos=0)
    assert (unsent.size, len(unsent), unsent.settle()) == (1111, 4, False)
    messages[0].published = messages[1].published = True
    assert unsent.settle()
    assert (unsent.size, len(unsent)) == (1100, 2)
    unsent.clear()
    assert (unsent.size, len(unsent), unsent.settle()) == (0, 0, False)


def test_chunks_don_t_wait_behind_a_message_that_is_not_acknowledged() -> None:
    unsent, message, chunk = Unsent(), Message(), Message()
    unsent.add(message, 5, qos=1)
    unsent.add(chunk, 7, qos=0)
    chunk.published = True
    assert unsent.settle()
    assert (unsent.size, len(unsent)) == (5, 1)


def test_only_the_first_of_many_is_asked() -> None:
    unsent, messages = Unsent(), [Message() for _ in range(1000)]
    for message in messages:
        unsent.add(message, 1, qos=1)
    for _ in range(3):
        unsent.settle()
    assert [m.asked for m in messages[:2]] == [3, 0]
