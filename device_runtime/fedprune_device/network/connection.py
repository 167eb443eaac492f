"""The board's connection to its server, the only place that signs, verifies and parses messages.

The rest of the board sees only messages, no topics and no signatures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fedprune.core.errors import ProtocolError, StorageError
from fedprune.security.keys import SigningKey
from fedprune.wire.chunk import QOS as CHUNK_QOS
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import Link
from fedprune.wire.lost_pieces import broker_drops
from fedprune.wire.messages import Birth, Death, Message, RejectedMessageLog, parse
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.topics import NO_JOB, Topics
from fedprune.wire.transfer import ResponseTime

_LOG = logging.getLogger("fedprune.device")

# Seconds for which a server may be busy before it answers an announcement; it asks each board for its log at once.
ANSWER_S = 25.0


@dataclass(frozen=True)
class Received:
    """A message of the server. `private`: it came on the board's own topic and belongs to no job."""

    message: Message
    private: bool


class Channel:
    """Messages without signatures, for a server on the same machine."""

    def __init__(self, device: str, site: str) -> None:
        self.device, self.topics = device, Topics(site)

    @cached_property
    def signing_key(self) -> SigningKey:
        """The key by which other boards know this one in a secure sum; without an identity, one of this process."""
        return SigningKey.make()

    @property
    def refusal(self) -> str:
        """A reason why a server that is online may ignore this board: a part of a sentence that ends with a comma."""
        return ""

    @property
    def birth_due(self) -> bool:
        """Whether the board must send another birth before the server accepts its messages."""
        return False

    def seal(self, topic: str, message: Message) -> bytes:
        return message.to_bytes()

    def open(self, topic: str, payload: bytes) -> Message:
        return parse(payload)

    def will(self, session: int) -> tuple[str, bytes]:
        topic = self.topics.up(self.device)
        return topic, self.seal(topic, Death(self.device, session))


class Connection:
    """The board's connection. `answers` estimates how long the server takes to answer."""

    def __init__(self, link: Link, channel: Channel, clock: Callable[[], float] = time.monotonic) -> None:
        self.link, self.device, self.topics = link, channel.device, channel.topics
        self.answers = ResponseTime()
        self.clock = clock
        self._channel = channel
        self._complaints = RejectedMessageLog(_LOG, clock)
        self._announced_at: float | None = None  # None once the server has answered, or its silence was logged
        self._answered = self._heard_server = False

    @property
    def signing_key(self) -> SigningKey:
        """The key by which other boards know this one in a secure sum."""
        return self._channel.signing_key

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        return self.link.unsent

    @property
    def birth_due(self) -> bool:
        """Whether the board must send another birth before the server accepts its messages."""
        return self._channel.birth_due

    def send(self, message: Message, job: str = NO_JOB, qos: int = 1) -> bool:
        topic = self.topics.up(self.device, job)
        if isinstance(message, Birth) and self._announced_at is None and not self._answered:
            self._announced_at = self.clock()
        return self.link.publish(topic, self._channel.seal(topic, message), qos)

    def send_chunk(self, chunk: bytes, job: str) -> bool:
        """Send a piece of a blob; False if it can't be sent."""
        return self.link.publish(self.topics.up_blob(self.device, job), chunk, CHUNK_QOS)

    def spread(self, seconds: float) -> None:
        """Spread attempts to connect again over at least this time."""
        self.link.spread_s = seconds

    def leave(self, seconds: float) -> None:
        """Disconnect, and connect again after this time."""
        self.link.leave(seconds)

    def receive(self, timeout: float | None = 0.0) -> Received | Chunk | ConnectionUp | ConnectionDown | None:
        """The next message, chunk or event; None if nothing valid arrives in time."""
        item = self.link.get(timeout)
        self._miss_answer()
        if isinstance(item, ConnectionUp):
            self.answers.connected(item.took)
        elif isinstance(item, ConnectionDown):
            self._announced_at, self._answered, self._heard_server = None, False, False
        if not isinstance(item, tuple):
            return item
        topic, payload = item
        try:
            address = self.topics.parse(topic)
            if address.channel == "down/blob":
                return Chunk.parse(payload)  # of a blob whose digest a message has named
            if address.channel == "down":
                message = self._channel.open(topic, payload)
                if address.device == self.device:
                    self._announced_at, self._answered = None, True
                self._heard_server = True
                return Received(message, (address.device, address.job) == (self.device, NO_JOB))
        except (ProtocolError, StorageError) as error:
            self._complaints.about(topic, error)
        return None

    def _miss_answer(self) -> None:
        """Log once per connection that the server doesn't answer this board's announcement.

        Nothing else shows it: a broker also acknowledges messages that its access rules drop, and doesn't tell a
        revoked board.
        """
        if self._announced_at is None or self.clock() - self._announced_at < ANSWER_S:
            return
        self._announced_at, self._answered = None, True
        if self._heard_server:
            _LOG.warning(
                "the server is there, and doesn't answer this board: %s", broker_drops("what it sends or is sent")
            )
        else:
            _LOG.warning(
                "the server doesn't answer this board: it is off, %sor %s",
                self._channel.refusal, broker_drops("what it sends or is sent"),
            )  # fmt: skip
