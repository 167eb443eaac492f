from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError, shown
from fedprune.wire.fields import DEFINITIONS, MAX_DEPTH, field_types, required_fields
from fedprune.wire.messages import (
    MAX_MESSAGE,
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

OFFER = Offer("j", 1, 0, 7, DIGEST, DIGEST, (4, 8), 10, REF, REF, REF, {})


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
    assert len({type(m) for m in EXAMPLES}) == 27


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_bytes_are_canonical(message: Message) -> None:
    raw = message.to_bytes()

    assert raw == json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode()
    assert parse(raw).to_bytes() == raw


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_unknown_keys_are_ignored(message: Message) -> None:
    assert parse(altered(message, surprise=[1, 2])) == message


def test_optional_fields_are_left_out_where_there_is_none() -> None:
    assert parse(OFFER.to_bytes()) == OFFER
    optional = {"mask", "ranking", "lowered"}
    optional |= {"codec", "weights_codec", "coded", "held", "moved", "moved_from", "secure", "base", "blobs_at"}
    assert set(json.loads(OFFER.to_bytes())) == {"v", "type", *(f.name for f in fields(Offer))} - optional
    assert parse(altered(OFFER, **dict.fromkeys(optional))) == OFFER
    assert not {"probe", "trouble"} & json.loads(Birth("d", 1, "p", 10, "s").to_bytes()).keys()
    assert not {"most", "number"} & json.loads(BlobRequest(DIGEST, "data", 0, 4).to_bytes()).keys()


def test_a_hello_says_the_time_at_most() -> None:
    assert json.loads(Hello().to_bytes()) == {"v": 1, "type": "hello"}
    assert json.loads(Hello(1_800_000_000).to_bytes()) == {"v": 1, "type": "hello", "time": 1_800_000_000}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_a_missing_field_is_named_unless_it_has_a_default(message: Message) -> None:
    for field in fields(message):
        body = json.loads(message.to_bytes())
        body.pop(field.name, None)  # what is optional isn't there where there is nothing to say
        read, error = attempt(json.dumps(body).encode())
        if field.name in required_fields(type(message)):
            assert error.startswith(f"{message.kind}: field {field.name}: expected")
        else:
            assert read is not None


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


def plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without references, and without null."""
    schema = schema.get("anyOf", [schema])[0]
    while "$ref" in schema:
        schema = {**DEFINITIONS[schema["$ref"].rpartition("/")[2]], **{k: v for k, v in schema.items() if k != "$ref"}}
    return schema


def taken(schema: dict[str, Any]) -> Any:
    """A value that a schema takes."""
    s = plain(schema)
    if "const" in s or "enum" in s:
        return s.get("const", s.get("enum", [None])[0])
    if "properties" in s:
        return {name: taken(inner) for name, inner in s["properties"].items()}
    if s.get("type") in ("integer", "number"):
        return s.get("minimum", 0)
    if s.get("type") == "array":
        return [taken(s["items"])] * max(1, s["minItems"])
    some = ("0" * s.get("minLength", 1), DIGEST, DIGEST[:16], "https://models.example", "https://models.example/x")
    return {} if s.get("type") == "object" else next(t for t in some if re.search(s["pattern"], t))


def refused(schema: dict[str, Any]) -> Iterator[Any]:
    """Values on the other side of each of a schema's limits."""
    s = plain(schema)
    if "const" in s or "enum" in s:
        yield from (False, 1, "other", [])
        return
    kind = s.get("type", "string")
    if "not" in s:
        yield s["not"]["const"]
    if kind in ("integer", "number"):
        yield from ("1", True, [], *([1.5] if kind == "integer" else []))
        yield from (s[end] + step for end, step in (("minimum", -1), ("maximum", 1)) if end in s)
    elif kind == "string":
        yield from (7, [], "\x1b[2J", "../\x00")
        yield "0" * (s.get("maxLength", 10_000) // 2 * 2 + 2)
        if s.get("minLength"):
            yield from ("0" * (s["minLength"] - 2), "A" * s["minLength"], "0" * (s["minLength"] - 1))
    elif kind == "array":
        one = taken(s["items"])
        yield from ("x", {}, 7, [one] * (s["maxItems"] + 1), *([[]] if s["minItems"] else []))
        yield from ([wrong] for wrong in refused(s["items"]))
    elif "properties" in s:
        whole = taken(s)
        yield from ([], "x", *({k: v for k, v in whole.items() if k != left_out} for left_out in s["required"]))
        yield from ({**whole, name: wrong} for name, inner in s["properties"].items() for wrong in refused(inner))
    elif kind == "object":
        item = s["additionalProperties"]
        yield from ([], "x", 7, {"\x1b": 0})
        if "maxProperties" in s:
            yield {str(i): taken(item) for i in range(s["maxProperties"] + 1)}
            yield from ({"x": wrong} for wrong in refused(item))
        else:
            yield nested(MAX_DEPTH + 1)


def nested(levels: int) -> Any:
    return {"a": nested(levels - 1)} if levels else 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_messages_are_utf_8_alone(encoding: str) -> None:
    raw = EXAMPLES[0].to_bytes()
    assert attempt(raw)[0] == EXAMPLES[0]
    read, error = attempt(raw.decode().encode(encoding))
    assert read is None
    assert "is not JSON" in error


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_every_limit_of_every_field_holds_and_the_error_names_the_field(message: Message) -> None:
    for name, declared in field_types(type(message)).items():
        assert parse(altered(message, **{name: taken(declared.schema)}))
        for wrong in refused(declared.schema):
            read, error = attempt(altered(message, **{name: wrong}))
            assert read is None, (name, shown(wrong))
            assert error.startswith(f"{message.kind}: field {name}"), error
            assert len(error) < 500


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


@pytest.mark.parametrize("worth", [0, -1, 2**24 + 1, 1.5, math.nan, True, "3"])
def test_a_number_of_classes_that_is_none_is_refused(worth: Any) -> None:
    with pytest.raises(ProtocolError, match="birth: field effective_classes"):
        Birth("pi-1", 1, "p", 1, "s", effective_classes=worth)


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


def test_an_address_of_blobs_comes_in_one_form() -> None:
    told = parse(altered(OFFER, blobs_at="https://Models.example:443/lab/"))
    assert told == replace(OFFER, blobs_at="https://models.example/lab")
    for wrong in ("http://models.example", "https://models.example?x"):
        with pytest.raises(ProtocolError, match="offer: field blobs_at"):
            parse(altered(OFFER, blobs_at=wrong))


def test_graphs_of_lower_precisions_are_pulled() -> None:
    other = BlobRef("3" * 64, 9, "4" * 64)
    lowered = replace(OFFER, lowered={"int8": other})
    assert (OFFER.graphs, lowered.graphs) == ((REF, REF), (REF, REF, other))
    assert other in lowered.blobs()


def test_weights_that_can_be_decoded_from_something_shorter_are_not_pulled() -> None:
    short, base = BlobRef("3" * 64, 9, "4" * 64), "5" * 64
    coded = replace(OFFER, weights=BlobRef("6" * 64, 9, "7" * 64), coded=short, held=base)
    assert coded.shorter({base}.__contains__) == (REF, REF, short)
    assert coded.shorter(set().__contains__) == coded.blobs()
    assert coded.shorter({base, coded.weights.sha256}.__contains__) == coded.blobs()
    assert OFFER.shorter({base}.__contains__) == OFFER.blobs()
