"""Schemas of messages say what the parser does, and the files in docs/schemas are those that the code gives."""

import copy
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from fedprune.core.errors import ProtocolError
from fedprune.wire.messages import Message, parse_message
from manual import asyncapi, message_schemas
from support.fakes.messages import DIGEST, EXAMPLES, messages


@cache
def validator_class() -> Any:
    """The class of validators; its import takes more than a second, which only these tests shall spend."""
    jsonschema = pytest.importorskip("jsonschema")

    return jsonschema.Draft202012Validator


@cache
def validators() -> dict[str, Any]:
    return {kind: validator_class()(message_schemas.schema(cls)) for kind, cls in message_schemas.messages().items()}


def nested(levels: int) -> Any:
    return 0 if levels == 0 else {"a": nested(levels - 1)} if levels % 2 else [nested(levels - 1)]


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 15, 16, 255, 256, 1024, 1025, 3600, 3601, 2**24, 2**24 + 1, 2**31, 2**63,
    "", "x", ".", "..", "...", "all", "-", "a" * 64, "a" * 65, "ab" * 8, "ab" * 16, DIGEST, DIGEST.upper(), 2 * DIGEST,
    "abc", "a\n", "a\nb\t", "a\0", "a\x7f", "a\x9f", "ä🙂", "a b", "a" * 257, "a" * 4097, "a" * 65_537, DIGEST + "\n",
    "https://models.example", "https://u@models.example", "data", "train", "approved", "trial",
    [], {}, [1], [0], [DIGEST], [DIGEST] * 65, ["x", "."], [1] * 1025, {"x": 1}, {"x": 1.5}, {"a b": 1}, {"x": "y"},
    {"x" * 257: 1}, {str(i): i for i in range(65)}, nested(5),
    {"sha256": DIGEST, "size": 1, "leaves": DIGEST}, {"sha256": DIGEST, "size": 2**40 + 1, "leaves": DIGEST},
    {"job": "j", "round": 1, "attempt": 0}, {"job": "-", "round": 1, "attempt": 0},
]  # fmt: skip


def takes(body: Any) -> bool:
    try:
        parse_message(json.dumps(body).encode())
    except ProtocolError:
        return False
    return True


def valid(body: Any) -> bool:
    return validators()[body["type"]].is_valid(body)


def _places(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a message but its type, which says by what it is judged."""
    rows = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, inner in rows:
        if (*path, key) != ("type",):
            yield (*path, key)
            yield from _places(inner, (*path, key))


@given(messages)
@settings(max_examples=60, deadline=None)
def test_every_valid_message_is_valid_by_its_schema(message: Message) -> None:
    validators()[message.kind].validate(json.loads(message.to_bytes()))


@given(messages | st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=120, deadline=None)
def test_a_damaged_message_is_taken_by_the_parser_where_it_is_valid_and_only_there(message: Message, data: Any) -> None:
    body = json.loads(message.to_bytes())
    assume(len(body) > 1)
    path = data.draw(st.sampled_from([*_places(body)]))
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[path[-1]]
    else:
        # Within free JSON a schema can't say how large numbers may be; fields with all of them are tried below.
        odd = [v for v in ODD if v != 2**63 or len(path) == 1]
        inner[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(odd)))

    assert takes(body) == valid(body)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda m: m.kind)
def test_every_field_is_judged_alike(example: Message) -> None:
    """Every field with every odd value: no chance."""
    schema = message_schemas.schema(type(example))
    body = json.loads(example.to_bytes())
    assert valid(body)
    for name in (f.name for f in fields(example)):
        field = validator_class()({**schema["properties"][name], "$defs": schema.get("$defs", {})})
        for value in ODD:
            assert takes({**body, name: value}) == field.is_valid(value), (name, str(value)[:80])


@pytest.mark.parametrize(
    "text",
    ["1.0", "1e2", '"\\ud800"', "1e999", "9" * 20, '"\\u0000"', json.dumps(nested(9)), '"http://models.example"'],
)
def test_what_a_schema_cannot_say_the_parser_refuses(text: str) -> None:
    """The list in every schema's comment is of these; where one of them gets a word, the comment must go."""
    kind, name = ("alive", "session") if text in ("1.0", "1e2") else ("birth", "probe")
    kind, name = ("offer", "blobs_at") if "://" in text else (kind, name)
    body = json.loads(next(m for m in EXAMPLES if m.kind == kind).to_bytes())
    body_text = json.dumps({**body, name: {"a": "HERE"} if kind == "birth" else "HERE"}).replace('"HERE"', text)

    assert not takes_text(body_text)
    assert validators()[kind].is_valid(json.loads(body_text))


def takes_text(text: str) -> bool:
    try:
        parse_message(text.encode())
    except ProtocolError:
        return False
    return True


def test_schemas_are_schemas_and_explain_every_field() -> None:
    for kind, cls in message_schemas.messages().items():
        body = message_schemas.schema(cls)
        validator_class().check_schema(body)
        assert all(body["properties"][name]["description"] for name in (f.name for f in fields(cls))), kind


def test_the_asyncapi_document_has_every_topic_and_every_message() -> None:
    from fedprune.wire.topics import Topics

    body = asyncapi.document()
    topics = Topics("lab")
    ours = [
        *(topics.up("pi", "job"), topics.up_blob("pi", "job"), topics.down("pi", "job")),
        *(topics.down_blob("pi", "job"), topics.broadcast()),
        *(topics.join_request("ab" * 16), topics.join_answer("ab" * 16), topics.servers()),
    ]
    address_values = {"site": "lab", "device": "pi", "job": "job", "blob": DIGEST[:16], "nonce": "ab" * 16}
    assert [c["address"].format(**address_values) for c in body["channels"].values()] == ours
    assert {*body["components"]["messages"]} == {*message_schemas.messages(), "chunk"}
    carried = {kind for c in body["channels"].values() for kind in c["messages"]}
    assert carried == {*body["components"]["messages"]}
    assert [o["channel"]["$ref"].rpartition("/")[2] for o in body["operations"].values()] == [*body["channels"]]
