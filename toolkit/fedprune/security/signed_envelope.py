"""The envelope of a signed message: a header of 92 bytes, then the message (`fedprune.wire.messages`).

Numbers are little-endian.

| offset | bytes | |
|-------:|------:|---|
|      0 |     3 | `FPS` |
|      3 |     1 | version, 1 |
|      4 |     8 | beginning of the sha256 of the sender's verifying key |
|     12 |     8 | epoch: the number of the sender's start |
|     20 |     8 | counter of messages in this epoch |
|     28 |    64 | Ed25519 signature |

The signed bytes begin with a domain that no other signature of fedprune has, and contain the topic, so that a message
is invalid on another topic, hence for another device, and outside of MQTT.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fedprune.core.errors import ProtocolError, SignatureError
from fedprune.security.keys import SIGNATURE_BYTES, SigningKey, VerifyingKey, grouped_digits
from fedprune.wire.fields import MAX_MESSAGE_BYTES

MAGIC = b"FPS"
VERSION = 1
# Of epochs and counters: the largest integer of SQLite and PostgreSQL, which store them.
MAX_EPOCH = 2**63 - 1

# Bytes of a topic that can be signed; ours have at most 270.
MAX_TOPIC_BYTES = 1024

_DOMAIN = b"fedprune signed message 1\0"
_HEADER_STRUCT = struct.Struct("<3sB8sQQ")

# Bytes before the message.
HEADER_BYTES = _HEADER_STRUCT.size + SIGNATURE_BYTES


@dataclass(frozen=True)
class SignedEnvelope:
    """A received message in its envelope, which is not authentic before `verify`; `key_id` is the key that the sender
    claims to have."""

    key_id: bytes
    epoch: int
    counter: int
    signature: bytes
    body: bytes

    @classmethod
    def parse(cls, raw: bytes) -> SignedEnvelope:
        """Parse an envelope without verifying it. Raises `SignatureError` if the message has no envelope, and
        `ProtocolError` if it is of another version, or too long."""
        if len(raw) > HEADER_BYTES + MAX_MESSAGE_BYTES:
            raise ProtocolError(
                "signed message is too long", expected=f"at most {HEADER_BYTES + MAX_MESSAGE_BYTES} bytes", got=len(raw)
            )
        if len(raw) < HEADER_BYTES or raw[:3] != MAGIC:
            raise SignatureError(
                "the message is not signed",
                expected=f"{MAGIC.decode()} and a header of {HEADER_BYTES} bytes",
                got=f"{len(raw)} bytes",
                hint="Its sender has no identity.",
            )
        _, version, key_id, epoch, counter = _HEADER_STRUCT.unpack_from(raw)
        if version != VERSION:
            raise ProtocolError("version of a signed message", expected=VERSION, got=version)
        _check_number("epoch", epoch)
        _check_number("counter", counter)
        return cls(key_id, epoch, counter, bytes(raw[_HEADER_STRUCT.size : HEADER_BYTES]), bytes(raw[HEADER_BYTES:]))

    def verify(self, key: VerifyingKey, topic: str) -> bytes:
        """The message, if `key` has signed it for `topic`. Raises `SignatureError` if another key is named, or the
        signature is invalid."""
        if self.key_id != key.id:
            raise SignatureError(
                "the message is signed by another key",
                expected=grouped_digits(key.id.hex()),
                got=grouped_digits(self.key_id.hex()),
                hint="Was the sender set up again? Then let it join again, or approve its new key.",
            )
        key.verify(self.signature, _signed_bytes(self.key_id, topic, self.epoch, self.counter, self.body))
        return self.body


def seal(key: SigningKey, topic: str, epoch: int, counter: int, body: bytes) -> bytes:
    """Put a message into its envelope. The epoch was on the sender's disk before it was first used; the counter is
    larger than those of earlier messages of this epoch and stream."""
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            "message is too long to be signed", expected=f"at most {MAX_MESSAGE_BYTES} bytes", got=len(body)
        )
    _check_number("epoch", epoch)
    _check_number("counter", counter)
    key_id = key.verifying_key.id
    header = _HEADER_STRUCT.pack(MAGIC, VERSION, key_id, epoch, counter)
    return header + key.sign(_signed_bytes(key_id, topic, epoch, counter, body)) + body


def unseal(key: VerifyingKey, topic: str, raw: bytes) -> SignedEnvelope:
    """Parse and verify an envelope that came on a topic from the owner of a key; replays are not detected here.

    Raises `SignatureError` if it is unsigned, signed by another key or for another topic, or changed, and
    `ProtocolError` as `SignedEnvelope.parse`.
    """
    envelope = SignedEnvelope.parse(raw)
    envelope.verify(key, topic)
    return envelope


def _signed_bytes(key_id: bytes, topic: str, epoch: int, counter: int, body: bytes) -> bytes:
    """The signed bytes; every part before the last has a fixed length or a length prefix."""
    topic_bytes = topic.encode()
    if len(topic_bytes) > MAX_TOPIC_BYTES:
        raise ProtocolError(
            "topic of a signed message", expected=f"at most {MAX_TOPIC_BYTES} bytes", got=len(topic_bytes)
        )
    header = _HEADER_STRUCT.pack(MAGIC, VERSION, key_id, epoch, counter)
    return _DOMAIN + header + struct.pack("<H", len(topic_bytes)) + topic_bytes + body


def _check_number(what: str, value: int) -> None:
    if not 0 <= value <= MAX_EPOCH:
        raise ProtocolError(f"{what} of a signed message", expected=f"0 to {MAX_EPOCH}", got=value)
