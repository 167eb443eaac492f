"""The inbox: nothing comes out of order, nothing beyond the limit waits, and a flood leaves room for the others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.wire.queues import MESSAGE_OVERHEAD_BYTES, Inbox, RetainedMessage, UnsentMessages
from fedprune.wire.topics import Topics
from support.nets import drawn_models as strategies  # noqa: F401 - its settings of Hypothesis

pytestmark = pytest.mark.board

SITE = Topics("lab")
LIMIT = 1_000_000


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 200_000), st.booleans()), max_size=60))
def test_what_is_taken_comes_out_in_order_and_never_more_than_the_limit_waits(
    steps: list[tuple[str, int, bool]],
) -> None:
    inbox, waiting = Inbox[str](LIMIT), []
    for name, size, read in steps:
        if read:
            assert inbox.get(0) == (waiting.pop(0) if waiting else None)
        elif inbox.put_message(SITE.up(name), bytes(size)):
            waiting.append((SITE.up(name), bytes(size)))
        assert inbox.queued_bytes == sum(MESSAGE_OVERHEAD_BYTES + len(p) for _, p in waiting) <= LIMIT
    for item in waiting:
        assert inbox.get(0) == item
    assert inbox.get(0) is None
    assert inbox.queued_bytes == 0


@given(st.integers(1, 20), st.integers(0, 100_000), st.integers(0, 20_000))
def test_floods_leave_half_of_it_to_who_sends_little(floods: int, size: int, little: int) -> None:
    inbox = Inbox[str](LIMIT)
    for _ in range(2 * LIMIT // (MESSAGE_OVERHEAD_BYTES + size) // floods + 2):
        for number in range(floods):
            inbox.put_message(SITE.up_blob(f"flood{number}"), bytes(size))

    assert inbox.put_message(SITE.up("honest"), bytes(little))


def test_there_is_always_room_for_an_event() -> None:
    inbox = Inbox[str](LIMIT)
    while inbox.put_message(SITE.up("a"), bytes(10_000)):
        pass
    inbox.put_event("down")
    events = [inbox.get(0) for _ in range(100)]
    assert events[[i for i, f in enumerate(events) if f is not None][-1]] == "down"


def test_an_inbox_is_not_empty_as_long_as_a_message_waits_behind_a_wake() -> None:
    inbox = Inbox[str](LIMIT)
    inbox.wake()
    inbox.wake()
    inbox.put_message("first", b"")
    inbox.wake()
    inbox.put_message("second", b"")
    assert [inbox.get(0), inbox.get(0), inbox.get(0)] == [("first", b""), ("second", b""), None]


def test_retained_messages_keep_their_place_and_leave_the_room_to_the_others() -> None:
    inbox, size = Inbox[str](LIMIT), 100_000
    inbox.put_message("home/room", b"late")
    inbox.put_event("down")
    count = 0
    while inbox.put_retained(RetainedMessage("home/room", bytes(size))):
        count += 1
    assert (count + 1) * size <= LIMIT + size
    assert inbox.put_message("home/room", b"live")
    items = [inbox.get(0) for _ in range(count + 3)]
    assert items[:2] == [("home/room", b"late"), "down"]
    assert [isinstance(item, RetainedMessage) for item in items] == [False, False, *[True] * count, False]
    assert items[-1] == ("home/room", b"live")
    assert inbox.put_retained(RetainedMessage("home/room", bytes(size)))


def test_many_senders_that_send_little_are_no_flood_and_one_that_sends_much_is() -> None:
    inbox, boards = Inbox[str](LIMIT), 0
    while inbox.put_message(SITE.up(f"board-{boards}"), bytes(1500)):
        boards += 1
    assert boards > 200
    assert inbox.flooding_prefix() == ""
    inbox = Inbox[str](LIMIT)
    while inbox.put_message(SITE.up("flood"), bytes(1500)):
        inbox.put_message(SITE.up("board"), b"")
    assert inbox.flooding_prefix() == SITE.up("flood").rpartition("/-/")[0]


class Message:
    published = False

    def is_published(self) -> bool:
        return self.published


def test_bytes_count_until_they_are_on_their_way() -> None:
    unsent, messages = UnsentMessages(), [Message() for _ in range(4)]
    for i, message in enumerate(messages):
        unsent.add(message, 10**i, qos=0)
    assert (unsent.payload_bytes, len(unsent), unsent.remove_sent()) == (1111, 4, False)
    messages[0].published = messages[1].published = True
    assert unsent.remove_sent()
    assert (unsent.payload_bytes, len(unsent)) == (1100, 2)
    unsent.clear()
    assert (unsent.payload_bytes, len(unsent), unsent.remove_sent()) == (0, 0, False)


def test_chunks_don_t_wait_behind_a_message_that_is_not_acknowledged() -> None:
    unsent, message, chunk = UnsentMessages(), Message(), Message()
    unsent.add(message, 5, qos=1)
    unsent.add(chunk, 7, qos=0)
    chunk.published = True
    assert unsent.remove_sent()
    assert (unsent.payload_bytes, len(unsent)) == (5, 1)
