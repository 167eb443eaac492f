"""Signed envelopes of messages, which bind them to sender and topic and number them.

A header of 92 bytes, then the message (`fedprune.wire.messages`). Numbers are little-endian.

| offset | bytes | |
|-------:|------:|---|
|      0 |     3 | `FPS` |
|      3 |     1 | version, 1 |
|      4 |     8 | beginning of the sha256 of the sender's verifying key |
|     12 |     8 | epoch |
|     20 |     8 | counter |
|     28 |    64 | Ed25519 signature |

The signed bytes begin with a domain that no other signature of fedprune has, and contain the topic, so that a message
is invalid on another topic, hence for another device, and outside of MQTT.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fedprune.core.errors import ProtocolError, SignatureError
from fedprune.security.keys import SIGNATURE, SigningKey, VerifyingKey, grouped
from fedprune.wire.checked_message import MAX_MESSAGE

MAGIC = b"FPS"
VERSION = 1
MAX_NUMBER = 2**63 - 1
"""Limit of epochs and counters, which fit into the integers of any database."""

MAX_TOPIC = 1024
"""Bytes of a topic that can be signed; ours have at most 270."""

_DOMAIN = b"fedprune signed message 1\0"
_HEADER = struct.Struct("<3sB8sQQ")

HEADER = _HEADER.size + SIGNATURE
"""Bytes before the message."""


@dataclass(frozen=True)
class Envelope:
    """A received message in its envelope, which is not authentic before `verify`; `key_id` is the key that the sender
    claims to have."""

    key_id: bytes
    epoch: int
    counter: int
    signature: bytes
    body: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Envelope:
        """Parse an envelope without verifying it. Raises `SignatureError` if the message has no envelope, and
        `ProtocolError` if it is of another version, or too long."""
        if len(raw) > HEADER + MAX_MESSAGE:
            raise ProtocolError(
                "signed message is too long", expected=f"at most {HEADER + MAX_MESSAGE} bytes", got=len(raw)
            )
        if len(raw) < HEADER or raw[:3] != MAGIC:
            raise SignatureError(
                "the message is not signed",
                expected=f"{MAGIC.decode()} and a header of {HEADER} bytes",
                got=f"{len(raw)} bytes",
                hint="Its sender has no identity, or an older fedprune.",
            )
        _, version, key_id, epoch, counter = _HEADER.unpack_from(raw)
        if version != VERSION:
            raise ProtocolError("version of a signed message", expected=VERSION, got=version)
        _check_number("epoch", epoch)
        _check_number("counter", counter)
        return cls(key_id, epoch, counter, bytes(raw[_HEADER.size : HEADER]), bytes(raw[HEADER:]))

    def verify(self, key: VerifyingKey, topic: str) -> bytes:
        """The message, if `key` has signed it for `topic`. Raises `SignatureError` if another key is named, or the
        signature is invalid."""
        if self.key_id != key.id:
            raise SignatureError(
                "the message is signed by another key",
                expected=grouped(key.id.hex()),
                got=grouped(self.key_id.hex()),
                hint="Was the sender set up again? Then let it join again, or approve its new key.",
            )
        key.verify(self.signature, _signed(self.key_id, topic, self.epoch, self.counter, self.body))
        return self.body


def seal(key: SigningKey, topic: str, epoch: int, counter: int, body: bytes) -> bytes:
    """Put a message into its envelope.

    Args:
        topic: Where it will be published.
        epoch: A number that was on the sender's disk before it was first used.
        counter: Larger than those of earlier messages of this epoch and stream.
    """
    if len(body) > MAX_MESSAGE:
        raise ProtocolError("message is too long to be signed", expected=f"at most {MAX_MESSAGE} bytes", got=len(body))
    _check_number("epoch", epoch)
    _check_number("counter", counter)
    key_id = key.verifying.id
    header = _HEADER.pack(MAGIC, VERSION, key_id, epoch, counter)
    return header + key.sign(_signed(key_id, topic, epoch, counter, body)) + body


def unseal(key: VerifyingKey, topic: str, raw: bytes) -> Envelope:
    """Parse and verify an envelope that came on a topic from the owner of a key; replays are not detected here.

    Raises `SignatureError` if it is not signed, by another key, for another topic, or changed, and `ProtocolError` as
    `Envelope.parse`.
    """
    envelope = Envelope.parse(raw)
    envelope.verify(key, topic)
    return envelope


def _signed(key_id: bytes, topic: str, epoch: int, counter: int, body: bytes) -> bytes:
    """The signed bytes; every part before the last has a fixed length or a length prefix."""
    where = topic.encode()
    if len(where) > MAX_TOPIC:
        raise ProtocolError("topic of a signed message", expected=f"at most {MAX_TOPIC} bytes", got=len(where))
    header = _HEADER.pack(MAGIC, VERSION, key_id, epoch, counter)
    return _DOMAIN + header + struct.pack("<H", len(where)) + where + body


def _check_number(what: str, value: int) -> None:
    if not 0 <= value <= MAX_NUMBER:
        raise ProtocolError(f"{what} of a signed message", expected=f"0 to {MAX_NUMBER}", got=value)
