from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProtocolError
from fedprune.wire.fleet_messages import CrashReport, LogRequest
from fedprune.wire.messages import (
    MAX_MESSAGE,
    MAX_REQUEST,
    Birth,
    BlobRequest,
    Hello,
    Message,
    Offer,
    Update,
    parse,
)
from support.fakes.messages import DIGEST, EXAMPLES, REF, messages, scalars, texts

pytestmark = pytest.mark.board

LEFT_OUT = ("uptime_s", "temperature_c", "memory_available", "memory_total")


def altered(message: Message, **values: Any) -> bytes:
    return json.dumps({**json.loads(message.to_bytes()), **values}).encode()


def attempt(raw: bytes) -> tuple[Message | None, str]:
    """The message, or what the protocol error says."""
    try:
        return parse(raw), ""
    except ProtocolError as error:
        return None, str(error)


@given(messages)
@settings(max_examples=150, deadline=None)
def test_what_was_sent_is_what_is_read(message: Message) -> None:
    assert parse(message.to_bytes()) == message


def test_there_is_an_example_of_every_type() -> None:
    assert len({type(m) for m in EXAMPLES}) == 23


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_bytes_are_canonical(message: Message) -> None:
    raw = message.to_bytes()

    assert raw == json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode()
    assert parse(raw).to_bytes() == raw


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_unknown_keys_are_ignored(message: Message) -> None:
    assert parse(altered(message, surprise=[1, 2])) == message


def test_what_older_peers_do_not_know_is_left_out_where_there_is_none() -> None:
    plain = Offer("j", 1, 0, 7, DIGEST, DIGEST, (4, 8), 10, REF, REF, REF, {})
    assert parse(plain.to_bytes()) == plain
    newer = {"mask", "ranking", "lowered", "blocked", "slabs"}
    newer |= {"codec", "weights_codec", "coded", "held", "moved", "moved_from", "blobs_at"}
    assert set(json.loads(plain.to_bytes())) == {"v", "type", *(f.name for f in fields(Offer))} - newer
    assert parse(altered(plain, **dict.fromkeys(newer))) == plain
    birth = Birth("d", 1, "p", 10, "s")
    assert not {"codecs", "abilities"} & json.loads(birth.to_bytes()).keys()
    assert "to" not in json.loads(BlobRequest(DIGEST, "data", 0, 4).to_bytes())


def test_a_want_says_that_it_is_shared_or_nothing_of_it() -> None:
    plain = BlobRequest(DIGEST, "data", 0, 4)
    assert "shared" not in json.loads(plain.to_bytes())
    assert parse(altered(plain, shared=True)) == replace(plain, shared=True)
    for value in (False, 1, "yes"):
        with pytest.raises(ProtocolError, match="shared"):
            parse(altered(plain, shared=value))


@given(st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.integers(0, 2**31 - 1), st.integers(1, MAX_REQUEST))
def test_a_want_names_a_receiver_or_none(tag: str, first: int, count: int) -> None:
    want = BlobRequest(DIGEST, "data", first, count, to=tag)
    assert parse(want.to_bytes()) == want
    assert want != replace(want, to=None)
    for wrong in (tag[1:], tag.upper() + "0", "blob", "+", "", 7, ["r"]):
        with pytest.raises(ProtocolError, match="want: field to"):
            parse(altered(want, to=wrong))


def test_a_hello_says_the_time_at_most() -> None:
    assert json.loads(Hello().to_bytes()) == {"v": 1, "type": "hello"}
    assert json.loads(Hello(1_800_000_000).to_bytes()) == {"v": 1, "type": "hello", "time": 1_800_000_000}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_a_missing_field_is_named(message: Message) -> None:
    for field in fields(message):
        body = json.loads(message.to_bytes())
        body.pop(field.name, None)  # what is newer isn't there where there is nothing to say
        if (
            field.name
            in ("probe", "held", "metrics", "mask", "ranking", "lowered", "blocked", "slabs", "shared", "most")
            or field.name
            in ("codecs", "codec", "weights_codec", "coded", "moved", "moved_from", "blobs_at", "answer_s")
            or field.name in ("abilities", "to")
            or (message.kind == Birth.kind and field.name in ("server_key", "authorities"))
            or (message.kind, field.name) == ("server-presence", "embedded")
            or message.kind == Hello.kind
            or (message.kind, field.name) == (BlobRequest.kind, "number")
            or (message.kind, field.name) == (LogRequest.kind, "kept")
            or (message.kind == CrashReport.kind and field.name in LEFT_OUT)
        ):
            parse(json.dumps(body).encode())
            continue
        with pytest.raises(ProtocolError, match=f"{message.kind}: field {field.name}: expected"):
            parse(json.dumps(body).encode())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
