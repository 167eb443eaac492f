"""Signed messages: envelopes, the sender's epochs, and protection against replays.

sealer = Sealer(key, epochs)
link.publish(topic, sealer.seal(topic, message.to_bytes()))

opener = Opener(server_key, floors, begun)
message = parse(opener.open(topic, payload))

An envelope is a header of 92 bytes, then the message (`fedprune.wire.messages`). Numbers are little-endian.

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

A sender's epoch is a number that was on its disk before it was first used, larger than all earlier ones; within an
epoch its counter grows by one per message. A receiver accepts each pair once, in any order as long as a message is not
overtaken by 1,024 later ones.

- A sender that restarts begins a new epoch, so that it never repeats a number.
- A receiver stores each epoch before it acts on its first message. After a restart it begins with
  `Window.after(epoch)`: every message of that epoch and of earlier ones is rejected, since it no longer knows which
  have come. The sender therefore begins a new epoch when it learns that the receiver restarted: a device at every
  `hello` of a server, a server at every `birth` of a device. Both are sent in epochs of their own, which are new to the
  other side. After a `StaleEpochError` a receiver whose `hello` or `birth` got lost repeats it.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.atomic_file import write_atomically
from fedprune.core.errors import (
    ProtocolError,
    ReplayError,
    SignatureError,
    StaleEpochError,
    StorageError,
    TwoSignersError,
    path_remedy,
)
from fedprune.core.validation import is_whole
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
    """Put a message into its envelope.

    Args:
        topic: Where it will be published.
        epoch: A number that was on the sender's disk before it was first used.
        counter: Larger than those of earlier messages of this epoch and stream.
    """
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

    Raises `SignatureError` if it is not signed, by another key, for another topic, or changed, and `ProtocolError` as
    `Envelope.parse`.
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


# Later messages that may overtake one. The window is one integer with a bit for each, 128 bytes per stream.
WINDOW_LENGTH = 1024


class ReplayWindow:
    """The epoch and counters of the messages that have come from one sender, to recognise replays.

    Attributes:
        epoch: The current epoch; -1 before the first message.
        highest_counter: Highest counter that has come in it; -1 for none.
    """

    def __init__(self, epoch: int = -1) -> None:
        self.epoch, self.highest_counter = epoch, -1
        # A bit for each of the `WINDOW_LENGTH` counters up to `highest_counter`; the lowest bit is that one itself.
        self._accepted_bits = 0
        self._is_epoch_over = True  # the whole epoch is over: which of its counters have come is not known

    @classmethod
    def after(cls, epoch: int) -> ReplayWindow:
        """The window of a receiver that has restarted and knows only the latest epoch: it accepts later ones."""
        return cls(epoch)

    def check(self, epoch: int, counter: int) -> None:
        """Check a message's numbers without recording them. Raises `StaleEpochError` if its epoch is over, and
        `ReplayError` if it has come before, or too many later ones have come first."""
        if epoch < self.epoch or (epoch == self.epoch and self._is_epoch_over):
            raise StaleEpochError(
                "a signed message is of an epoch that is over",
                expected=f"a later one than {self.epoch}" if self._is_epoch_over else f"{self.epoch} or later",
                got=epoch,
                hint="It is a repetition, or its sender doesn't know yet that this side has restarted.",
            )
        if epoch > self.epoch:
            return
        behind = self.highest_counter - counter
        if behind >= WINDOW_LENGTH:
            raise ReplayError(
                "a signed message is too old",
                expected=f"a number above {self.highest_counter - WINDOW_LENGTH}",
                got=counter,
            )
        if behind >= 0 and self._accepted_bits >> behind & 1:
            raise ReplayError("a signed message has come before", got=f"number {counter} of epoch {epoch}")

    def accept(self, epoch: int, counter: int) -> bool:
        """Record the numbers of a message with a valid signature; returns whether an epoch begins with it. Raises as
        `check`."""
        self.check(epoch, counter)
        begins = epoch > self.epoch
        if begins:
            self.epoch, self.highest_counter, self._accepted_bits, self._is_epoch_over = epoch, counter, 1, False
        elif counter > self.highest_counter:
            ahead = counter - self.highest_counter
            # A jump beyond the window leaves nothing of it; shifting by 2^60 bits would leave nothing of the memory.
            accepted_bits = self._accepted_bits << ahead if ahead < WINDOW_LENGTH else 0
            self._accepted_bits = (accepted_bits | 1) & (1 << WINDOW_LENGTH) - 1
            self.highest_counter = counter
        else:
            self._accepted_bits |= 1 << self.highest_counter - counter
        return begins


# Limit of milliseconds from the clock, some 285,000 years: a wrong clock must not use up the numbers.
_MAX_CLOCK_MS = 2**53

# Epochs that are reserved with one write: a server begins one per connecting board, and must not wait for the disk each
# time.
_BLOCK_LENGTH = 256

# More epochs than any sender gets ahead of its clock: epochs are milliseconds, and no sender begins so many in a
# minute.
_MAX_EPOCHS_AHEAD = 2**16


class EpochFile:
    """The file of a sender's epochs, next to its signing key.

    They are written in blocks before the first of a block is used; a restart skips the rest of a block. A block begins
    at the time in milliseconds where that is larger than the last one's end, so that a sender whose disk was reset to
    an old copy is accepted again; a clock at 1970 does no harm. Raises `StorageError` if the file is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._block_end = self._latest = _read_epoch(path)

    @staticmethod
    def make(path: Path) -> None:
        """Write a file without used epochs. If it is missing later, it is known to be lost."""
        write_atomically(path, json.dumps({"v": 1, "epoch": 0}).encode())

    def next(self) -> int:
        """A new epoch; none is used up if the disk is full."""
        if self._latest == self._block_end:
            begin = max(self._block_end + 1, int(min(1000 * self._clock(), _MAX_CLOCK_MS)))
            end = begin + _BLOCK_LENGTH - 1
            write_atomically(self._path, json.dumps({"v": 1, "epoch": end}).encode())
            self._latest, self._block_end = begin - 1, end
        self._latest += 1
        return self._latest

    def skip_block(self) -> None:
        """Skip the rest of the block: the receiver knows a later epoch, perhaps from a copy of this disk."""
        self._latest = self._block_end

    def skip_foreign_epochs(self) -> None:
        """Skip all epochs that another holder of the key may have used, some of which are ahead of the clock."""
        end = max(self._block_end, int(min(1000 * self._clock(), _MAX_CLOCK_MS))) + _MAX_EPOCHS_AHEAD
        write_atomically(self._path, json.dumps({"v": 1, "epoch": end}).encode())
        self._latest = self._block_end = end


