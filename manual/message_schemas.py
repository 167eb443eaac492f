"""A JSON Schema (draft 2020-12) for each message of the protocol, from the class that checks it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec

from fedprune.wire.fields import MAX_MESSAGE_BYTES, CheckedMessage
from fedprune.wire.messages import BetweenServers, FromDevice, FromServer
from manual.docstring import field_docstrings, summary

Schema = dict[str, Any]

_NONE = re.compile(r"\bNone\b")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
LIMITS = (
    f"In UTF-8 it has at most {MAX_MESSAGE_BYTES} bytes. Unknown keys are ignored. What JSON Schema can't say, and "
    "receivers refuse: a whole number that is written with a point or an exponent, numbers beyond float64, halves of "
    "surrogate pairs in text, addresses that only look like one, and in free objects more than 8 levels, whole numbers "
    "beyond 63 bits and unprintable text."
)

_HEAD = """# Schemas of the protocol

<!-- Made by `python -m manual`: change the classes of the messages instead. -->

A JSON Schema (draft 2020-12) for each message, made from the code that checks it, and all topics with what travels
on them as an [AsyncAPI 3.0 document](asyncapi.json). [The protocol](../protocol.md) says what the messages mean. Tests
damage messages and compare: what a schema refuses, the parser refuses. The other way round some things are missing
that JSON Schema has no word for: whole numbers that are written as `1.0` or `1e2`, numbers beyond float64, halves of
surrogate pairs, the finer rules of addresses, in free objects more than 8 levels, whole numbers beyond 63 bits and
unprintable text, and a message's length of at most 262,144 bytes. Signed messages stand behind
[an envelope](../protocol.md#envelopes); chunks of [blobs](../protocol.md#blobs) are binary.

| message | |
|---|---|
"""


def messages() -> dict[str, type[CheckedMessage]]:
    """The classes of all messages, by their type on the wire."""
    classes = [*get_args(FromDevice), *get_args(FromServer), *get_args(BetweenServers)]
    return {c.kind: c for c in sorted(classes, key=lambda c: c.kind)}


def schema(cls: type[CheckedMessage]) -> Schema:
    """The schema of one message, which needs no other file."""
    _, definitions = msgspec.json.schema_components([cls], ref_template="#/$defs/{name}")
    record = definitions.pop(cls.__name__)
    said = field_docstrings(cls)
    properties: dict[str, Schema] = {"type": {"const": cls.kind}}
    del record["properties"]["type"]
    for name, declared in record["properties"].items():
        description = said.get(name) or declared["description"]
        properties[name] = {**declared, "description": _NONE.sub("null", description)}
    body: Schema = {
        "$schema": DRAFT,
        "title": cls.kind,
        "description": summary(cls),
        "$comment": LIMITS,
        "type": "object",
        "required": record["required"],
        "properties": properties,
    }
    if used := _used(properties, definitions):
        body["$defs"] = used
    return body


def files() -> dict[str, str]:
    """The schema of each message, by the name of its file."""
    return {f"{kind}.json": written(schema(cls)) for kind, cls in messages().items()}


def page() -> str:
    """The table of all schemas, in Markdown."""
    return _HEAD + "".join(f"| [`{kind}`]({kind}.json) | {summary(cls)} |\n" for kind, cls in messages().items())


def written(body: Schema) -> str:
    """A document as it lies in a file."""
    return json.dumps(_with_plain_numbers(body), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _with_plain_numbers(value: Any) -> Any:
    """A document with 3600 for 3600.0.

    `typing` keeps one of two equal annotations, so whether a bound is an integer depends on what was imported first.
    """
    if isinstance(value, dict):
        return {key: _with_plain_numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_with_plain_numbers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _used(part: Any, definitions: dict[str, Schema]) -> dict[str, Schema]:
    """The definitions that a part of a schema needs, and those that these need."""
    found: dict[str, Schema] = {}
    open_ = list(_references(part))
    while open_:
        name = open_.pop()
        if name not in found:
            found[name] = definitions[name]
            open_ += _references(definitions[name])
    return dict(sorted(found.items()))


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"].rpartition("/")[2]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _references(inner)
