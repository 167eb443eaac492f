"""The protocol as an AsyncAPI 3.0 document: its topics, what travels on each, and who says it."""

from __future__ import annotations

from typing import Any, get_args

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.security.signed_envelope import HEADER_BYTES as ENVELOPE
from fedprune.wire.chunk import HEADER_STRUCT, MAX_PAYLOAD_BYTES
from fedprune.wire.fields import CheckedMessage
from fedprune.wire.fleet_messages import JoinAnswer, JoinRequest
from fedprune.wire.messages import BetweenServers, FromDevice, FromServer, Hello
from fedprune.wire.topics import EVERYONE, JOIN, JOINED, NO_JOB, SERVERS, TOPIC_PREFIX
from manual.docstring import summary
from manual.message_schemas import messages

_NAME = "1 to 64 letters, digits, `_`, `.` or `-`, but neither `.` nor `..`"
_JOINING = (JoinRequest, JoinAnswer)

_PARAMETERS = {
    "site": {"description": f"The site: {_NAME}."},
    "device": {"description": f"The device: {_NAME}, and not `{EVERYONE}`."},
    "job": {"description": f"The job: {_NAME}; `{NO_JOB}` for what concerns none."},
    "nonce": {"description": "The request's nonce: 32 hex digits."},
}


def document() -> dict[str, Any]:
    """The whole document."""
    up = [c for c in get_args(FromDevice) if c not in _JOINING]
    down = [c for c in get_args(FromServer) if c not in _JOINING]
    chunk = ["chunk"]
    channels = {
        "up": _channel("{device}/{job}/up", "What a device says to the server.", _kinds(up)),
        "upBlob": _channel("{device}/{job}/up/blob", "Chunks of a device's blobs for the server.", chunk),
        "down": _channel("{device}/{job}/down", "What the server says to a device.", _kinds(down)),
        "downBlob": _channel("{device}/{job}/down/blob", "Chunks of the server's blobs for a device.", chunk),
        "downAll": _channel(f"{EVERYONE}/{NO_JOB}/down", "What the server says to all devices.", _kinds([Hello])),
        "join": _channel(f"{{nonce}}/{NO_JOB}/{JOIN}", "Who wants to join asks.", _kinds([JoinRequest])),
        "joined": _channel(f"{{nonce}}/{NO_JOB}/{JOINED}", "And is answered.", _kinds([JoinAnswer])),
        "servers": _channel(
            f"{EVERYONE}/{NO_JOB}/{SERVERS}",
            "Servers of one identity ask for each other, and answer.",
            _kinds(list(get_args(BetweenServers))),
        ),
    }
    heard = ("up", "upBlob", "join")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "fedprune: devices and server over MQTT",
            "version": TOPIC_PREFIX.rpartition("/")[2],
            "description": (
                "Read as the server: it receives on `up` and `join`, and sends on `down` and `joined`; a device does "
                "the reverse. docs/protocol.md says what the messages mean and which follow which. All may come "
                "twice, late or never. Messages are published at QoS 1 (`alive` at 0), chunks at QoS 0; nothing is "
                "retained."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": "broker.example:8883",
                "protocol": "secure-mqtt",
                "protocolVersion": "3.1.1",
                "description": "Any MQTT 3.1.1 broker; TLS wherever boards are elsewhere.",
            }
        },
        "channels": channels,
        "operations": {
            f"{'receive' if name in heard else 'send'}{name[0].upper()}{name[1:]}": {
                "action": "receive" if name in heard else "send",
                "channel": {"$ref": f"#/channels/{name}"},
            }
            for name in channels
        },
        "components": {"messages": {**{k: _message(c) for k, c in messages().items()}, "chunk": _chunk()}},
    }


def _channel(address: str, what: str, kinds: list[str]) -> dict[str, Any]:
    address = f"{TOPIC_PREFIX}/{{site}}/{address}"
    return {
        "address": address,
        "description": what,
        "messages": {kind: {"$ref": f"#/components/messages/{kind}"} for kind in kinds},
        "parameters": {name: text for name, text in _PARAMETERS.items() if f"{{{name}}}" in address},
    }


def _kinds(classes: list[type[CheckedMessage]]) -> list[str]:
    return sorted(c.kind for c in classes)


def _message(cls: type[CheckedMessage]) -> dict[str, Any]:
    signed = cls not in _JOINING
    envelope = f"Where the fleet has an identity, behind {ENVELOPE} bytes of envelope with an Ed25519 signature."
    return {
        "name": cls.kind,
        "summary": summary(cls),
        "contentType": "application/json",
        **({"description": envelope} if signed else {}),
        "payload": {
            "schemaFormat": "application/schema+json;version=draft-2020-12",
            "schema": {"$ref": f"./{cls.kind}.json"},
        },
    }


def _chunk() -> dict[str, Any]:
    return {
        "name": "chunk",
        "summary": "Consecutive leaves of a blob, or pieces of its leaf table.",
        "contentType": "application/octet-stream",
        "description": (
            f"{HEADER_STRUCT.size} bytes of header (`FPC`, version, part, three zero bytes, index in 4 bytes "
            f"little-endian, sha256 of the blob in 32) and 1 to {MAX_PAYLOAD_BYTES} bytes of leaves of {LEAF_BYTES} "
            "bytes each, of which a blob's last may be shorter."
        ),
        "payload": {"type": "string", "format": "binary"},
    }
