"""The board's connection to its server, the only place that signs, verifies and parses messages.

The rest of the board sees only messages, no topics and no signatures. A board's first message on a connection is its
birth: an announcement of itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fedprune.core.errors import ProtocolError, StorageError
from fedprune.security.keys import SigningKey
from fedprune.wire.chunk import CHUNK_QOS, Chunk
from fedprune.wire.link import BrokerLink
from fedprune.wire.lost_pieces import dropping_broker_message
from fedprune.wire.messages import Birth, Death, Message, parse_message
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.rejected_messages import RejectedMessageLog
from fedprune.wire.response_time import ResponseTime
from fedprune.wire.topics import NO_JOB, Topics

_LOG = logging.getLogger("fedprune.device")

# Seconds without an answer to an announcement after which the server is slow, and after which something may be broken.
SLOW_ANSWER_S, ANSWER_TIMEOUT_S = 25.0, 120.0


@dataclass(frozen=True)
class ReceivedMessage:
    """A message of the server. `private`: it came on the board's own topic and belongs to no job."""

    message: Message
    private: bool


class MessageChannel:
    """Turns messages into payloads and back, without signatures: for a server on the same machine."""

    def __init__(self, device: str, site: str) -> None:
        self.device, self.topics = device, Topics(site)

    @cached_property
    def signing_key(self) -> SigningKey:
        """The key by which other boards know this one in a secure sum; without an identity, one of this process."""
        return SigningKey.make()

    @property
    def is_birth_due(self) -> bool:
        """Whether the board must send another birth before the server accepts its messages."""
        return False

    def seal(self, topic: str, message: Message) -> bytes:
        return message.to_bytes()

    def open(self, topic: str, payload: bytes) -> Message:
        return parse_message(payload)

    def will(self, session: int) -> tuple[str, bytes]:
        topic = self.topics.up(self.device)
        return topic, self.seal(topic, Death(self.device, session))


class BoardConnection:
    """Sends and receives a board's messages, over a broker (`link`) and as its channel writes them.

    `response_time` estimates how long the server takes to answer.
    """

    def __init__(self, link: BrokerLink, channel: MessageChannel, clock: Callable[[], float] = time.monotonic) -> None:
        self.link, self.device, self.topics = link, channel.device, channel.topics
        self.response_time = ResponseTime()
        self.clock = clock
        self.channel = channel
        self._complaints = RejectedMessageLog(_LOG, clock)
        self._announced_at: float | None = None  # by the connection's first birth
        self._is_answered = self._has_heard_server = False
        self._has_samples = True  # by the latest birth
        self._next_complaint_s = SLOW_ANSWER_S  # after the first birth

    def send(self, message: Message, job: str = NO_JOB, qos: int = 1) -> bool:
        topic = self.topics.up(self.device, job)
        if isinstance(message, Birth):
            self._has_samples = message.samples > 0
            if self._announced_at is None:
                self._announced_at, self._next_complaint_s = self.clock(), SLOW_ANSWER_S
        return self.link.publish(topic, self.channel.seal(topic, message), qos)

    def send_chunk(self, chunk: bytes, job: str) -> bool:
        """Send a piece of a blob; False if it can't be sent."""
        return self.link.publish(self.topics.up_blob(self.device, job), chunk, CHUNK_QOS)

    def receive(self, timeout: float | None = 0.0) -> ReceivedMessage | Chunk | ConnectionUp | ConnectionDown | None:
        """The next message, chunk or event; None if nothing valid arrives in time."""
        item = self.link.get(timeout)
        self._log_missing_answer()
        if isinstance(item, ConnectionUp):
            self.response_time.note_connection(item.seconds)
        elif isinstance(item, ConnectionDown):
            self._announced_at, self._is_answered, self._has_heard_server = None, False, False
        if not isinstance(item, tuple):
            return item
        topic, payload = item
        try:
            address = self.topics.parse(topic)
            if address.channel == "down/blob":
                return Chunk.parse(payload)  # of a blob whose digest a message has named
            if address.channel == "down":
                message = self.channel.open(topic, payload)
                if address.device == self.device:
                    self._is_answered = True
                self._has_heard_server = True
                return ReceivedMessage(message, (address.device, address.job) == (self.device, NO_JOB))
        except (ProtocolError, StorageError) as error:
            self._complaints.note_rejection(topic, error)
        return None

    def _log_missing_answer(self) -> None:
        """Log on each connection that the server doesn't answer this board's announcement, first as slow. Nothing else
        shows it: a broker also acknowledges messages that its access rules drop."""
        if self._announced_at is None or self.clock() - self._announced_at < self._next_complaint_s:
            return
        is_first, self._next_complaint_s = self._next_complaint_s < ANSWER_TIMEOUT_S, ANSWER_TIMEOUT_S
        if not is_first:
            self._next_complaint_s = math.inf
        state = "is there, and" if self._has_heard_server else "is off or slow: it"
        if is_first and not self._has_samples:
            _LOG.warning(
                "the server offers this board no model while it has no samples to train on: add some "
                "(docs/local-interface.md#before-the-first-model)"
            )
        elif is_first and not self._is_answered:
            _LOG.info("the server %s has not answered this board for %.0f s", state, SLOW_ANSWER_S)
        elif not self._is_answered and self._has_samples:
            advice = dropping_broker_message("what this board sends or is sent")
            text = "the server %s has not answered this board for %.0f s; or %s (docs/runbook.md#a-board-is-silent)"
            _LOG.warning(text, state, ANSWER_TIMEOUT_S, advice)
