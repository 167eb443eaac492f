from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProtocolError, SignatureError
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import HEADER, MAX_NUMBER, Envelope, seal, unseal
from fedprune.wire.fields import MAX_MESSAGE
from fedprune.wire.messages import Hello, parse
from fedprune.wire.topics import Topics

pytestmark = pytest.mark.board

KEY = SigningKey.make()
TOPICS = Topics("lab")
numbers = st.integers(0, MAX_NUMBER)
topics = st.text(max_size=100)


@given(topics, numbers, numbers, st.binary(max_size=300))
@settings(deadline=None)
def test_what_is_sealed_is_opened_on_its_topic(topic: str, epoch: int, counter: int, body: bytes) -> None:
    envelope = unseal(KEY.verifying, topic, seal(KEY, topic, epoch, counter, body))

    assert (envelope.epoch, envelope.counter, envelope.body) == (epoch, counter, body)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_bit_of_it_can_be_changed(data: st.DataObject) -> None:
    raw = bytearray(seal(KEY, "a/b", 3, 7, b'{"v":1}'))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8

    with pytest.raises(ProtocolError):
        unseal(KEY.verifying, "a/b", bytes(raw))


@given(st.integers(0, HEADER + 20))
@settings(deadline=None)
def test_nothing_of_it_can_be_left_out_or_added(end: int) -> None:
    raw = seal(KEY, "a/b", 3, 7, b"x" * 20)
    if end < len(raw):
        with pytest.raises(ProtocolError):
            unseal(KEY.verifying, "a/b", raw[:end])
    with pytest.raises(SignatureError):
        unseal(KEY.verifying, "a/b", raw + bytes(end + 1))


@given(topics, topics, st.binary(max_size=30), st.integers(0, 30))
@settings(deadline=None)
def test_it_means_nothing_on_another_topic_wherever_the_border_is(
    topic: str, other: str, body: bytes, cut: int
) -> None:
    raw = seal(KEY, topic, 1, 1, body)
    if other != topic:
        with pytest.raises(SignatureError):
            unseal(KEY.verifying, other, raw)
    head, rest = raw[:HEADER], raw[HEADER:]
    moved = topic + rest[:cut].decode("latin-1")
    if cut and rest:
        with pytest.raises(SignatureError):
            unseal(KEY.verifying, moved, head + rest[cut:])


def test_a_message_to_one_device_is_not_one_to_another() -> None:
    raw = seal(KEY, TOPICS.down("pi-1", "job"), 1, 0, Hello().to_bytes())

    assert parse(unseal(KEY.verifying, TOPICS.down("pi-1", "job"), raw).body) == Hello()
    for topic in (TOPICS.down("pi-2", "job"), TOPICS.broadcast(), TOPICS.up("pi-1", "job"), TOPICS.down("pi-1")):
        with pytest.raises(SignatureError):
            unseal(KEY.verifying, topic, raw)


def test_another_s_key_is_not_taken_even_where_it_names_the_right_one() -> None:
    other = SigningKey.make()
    raw = seal(other, "a", 1, 1, b"{}")
    with pytest.raises(SignatureError, match="signed by another key"):
        unseal(KEY.verifying, "a", raw)

    forged = raw[:4] + KEY.verifying.id + raw[12:]
    with pytest.raises(SignatureError, match="is not that of key"):
        unseal(KEY.verifying, "a", forged)


def test_a_message_without_an_envelope_is_said_to_be_unsigned() -> None:
    with pytest.raises(SignatureError, match="the message is not signed"):
        unseal(KEY.verifying, "a", Hello().to_bytes())


@given(st.binary(max_size=2 * HEADER))
@settings(deadline=None)
def test_any_bytes_are_refused_with_an_error_of_ours(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        unseal(KEY.verifying, "a", raw)


def test_the_longest_message_fits_and_a_longer_one_is_not_looked_at() -> None:
    body = bytes(MAX_MESSAGE)
    raw = seal(KEY, "a", 1, 1, body)

    assert unseal(KEY.verifying, "a", raw).body == body
    with pytest.raises(ProtocolError, match="too long"):
        Envelope.parse(raw + b"x")
    with pytest.raises(ProtocolError, match="too long"):
        seal(KEY, "a", 1, 1, body + b"x")


@pytest.mark.parametrize(("epoch", "counter"), [(-1, 0), (0, -1), (MAX_NUMBER + 1, 0), (0, MAX_NUMBER + 1)])
def test_numbers_out_of_range_are_refused_by_sender_and_receiver(epoch: int, counter: int) -> None:
    with pytest.raises(ProtocolError, match="of a signed message"):
        seal(KEY, "a", epoch, counter, b"")
    raw = bytearray(seal(KEY, "a", 1, 1, b""))
    raw[12:20] = (2**63).to_bytes(8, "little")
    with pytest.raises(ProtocolError, match="epoch of a signed message"):
        Envelope.parse(bytes(raw))
