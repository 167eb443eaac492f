"""What a device says to the server: that it is there, how far it is, what it won't do, what it has trained.

Nothing here is lost for good when the connection is down: births, updates and refusals are said again.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.wire.chunk import MAX_PACKET
from fedprune.wire.chunk import QOS as CHUNK_QOS
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Alive, Death, Gone, Message, Progress, Refusal, Update, Want
from fedprune.wire.mqtt.unsent import HIGH_WATER
from fedprune.wire.offer import Offer
from fedprune.wire.request_ids import NumberedWants, numbered
from fedprune.wire.topics import NO_JOB, Topics
from fedprune.wire.transfer import Serve
from fedprune_device.network.status import BoardStatus
from fedprune_device.privacy.redaction import refused

_LOG = logging.getLogger("fedprune.device")

PROGRESS_S = 1.0
ANNOUNCE_S = 2.0
ANNOUNCE_MAX_S = 60.0
ALIVE_S = 300.0
"""A board that has said nothing for so long says that it is there: its broker may not tell when it isn't."""

_MOST_WANTS = 64
"""Wants that are kept; what is dropped beyond is asked for again."""


class Wire(Protocol):
    """What a device needs of `fedprune.wire.mqtt.link.Link`."""

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | ConnectionUp | ConnectionDown | None:
        """The next message or event."""

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting; False if that isn't possible now."""

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""

    def listen(self, topics: Collection[str]) -> None:
        """Listen to exactly these topics beside the device's own, without waiting."""


class Uplink:
    """The device's side of the conversation.

    Args:
        device: The device's name.
        topics: The site's topics.
        link: The connection.
        pieces: Reads pieces of blobs.
        max_packet: Bytes of an MQTT packet that the broker lets through.

    Attributes:
        standing: What it says, for those beside the board.
    """

    def __init__(self, device: str, topics: Topics, link: Wire, pieces: Serve, max_packet: int = MAX_PACKET) -> None:
        self._device = device
        self._topics = topics
        self._link = link
        self._pieces = pieces
        self._max_packet = max_packet
        self.standing = BoardStatus()
        self._doubled = NumberedWants().doubled
        self._wanted: deque[tuple[Update, Want]] = deque()
        self._chunks: Iterator[bytes] = iter(())
        self._chunks_job = NO_JOB
        self._chunks_to: str | None = None
        self._announce_at = 0.0
        self._announced = 0
        self._reported: tuple[str, int, int] | None = None
        self._report_at = 0.0
        self._spoke = True
        self._quiet_since = 0.0
        self._refused: Offer | None = None
        self._refusal: Refusal | None = None

    def say(self, message: Message, job: str = NO_JOB, qos: int = 1) -> None:
        """Say something once."""
        self._spoke = True
        self._link.publish(self._topics.up(self._device, job), message.to_bytes(), qos)

    def ask(self, job: str, wants: Iterable[Want]) -> None:
        """Ask for pieces of blobs."""
        for want in wants:
            self.say(numbered(want), job)

    def answer(self, want: Want, pending: Update | None, now: float) -> None:
        """Take in what the server wants of the update; while it asks, it needn't be told of it."""
        if pending is None or pending.weights.sha256 != want.sha256:
            self.say(Gone(want.sha256))  # only the update is anybody's business
            return
        if self._doubled(self._device, want):
            return
        if (pending, want) not in self._wanted and len(self._wanted) < _MOST_WANTS:
            self._wanted.append((pending, want))
        self.send_chunks()
        self._announce_at = max(self._announce_at, now + 5 * ANNOUNCE_S)

    def send_chunks(self) -> None:
        """Hand out what was wanted as long as little waits to be sent: what is said waits behind no more than that."""
        while self._link.unsent < HIGH_WATER:
            chunk = next(self._chunks, None)
            if chunk is not None:
                topic = self._topics.up_to(self._device, self._chunks_to, self._chunks_job)
                if not self._link.publish(topic, chunk, CHUNK_QOS):
                    self.drop_chunks()  # what doesn't get through is asked for again
            elif self._wanted:
                update, want = self._wanted.popleft()
                found = self._pieces.answer(want, self._max_packet)
                if isinstance(found, Gone):
                    self.say(found, update.job)
                else:
                    self._chunks, self._chunks_job, self._chunks_to = found, update.job, want.to
            else:
                return

    def drop_chunks(self) -> None:
        """Forget what was wanted: the connection is lost, or the update is no more."""
        self._wanted.clear()
        self._chunks = iter(())

    def will(self, session: int) -> tuple[str, bytes]:
        """Topic and payload that the broker shall publish when this connection is lost."""
        return self._topics.up(self._device), Death(self._device, session).to_bytes()

    def hurry(self, now: float) -> None:
        """Announce the update at the next turn, and often at first: it is new, or the connection is."""
        self._announced, self._announce_at = 0, now

    def announce(self, update: Update, now: float) -> None:
        """Announce an update, if it is time to, ever less often."""
        self.standing.announcing(update)
        if now < self._announce_at:
            return
        self.say(update, update.job)
        wait = min(ANNOUNCE_MAX_S, ANNOUNCE_S * 2.0 ** min(self._announced, 10))
        self._announced += 1
        self._announce_at = now + wait * random.uniform(0.75, 1.25)  # noqa: S311  # nosec B311  # spreads boards in time

    def progress(self, offer: Offer, status: tuple[str, int, int], now: float) -> None:
        """Say how far an offer is, if that has changed, at most once a second.

        Args:
            offer: The offer.
            status: Phase, units done, units in all.
            now: The time.
        """
        self.standing.working(offer, status)
        if now < self._report_at or status == self._reported:
            return
        self._reported, self._report_at = status, now + PROGRESS_S
        phase, done, total = status
        self.say(Progress(self._device, offer.job, offer.round, offer.attempt, phase, done, total), offer.job, 0)

    def stay(self, session: int, now: float) -> None:
        """Say that it is there, if it has said nothing for minutes.

        Args:
            session: The connection.
            now: The time.
        """
        if not self._spoke and now - self._quiet_since >= ALIVE_S:
            self.say(Alive(self._device, session), qos=0)
        if self._spoke:
            self._spoke, self._quiet_since = False, now

    def refuse(self, offer: Offer, error: BaseException) -> None:
        """Say why an offer isn't carried out."""
        code = error.exit_code if isinstance(error, FedpruneError) else ExitCode.INTERNAL
        reason = refused(error, private=False)
        _LOG.warning("round %d of job %s: refused: %s", offer.round, offer.job, reason)
        self.standing.failed(offer, _printable(reason))
        self._refused = offer
        told = _printable(refused(error, private=bool(offer.recipe.get("update_clip"))))
        self._refusal = Refusal(self._device, offer.job, offer.round, offer.attempt, told, int(code))
        self.say(self._refusal, offer.job)

    def refuse_again(self, offer: Offer) -> bool:
        """Repeat the last refusal, if it was of this very offer; returns whether it was."""
        if self._refusal is None or self._refused != offer:
            return False
        self.say(self._refusal, offer.job)
        return True

    def forget_refusal(self) -> None:
        """The refused offer is no longer open; should it come again, it is a new one."""
        self._refused = self._refusal = None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:4000]
