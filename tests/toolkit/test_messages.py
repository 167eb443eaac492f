from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.errors import ProtocolError
from fedprune.recipe import Recipe
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.log_messages import LEVELS, MAX_FRAMES, MAX_LINES, BoardLines, CrashReport, LogWanted
from fedprune.wire.messages import (
    MAX_MESSAGE,
    MAX_WANT,
    PHASES,
    Accepted,
    Alive,
    Birth,
    Cancelled,
    Death,
    Finished,
    Gone,
    Hello,
    JoinAnswer,
    JoinRequest,
    Message,
    Progress,
    Refusal,
    Update,
    Want,
    parse,
)
from fedprune.wire.offer import Offer
from fedprune.wire.release_messages import STATES, ReleaseOffer, ReleaseReport, ReleaseWithdrawn

pytestmark = pytest.mark.board

names = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True).filter(lambda n: n not in (".", "..", "all", "-"))
counts = st.integers(0, 2**63 - 1)
hexes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
refs = st.builds(BlobRef, hexes, st.integers(0, 2**40), hexes)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=50)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
objects = st.dictionaries(
    texts,
    st.recursive(
        scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_size=3,
)
held = st.none() | st.fixed_dictionaries({"job": names, "round": counts, "attempt": counts})
metrics = st.dictionaries(
    st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.floats(allow_nan=False, allow_infinity=False), max_size=5
)
lines = st.lists(
    st.fixed_dictionaries(
        {"number": counts, "at": counts, "level": st.sampled_from(LEVELS), "count": st.integers(1, 9), "text": texts}
    ),
    max_size=MAX_LINES,
).map(tuple)
frames = st.lists(
    st.fixed_dictionaries({"module": texts, "line": st.integers(0, 2**31 - 1), "function": texts}), max_size=MAX_FRAMES
).map(tuple)
reals = st.none() | st.floats(-1e12, 1e12)
messages = st.one_of(
    st.builds(Birth, names, counts, texts, counts, texts, st.none() | objects, held),
    st.builds(Death, names, counts),
    st.builds(Alive, names, counts),
    st.builds(Progress, names, names, counts, counts, st.sampled_from(PHASES), counts, counts),
    st.builds(Refusal, names, names, counts, counts, texts, st.integers(0, 255)),
    st.builds(Update, names, names, counts, counts, hexes, refs, counts, counts, metrics),
    st.builds(Hello, st.none() | st.integers(0, 2**32)),
    st.builds(
        Offer, names, counts, counts, counts, hexes, hexes, st.lists(st.integers(1, 4096), max_size=9).map(tuple),
        st.integers(1, 1000), refs, refs, refs, objects, st.none() | refs, st.none() | hexes,
    ),
    st.builds(Accepted, names, counts, counts, hexes),
    st.builds(Cancelled, names, counts, counts, texts),
    st.builds(Finished, names),
    st.builds(
        Want, hexes, st.sampled_from(["data", "leaves"]), st.integers(0, 2**31 - 1), st.integers(1, MAX_WANT),
        st.sampled_from([None, True]),
    ),
    st.builds(Gone, hexes),
    st.builds(
        JoinRequest, names, names, hexes, texts, hexes.map(lambda h: h[:32]), st.none() | hexes.map(lambda h: h[:10]),
        st.none() | hexes, hexes.map(lambda h: 2 * h),
    ),
    st.builds(
        JoinAnswer, hexes, st.sampled_from(["approved", "waiting", "refused"]), texts, st.integers(0, 2**40), texts,
        st.none() | texts, st.none() | hexes, hexes,
    ),
    st.builds(
        ReleaseOffer, st.integers(0, 2**31 - 1), texts, hexes.map(lambda h: 2 * h),
        st.lists(hexes, min_size=1, max_size=5).map(tuple), st.integers(1, 100), st.floats(1, 3600),
    ),
    st.builds(ReleaseWithdrawn, st.integers(0, 2**31 - 1), texts),
    st.builds(BoardLines, names, lines),
    st.builds(
        CrashReport, names, counts, counts, texts, texts, frames, texts, texts, reals, reals, st.none() | counts,
        st.none() | counts,
    ),
    st.builds(LogWanted, st.integers(0, 100_000), st.integers(0, 2**31 - 1), st.none() | counts),
    st.builds(ReleaseReport, names, st.integers(0, 2**31 - 1), st.sampled_from(STATES), texts, counts, counts),
)  # fmt: skip

LEFT_OUT = ("uptime_s", "temperature_c", "memory_available", "memory_total")
REF = BlobRef.of(b"abc")
DIGEST = "ab" * 32
EXAMPLES: list[Message] = [
    Birth("pi-1", 3, "raspberry-pi-4", 100, "fedprune 0.1", {"cpu": [1, 2.5]}, {"job": "j", "round": 1, "attempt": 0}),
    Death("pi-1", 3),
    Progress("pi-1", "j", 1, 0, "train", 3, 10),
    Refusal("pi-1", "j", 1, 0, "no room", 30),
    Update("pi-1", "j", 1, 0, REF.sha256, REF, 100, 40, {"loss": 0.5}),
    Hello(1_800_000_000),
    Offer(
        *("j", 1, 0, 7, DIGEST, DIGEST, (4, 8), 10, REF, REF, REF, Recipe().to_dict(), REF, DIGEST),
        {"int8": REF},
        {"16": REF},
        (REF,),
    ),
    Accepted("j", 1, 0, DIGEST),
    Cancelled("j", 1, 1, "late"),
    Finished("j"),
    Want(DIGEST, "data", 0, 4, True, 2, 17),
    Gone(DIGEST),
    JoinRequest("lab", "pi-1", DIGEST, "request", DIGEST[:32], DIGEST[:10], DIGEST, 2 * DIGEST),
    JoinAnswer(DIGEST, "approved", "", 1, "authority", "certificate", DIGEST, DIGEST),
    ReleaseOffer(7, "{}", 2 * DIGEST, (DIGEST,), 3, 600.0),
    ReleaseWithdrawn(7, "stopped"),
    ReleaseReport("pi-1", 7, "rolled back", "killed by SIGILL", 1, 2),
    Alive("pi-1", 3),
    BoardLines("pi-1", ({"number": 1, "at": 2, "level": "error", "count": 3, "text": "disk full"},)),
    CrashReport(
        "pi-1", 2, 3, "exception", "ValueError: no", ({"module": "fedprune_device.cli", "line": 1, "function": "f"},),
        "fedprune 0.1", "a", 3.5, 60.0, 1, 2,
    ),
    LogWanted(60, 16_384, 7),
]  # fmt: skip


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
    assert len({type(m) for m in EXAMPLES}) == 21


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
    assert "to" not in json.loads(Want(DIGEST, "data", 0, 4).to_bytes())


def test_a_want_says_that_it_is_shared_or_nothing_of_it() -> None:
    plain = Want(DIGEST, "data", 0, 4)
    assert "shared" not in json.loads(plain.to_bytes())
    assert parse(altered(plain, shared=True)) == replace(plain, shared=True)
    for value in (False, 1, "yes"):
        with pytest.raises(ProtocolError, match="shared"):
            parse(altered(plain, shared=value))


@given(st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.integers(0, 2**31 - 1), st.integers(1, MAX_WANT))
def test_a_want_names_a_receiver_or_none(tag: str, first: int, count: int) -> None:
    want = Want(DIGEST, "data", first, count, to=tag)
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
            or message.kind == Hello.kind
            or (message.kind, field.name) == (Want.kind, "number")
            or (message.kind, field.name) == (LogWanted.kind, "kept")
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
        (EXAMPLES[10], "count", MAX_WANT + 1),
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