def _read_epoch(path: Path) -> int:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    try:
        epoch = json.loads(raw)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        epoch = None
    if not is_whole(epoch, 0, MAX_EPOCH - 1):
        raise StorageError(
            f"{path} is damaged",
            hint="Delete it if the clock of this machine is right; the next epoch is then the time.",
        )
    return epoch


# Levels of a topic up to the device: fedprune/1/{site}/{device}.
_STREAM_LEVELS = 4

# Past epochs of a stream whose last counter is kept, to tell a second sender from a replay.
_MAX_PAST_EPOCHS = 8

# Streams of one sender, so that it can't fill the memory with invented topics. A device receives two streams of its
# server, a server one of each device.
MAX_STREAMS = 16


def stream_of(topic: str) -> str:
    """The stream of a topic: all topics of one device, or all broadcasts."""
    return "/".join(topic.split("/", _STREAM_LEVELS)[:_STREAM_LEVELS])


class Sealer:
    """Signs one sender's messages; thread-safe. Each stream has its own numbers, so that messages to others don't move
    a device's window."""

    def __init__(self, key: SigningKey, epochs: EpochFile) -> None:
        self._key = key
        self._epochs = epochs
        self._streams: dict[str, tuple[int, int]] = {}  # epoch and next counter
        self._lock = threading.Lock()

    def begin_epoch(self, topic: str) -> None:
        """Begin a new epoch of a topic's stream: at every connection, and when its reader has restarted."""
        with self._lock:
            self._streams[stream_of(topic)] = (self._epochs.next(), 0)

    def skip_block(self) -> None:
        """Make the next epoch later than any that a copy of this sender's disk has begun."""
        with self._lock:
            self._epochs.skip_block()

    def seal(self, topic: str, body: bytes) -> bytes:
        """Sign a message for a topic. Raises `ProtocolError` if it is too long, and `StorageError` if a stream
        begins, and the disk fails or is full."""
        stream = stream_of(topic)
        with self._lock:
            epoch, counter = self._streams.get(stream) or (self._epochs.next(), 0)
            self._streams[stream] = (epoch, counter + 1)
        return seal(self._key, topic, epoch, counter, body)


