import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.wire.fields import MAX_MESSAGE_BYTES
from fedprune.wire.messages import Birth, Message, Offer, UpdateAnnouncement, parse_message
from support.fakes.messages import DIGEST, EXAMPLES, REF, messages

pytestmark = pytest.mark.board

OFFER = Offer("j", 1, 0, 7, DIGEST, DIGEST, (4, 8), 10, REF, REF, REF, {})


def altered_bytes(message: Message, **values: Any) -> bytes:
    return json.dumps({**json.loads(message.to_bytes()), **values}).encode()


def attempt(raw: bytes) -> tuple[Message | None, str]:
    """The message, or what the protocol error says."""
    try:
        return parse_message(raw), ""
    except ProtocolError as error:
        return None, str(error)


@given(messages)
@settings(max_examples=150, deadline=None)
def test_what_was_sent_is_what_is_read(message: Message) -> None:
    assert parse_message(message.to_bytes()) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_bytes_are_canonical(message: Message) -> None:
    raw = message.to_bytes()

    body = json.loads(raw)
    assert list(body) == sorted(body)
    assert parse_message(raw).to_bytes() == raw


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_unknown_keys_are_ignored(message: Message) -> None:
    assert parse_message(altered_bytes(message, surprise=[1, 2])) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_a_missing_field_is_named_unless_it_has_a_default(message: Message) -> None:
    for field in fields(message):
        body = json.loads(message.to_bytes())
        body.pop(field.name, None)  # what is optional isn't there where there is nothing to say
        read, error = attempt(json.dumps(body).encode())
        if field.required:
            assert error.startswith(f"{message.kind}: {field.name}: expected")
        else:
            assert read is not None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_messages_are_utf_8_alone(encoding: str) -> None:
    raw = EXAMPLES[0].to_bytes()
    assert attempt(raw)[0] == EXAMPLES[0]
    read, error = attempt(raw.decode().encode(encoding))
    assert read is None
    assert "is not JSON" in error


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    raw = EXAMPLES[4].to_bytes()
    assert b'"loss":0.5' in raw

    with pytest.raises(ProtocolError):
        parse_message(raw.replace(b'"loss":0.5', b'"loss":' + number.encode()))
    with pytest.raises(ProtocolError):
        Birth("pi-1", 1, "p", 1, "s", {"cpu": [float("nan")]})
    with pytest.raises(ProtocolError):
        UpdateAnnouncement(
            "pi-1", "j", 1, 0, REF.sha256, REF, 1, 1, {"loss": float(number.replace("1e999", "inf"))}
        ).to_bytes()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"time":1}',
        b'{"type":"eval"}',
        b'{"type":["hello"]}',
        b'{"type":"hello","pad":"' + b"x" * MAX_MESSAGE_BYTES + b'"}',
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_what_is_no_message_is_refused_with_a_short_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_message(raw)
    assert len(str(caught.value)) < 500


def test_a_message_that_would_be_too_long_is_not_made() -> None:
    message = Birth("pi-1", 1, "p", 1, "s", {str(i): "x" * 60_000 for i in range(5)})

    with pytest.raises(ProtocolError, match="too long"):
        message.to_bytes()


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_messages_raise_nothing_but_protocol_errors(message: Message, data: st.DataObject) -> None:
    raw = bytearray(message.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    read, _ = attempt(bytes(raw))
    assert read is None or parse_message(read.to_bytes()) == read


def test_an_address_of_blobs_comes_in_one_form() -> None:
    offer = parse_message(altered_bytes(OFFER, blobs_at="https://Models.example:443/lab/"))
    assert offer == replace(OFFER, blobs_at="https://models.example/lab")
    for wrong in ("http://models.example", "https://models.example?x"):
        with pytest.raises(ProtocolError, match="offer: blobs_at"):
            parse_message(altered_bytes(OFFER, blobs_at=wrong))


def test_weights_that_can_be_decoded_from_something_shorter_are_not_pulled() -> None:
    short, base = BlobRef("3" * 64, 9, "4" * 64), "5" * 64
    coded = replace(OFFER, weights=BlobRef("6" * 64, 9, "7" * 64), coded=short, held=base)
    assert coded.blobs_to_pull({base}.__contains__) == (REF, REF, short)
    assert coded.blobs_to_pull(set().__contains__) == coded.blobs()
    assert coded.blobs_to_pull({base, coded.weights.sha256}.__contains__) == coded.blobs()
    assert OFFER.blobs_to_pull({base}.__contains__) == OFFER.blobs()
