"""Both ends of signed messages: a `Sealer` for what is sent, an `Opener` for what comes from one sender.

sealer = Sealer(key, epochs)
link.publish(topic, sealer.seal(topic, message.to_bytes()))

opener = Opener(server_key, floors, begun)
message = parse(opener.open(topic, payload))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from fedprune.core.errors import ReplayError, StaleEpochError, TwoSignersError
from fedprune.security.envelope import seal, unseal
from fedprune.security.epoch import EpochFile
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.security.replay_protection import Window

_LEVELS = 4
"""Levels of a topic up to the device: fedprune/1/{site}/{device}."""

_OVER = 8
"""Past epochs of a stream whose last counter is remembered."""

MAX_STREAMS = 16
"""Streams of one sender: a device receives two of its server's, a server one of each device's."""


def stream_of(topic: str) -> str:
    """The stream of a topic: all topics of one device, or all broadcasts."""
    return "/".join(topic.split("/", _LEVELS)[:_LEVELS])


class Sealer:
    """Signs one sender's messages; thread-safe. Each stream has its own numbers, so that messages to others don't move
    a device's window."""

    def __init__(self, key: SigningKey, epochs: EpochFile) -> None:
        self._key = key
        self._epochs = epochs
        self._streams: dict[str, tuple[int, int]] = {}  # epoch and next counter
        self._lock = threading.Lock()

    def renew(self, topic: str) -> None:
        """Begin a new epoch of a topic's stream: at every connection, and when its reader has restarted."""
        with self._lock:
            self._streams[stream_of(topic)] = (self._epochs.next(), 0)

    def leap(self) -> None:
        """Make the next epoch later than any that a copy of this sender's disk has begun."""
        with self._lock:
            self._epochs.leap()

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
        begun: Called with stream and epoch before the first message of an epoch is returned. They must be on the disk
            before any code acts on that message: the function writes them, or the caller does for many at once.
    """

    def __init__(self, key: VerifyingKey, floors: Mapping[str, int], begun: Callable[[str, int], None]) -> None:
        self.key = key
        self._windows = {stream: Window.after(epoch) for stream, epoch in floors.items()}
        self._begun = begun
        self._over: dict[str, dict[int, int]] = {}

    def epoch(self, topic: str) -> int:
        """The current epoch of a topic's stream; -1 before the first message."""
        window = self._windows.get(stream_of(topic))
        return -1 if window is None else window.epoch

    def open(self, topic: str, raw: bytes) -> bytes:
        """The message, if it is genuine, for this topic, and new.

        Raises:
            SignatureError: It is not signed, by another key, for another topic, or changed.
            TwoSignersError: Its epoch is over but it is new: two senders use the same key.
            StaleEpochError: Its epoch is over; a sender that can't know this must be told.
            ReplayError: It has come before.
            ProtocolError: It is too long or of another version.
            StorageError: `begun` failed; the message is not recorded.
        """
        envelope = unseal(self.key, topic, raw)
        stream = stream_of(topic)
        window = self._windows.get(stream)
        if window is None:
            if len(self._windows) >= MAX_STREAMS:
                raise ReplayError(f"a sender of too many streams: at most {MAX_STREAMS}", got=stream)
            window = Window()
        over = self._over.setdefault(stream, {})
        try:
            window.check(envelope.epoch, envelope.counter)
        except StaleEpochError as error:
            if over and envelope.epoch >= min(over) and envelope.counter > over.get(envelope.epoch, -1):
                over[envelope.epoch] = envelope.counter
                _trim(over)
                raise TwoSignersError(
                    "a signed message is new, and of an epoch that is over", got=envelope.epoch, hint=error.hint
                ) from error
            raise
        if envelope.epoch > window.epoch:
            self._begun(stream, envelope.epoch)
            if window.top >= 0:
                over[window.epoch] = window.top
            _trim(over)
        window.accept(envelope.epoch, envelope.counter)
        self._windows[stream] = window
        return envelope.body


def _trim(over: dict[int, int]) -> None:
    while len(over) > _OVER:
        del over[min(over)]