@pytest.mark.parametrize(
    "wrong", [True, -1, 1.5, 2**64, 10**400, "\x00", "../up", "a/b", [], [[]], {}, {"a": {}}, "x" * 5000], ids=repr
)
def test_a_wrong_value_is_refused_or_read_back_as_itself(message: Message, wrong: object) -> None:
    for field in fields(message):
        raw = altered(message, **{field.name: wrong})
        read, error = attempt(raw)
        if read is not None:
            assert json.loads(read.to_bytes())[field.name] == wrong
        else:
            assert error.startswith(f"{message.kind}: field {field.name}")
            assert "expected" in error
            assert len(error) < 500


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (EXAMPLES[0], "device", "all"),
        (EXAMPLES[0], "device", ".."),
        (EXAMPLES[0], "device", "a" * 65),
        (EXAMPLES[0], "device", "pi\n"),
        (EXAMPLES[0], "session", -1),
        (EXAMPLES[0], "samples", True),
        (EXAMPLES[0], "probe", {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": 1}}}}}}}}}),
        (EXAMPLES[0], "held", {"job": "../x", "round": 0, "attempt": 0}),
        (EXAMPLES[0], "held", {"job": "x", "round": 0}),
        (EXAMPLES[0], "codecs", ["int8", "a b"]),
        (EXAMPLES[0], "codecs", ["x"] * 65),
        (EXAMPLES[6], "codec", "x" * 257),
        (EXAMPLES[2], "phase", "upload"),
        (EXAMPLES[2], "job", "-"),
        (EXAMPLES[3], "exit_code", 256),
        (EXAMPLES[3], "reason", "x" * 4097),
        (EXAMPLES[4], "metrics", {str(i): 0.0 for i in range(65)}),
        (EXAMPLES[4], "metrics", {"loss": "0.5"}),
        (EXAMPLES[4], "metrics", {"loss": 10**400}),
        (EXAMPLES[4], "metrics", {"<b>": 1}),
        (EXAMPLES[4], "weights", {"sha256": DIGEST, "size": -1, "leaves": DIGEST}),
        (EXAMPLES[4], "weights", {"sha256": DIGEST, "size": 2**41, "leaves": DIGEST}),
        (EXAMPLES[4], "weights", {"sha256": "../" + DIGEST[3:], "size": 1, "leaves": DIGEST}),
        (EXAMPLES[4], "weights", {"sha256": DIGEST, "size": 1}),
        (EXAMPLES[6], "widths", [1, 0]),
        (EXAMPLES[6], "widths", [1] * 65_537),
        (EXAMPLES[6], "widths", [1.0]),
        (EXAMPLES[6], "recipe", [1]),
        (EXAMPLES[6], "mask", DIGEST),
        (EXAMPLES[6], "mask", {"sha256": DIGEST, "size": 1}),
        (EXAMPLES[6], "ranking", "newest"),
        (EXAMPLES[10], "count", 0),
        (EXAMPLES[10], "count", MAX_REQUEST + 1),
        (EXAMPLES[10], "first", 2**31),
        (EXAMPLES[10], "part", "all"),
        (EXAMPLES[11], "sha256", DIGEST.upper()),
        (EXAMPLES[14], "number", 2**31),
        (EXAMPLES[14], "manifest", "x" * 65_537),
        (EXAMPLES[14], "manifest", "\x1b[2J"),
        (EXAMPLES[14], "signature", DIGEST),
        (EXAMPLES[14], "leaves", []),
        (EXAMPLES[14], "leaves", [DIGEST] * 65),
        (EXAMPLES[14], "leaves", [DIGEST[:-1]]),
        (EXAMPLES[14], "leaves", DIGEST),
        (EXAMPLES[14], "attempts", 0),
        (EXAMPLES[14], "attempts", 101),
        (EXAMPLES[14], "seconds", 0.5),
        (EXAMPLES[14], "seconds", 3601),
        (EXAMPLES[15], "reason", "x" * 4097),
        (EXAMPLES[16], "device", "all"),
        (EXAMPLES[16], "state", "done"),
        (EXAMPLES[16], "done", -1),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 20 else None,
)
def test_each_limit_holds(message: Message, field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=f"{message.kind}: field {field}"):
        parse(altered(message, **{field: value}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    raw = EXAMPLES[4].to_bytes()
    assert b'"loss":0.5' in raw

    with pytest.raises(ProtocolError):
        parse(raw.replace(b'"loss":0.5', b'"loss":' + number.encode()))
    with pytest.raises(ProtocolError, match="metrics"):
        Update("pi-1", "j", 1, 0, REF.sha256, REF, 1, 1, {"loss": float(number.replace("1e999", "inf"))})


def test_numbers_in_free_form_objects_are_finite_too() -> None:
    with pytest.raises(ProtocolError, match="probe"):
        Birth("pi-1", 1, "p", 1, "s", {"speed": [math.nan]})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"hello"',
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"v":1,"type":"hello","extra":1' + b"0" * 10_000 + b"}",
        b'{"v":2,"type":"hello"}',
        b'{"v":"1","type":"hello"}',
        b'{"v":true,"type":"hello"}',
        b'{"type":"hello"}',
        b'{"v":1,"type":"eval"}',
        b'{"v":1,"type":["hello"]}',
        b'{"v":1}',
        b'{"v":1,"type":"hello","pad":"' + b"x" * MAX_MESSAGE + b'"}',
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_what_is_no_message_is_refused_with_a_short_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(raw)
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
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    read, _ = attempt(bytes(raw))
    assert read is None or parse(read.to_bytes()) == read


@given(st.recursive(scalars | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)))
@settings(max_examples=100, deadline=None)
def test_any_json_raises_nothing_but_protocol_errors(body: object) -> None:
    kinds = [m.kind for m in EXAMPLES if m.kind != Hello.kind]  # which is complete without any field
    for raw in (body, *({**body, "v": 1, "type": kind} for kind in kinds if isinstance(body, dict))):
        with pytest.raises(ProtocolError):
            parse(json.dumps(raw).encode())
