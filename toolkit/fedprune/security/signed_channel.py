"""Signs messages between devices and server, and accepts each signed message once.

    sealer = Sealer(key, epochs)
    link.publish(topic, sealer.seal(topic, message.to_bytes()))

    opener = Opener(server_key, floors, on_new_epoch)
    message = parse_message(opener.open(topic, payload))

Each message carries two numbers. The *epoch* grows with every start of the sender, and was on the sender's disk before
it was first used. The *counter* grows by one per message of an epoch. A receiver accepts each pair once, in any order,
unless 1,024 later messages have come first.

- A sender that restarts begins a new epoch, so that it never repeats a pair.
- A receiver stores each epoch before it acts on the epoch's first message. After a restart it begins with
  `ReplayWindow.after(epoch)`: it no longer knows which messages of that epoch have come, and rejects all of them, and
  those of earlier epochs.
- So the sender begins a new epoch when it learns that the receiver has restarted: a device at every `hello` (the
  server's greeting at its start), the server at every `birth` (a device's announcement of itself after it has
  connected). Both are sent in epochs of their own, which are new to the other side. After a `StaleEpochError` a
  receiver whose `hello` or `birth` got lost repeats it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from fedprune.core.errors import ReplayError, StaleEpochError, TwoSignersError
from fedprune.security.epoch_file import EpochFile
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.security.signed_envelope import seal, unseal

# Levels of a topic up to the device: fedprune/1/{site}/{device}.
_STREAM_LEVELS = 4

# Past epochs of a stream whose last counter is kept, to tell a second sender from a replay.
_MAX_PAST_EPOCHS = 8

# Streams of one sender, so that it can't fill the memory with invented topics. A device receives two streams of its
# server, a server one of each device.
MAX_STREAMS = 16


# Later messages that may overtake one. The window is one integer with a bit for each, 128 bytes per stream.
WINDOW_LENGTH = 1024


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
        epoch, counter = envelope.epoch, envelope.counter
        try:
            window.check(epoch, counter)
        except StaleEpochError as error:
            # A replay would have come before: a counter beyond the last one of its epoch is a second sender's.
            if past_epochs and epoch >= min(past_epochs) and counter > past_epochs.get(epoch, -1):
                past_epochs[epoch] = counter
                _drop_oldest(past_epochs)
                what = "a signed message is new, and of an epoch that is over"
                raise TwoSignersError(what, got=epoch, hint=error.hint) from error
            raise
        if epoch > window.epoch:
            self._on_new_epoch(stream, epoch)
            if window.highest_counter >= 0:
                past_epochs[window.epoch] = window.highest_counter
            _drop_oldest(past_epochs)
        window.accept(epoch, counter)
        self._windows[stream] = window
        return envelope.body


def _drop_oldest(past_epochs: dict[int, int]) -> None:
    while len(past_epochs) > _MAX_PAST_EPOCHS:
        del past_epochs[min(past_epochs)]


class ReplayWindow:
    """The epoch and counters of the messages that have come from one sender, to recognise replays."""

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
            expected = f"a number above {self.highest_counter - WINDOW_LENGTH}"
            raise ReplayError("a signed message is too old", expected=expected, got=counter)
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