class Opener:
    """Verifies one sender's messages, and accepts each once.

    Args:
        floors: By stream, the latest epoch that was on this side's disk when it started.
        on_new_epoch: Called with stream and epoch before the first message of an epoch is returned. They must be on the
            disk no later than what that message leads to: the function writes them, or the caller for many at once.
    """

    def __init__(self, key: VerifyingKey, floors: Mapping[str, int], on_new_epoch: Callable[[str, int], None]) -> None:
        self.key = key
        self._windows = {stream: ReplayWindow.after(epoch) for stream, epoch in floors.items()}
        self._on_new_epoch = on_new_epoch
        self._past_epochs: dict[str, dict[int, int]] = {}

    def epoch(self, topic: str) -> int:
        """The current epoch of a topic's stream; -1 before the first message."""
        window = self._windows.get(stream_of(topic))
        return -1 if window is None else window.epoch

    def open(self, topic: str, raw: bytes) -> bytes:
        """The message, if it is genuine, for this topic, and new.

        Raises:
            SignatureError: It is not signed, by another key, for another topic, or changed.
            TwoSignersError: Its epoch is over but it is new: two senders use the same key.
            StaleEpochError: Its epoch is over, which the sender may not know: send it a new `hello` or `birth`.
            ReplayError: It has come before.
            ProtocolError: It is too long or of another version.
            StorageError: `on_new_epoch` failed; the message is not recorded.
        """
        envelope = unseal(self.key, topic, raw)
        stream = stream_of(topic)
        window = self._windows.get(stream)
        if window is None:
            if len(self._windows) >= MAX_STREAMS:
                raise ReplayError(f"a sender of too many streams: at most {MAX_STREAMS}", got=stream)
            window = ReplayWindow()
        past_epochs = self._past_epochs.setdefault(stream, {})
        try:
            window.check(envelope.epoch, envelope.counter)
        except StaleEpochError as error:
            if (
                past_epochs
                and envelope.epoch >= min(past_epochs)
                and envelope.counter > past_epochs.get(envelope.epoch, -1)
            ):
                past_epochs[envelope.epoch] = envelope.counter
                _drop_oldest(past_epochs)
                raise TwoSignersError(
                    "a signed message is new, and of an epoch that is over", got=envelope.epoch, hint=error.hint
                ) from error
            raise
        if envelope.epoch > window.epoch:
            self._on_new_epoch(stream, envelope.epoch)
            if window.highest_counter >= 0:
                past_epochs[window.epoch] = window.highest_counter
            _drop_oldest(past_epochs)
        window.accept(envelope.epoch, envelope.counter)
        self._windows[stream] = window
        return envelope.body


def _drop_oldest(past_epochs: dict[int, int]) -> None:
    while len(past_epochs) > _MAX_PAST_EPOCHS:
        del past_epochs[min(past_epochs)]
