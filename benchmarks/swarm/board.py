"""One device of the swarm: the protocol of a real one, and training that takes time alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from benchmarks.swarm.mqtt import Session
from benchmarks.swarm.shelf import Arriving, Shelf
from benchmarks.swarm.updates import Remade
from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import ProtocolError
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import CHUNK_QOS, PACKET_OVERHEAD_BYTES, Chunk
from fedprune.wire.messages import (
    PUT_ABILITY,
    Accepted,
    Birth,
    BlobNotFound,
    BlobRequest,
    Cancelled,
    Finished,
    Hello,
    Offer,
    RoundProgress,
    UpdateAnnouncement,
    UploadRequest,
    UploadResult,
)
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import CHUNK_LEAVES, Pull
from fedprune_device.network.backoff import MAX_ANNOUNCE_INTERVAL_S, MIN_ANNOUNCE_INTERVAL_S
from fedprune_device.network.connection import MessageChannel

_MAX_PACKET = CHUNK_LEAVES * LEAF_BYTES + PACKET_OVERHEAD_BYTES


@dataclass
class Part:
    """A device's part in a round, for the ledger: what it handed in, and what it was told. Times since 1970."""

    attempt: int
    base: str
    offered: float
    announced: float = 0.0
    accepted_at: float = 0.0
    weights: str = ""
    accepted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


@dataclass
class Works:
    """What the devices of one process share. `later` calls a function after some seconds."""

    topics: Topics
    shelf: Shelf
    updates: Remade
    later: Callable[..., asyncio.TimerHandle]
    put: Callable[[str, bytes], Awaitable[str | None]] | None = None
    """Puts an update at a web address, and returns why it failed; None where updates travel over MQTT."""


class Board:
    """A device. `probe` is what it says that it measured of itself, `train_s` how long its training takes."""

    __slots__ = (
        "_announce_at", "_announcement_count", "_channel", "_last", "_offer", "_pulls", "_serve", "_session", "_update",
        "_uploads", "_works", "finished", "index", "link", "name", "on_accepted", "parts", "probe", "profile",
        "rejected", "samples", "train_s",
    )  # fmt: skip

    def __init__(
        self,
        works: Works,
        channel: MessageChannel,
        index: int,
        profile: str,
        probe: dict[str, Any],
        samples: int,
        train_s: float,
    ) -> None:
        self._works, self._channel = works, channel
        self.index, self.name = index, channel.device
        self.rejected = 0
        self.profile, self.probe, self.samples, self.train_s = profile, probe, samples, train_s
        self.link: Session | None = None
        self.parts: dict[int, Part] = {}
        self.finished = False
        self._session = 0
        self._serve = BlobSender(works.updates)
        self._offer: Offer | None = None
        self._pulls: dict[str, Pull] = {}
        self._update: UpdateAnnouncement | None = None
        self._last: UpdateAnnouncement | None = None
        self._announcement_count, self._announce_at = 0, 0.0
        self._uploads: dict[str, asyncio.Task[None]] = {}
        self.on_accepted: Callable[[Accepted], None] | None = None

    def new_session(self) -> Session:
        """A connection that isn't made yet."""
        topics = self._works.topics
        self._session = max(self._session + 1, time.time_ns() // 1_000_000)
        will = self._channel.will(self._session)
        self.link = Session(self.name, topics.device_subscriptions(self.name), self._on_message, will)
        return self.link

    def announce_birth(self) -> None:
        """Announce itself, and say again what the server may not have heard."""
        update = self._update
        held = None if update is None else {"job": update.job, "round": update.round, "attempt": update.attempt}
        abilities = (PUT_ABILITY,) if self._works.put is not None else ()
        birth = Birth(
            self.name, self._session, self.profile, self.samples, "swarm", self.probe, held, abilities=abilities
        )
        self._say(birth)
        self.hurry()

    def hurry(self) -> None:
        """Say that an update is there, and soon again: it is new, or the connection is."""
        self._announcement_count = 0
        self._announce()

    def _announce(self) -> None:
        if self._update is not None:
            self._say(self._update, self._update.job)
            wait = min(MAX_ANNOUNCE_INTERVAL_S, MIN_ANNOUNCE_INTERVAL_S * 2.0 ** min(self._announcement_count, 10))
            self._announcement_count += 1
            self._announce_at = time.monotonic() + wait * random.uniform(0.75, 1.25)

    def say_again(self) -> bool:
        """Say an update once more that was accepted in this round; False where there is none."""
        last, offer = self._last, self._offer
        if last is None or offer is None or (last.round, last.attempt) != (offer.round, offer.attempt):
            return False
        self._say(last, last.job)
        return True

    def tick(self, now: float) -> None:
        """Ask again for what seems lost, and say again what nobody answered."""
        for pull in self._pulls.values():
            for want in pull.on_tick(now):
                self._ask(want)
        if self._update is not None and now >= self._announce_at:
            self._announce()

    # What it hears.

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/blob"):
            self._on_chunk(Chunk.parse(payload))
            return
        try:
            message = self._channel.open(topic, payload)
        except ProtocolError:
            self.rejected += 1
            if self._channel.is_birth_due:
                self.announce_birth()
            return
        match message:
            case Hello():
                self.announce_birth()
                for pull in self._pulls.values():
                    for want in pull.start(time.monotonic()):
                        self._ask(want)
            case Offer():
                self._offered(message)
            case BlobRequest():
                self._wanted(message)
            case UploadRequest():
                self._upload(message)
            case Accepted():
                self._on_accepted(message)
            case Cancelled():
                self._cancelled(message)
            case Finished():
                self.finished, self._offer, self._update = True, None, None
                self._pulls.clear()

    def _offered(self, offer: Offer) -> None:
        known = self._offer
        if known is not None and (known.job, known.round, known.attempt) == (offer.job, offer.round, offer.attempt):
            self.hurry()
            self._report()  # it comes again because the server has seen nothing of it
            return
        shelf, now = self._works.shelf, time.monotonic()
        self._offer, self._update = offer, None
        self.parts[offer.round] = Part(offer.attempt, offer.weights.sha256, time.time())
        self._pulls.clear()
        fetched = [offer.weights, *(g for g in offer.graphs if shelf.claim(g.sha256))]
        for ref in fetched:
            pull = Pull(ref, cast(PartialBlob, Arriving(shelf, ref)))
            self._pulls[ref.sha256] = pull
            for want in pull.start(now):
                self._ask(want)

    def _on_chunk(self, chunk: Chunk) -> None:
        pull = self._pulls.get(chunk.sha256)
        if pull is None:
            return
        for want in pull.on_chunk(chunk, time.monotonic()):
            self._ask(want)
        if pull.is_done:
            del self._pulls[chunk.sha256]
            if not self._pulls:
                self._train()

    def _train(self) -> None:
        if self._offer is not None:
            self._report()
            self._works.later(self.train_s, self._trained, self._offer)

    def _report(self) -> None:
        offer = self._offer
        if offer is not None:
            phase = "download" if self._pulls else "train"
            self._say(RoundProgress(self.name, offer.job, offer.round, offer.attempt, phase, 0, 1), offer.job, qos=0)

    def _trained(self, offer: Offer) -> None:
        if self._offer is not offer:
            return
        ref = self._works.updates.make(self._works.shelf[offer.weights.sha256], self.index, offer.round)
        part = self.parts[offer.round]
        part.weights, part.announced = ref.sha256, time.time()
        # The one device's accuracy is as good as another's: nothing was learnt.
        self._update = UpdateAnnouncement(
            self.name, offer.job, offer.round, offer.attempt, offer.weights.sha256, ref, self.samples, 1
        )
        self.hurry()

    def _wanted(self, want: BlobRequest) -> None:
        update = self._update
        job = self._offer.job if self._offer is not None else None
        answer = self._serve.answer(want, _MAX_PACKET)
        if isinstance(answer, BlobNotFound) or update is None or job is None or self.link is None:
            self._say(BlobNotFound(want.sha256))
            return
        self._announce_at = max(self._announce_at, time.monotonic() + 5 * MIN_ANNOUNCE_INTERVAL_S)
        topic = self._works.topics.up_blob(self.name, job)
        for raw in answer:
            self.link.publish(topic, raw, CHUNK_QOS)

    def _upload(self, request: UploadRequest) -> None:
        """Put the update where the server says, unless that is under way."""
        put, update, sha256 = self._works.put, self._update, request.sha256
        if put is None or update is None or update.weights.sha256 != sha256 or sha256 in self._uploads:
            return
        self._announce_at = max(self._announce_at, time.monotonic() + 5 * MIN_ANNOUNCE_INTERVAL_S)

        async def upload() -> None:
            failure = await put(request.url, self._works.updates.open(sha256).read())
            del self._uploads[sha256]
            self._say(UploadResult(sha256, failure), update.job)

        self._uploads[sha256] = asyncio.ensure_future(upload())

    def _on_accepted(self, message: Accepted) -> None:
        part = self.parts.get(message.round)
        if part is not None:
            part.accepted.append(message.weights)
            part.accepted_at = part.accepted_at or time.time()
        if self._update is not None and self._update.weights.sha256 == message.weights:
            self._works.updates.forget(message.weights)
            self._last, self._update = self._update, None
        if self.on_accepted is not None:
            self.on_accepted(message)

    def _cancelled(self, message: Cancelled) -> None:
        part = self.parts.get(message.round)
        if part is not None:
            part.cancelled.append(message.reason)
        offer = self._offer
        if offer is not None and (offer.round, offer.attempt) == (message.round, message.attempt):
            self._offer = self._update = None
            self._pulls.clear()

    def _ask(self, want: BlobRequest) -> None:
        self._say(want, None if self._offer is None else self._offer.job)

    def _say(self, message: Any, job: str | None = None, qos: int = 1) -> None:
        if self.link is not None:
            topics = self._works.topics
            topic = topics.up(self.name, job) if job else topics.up(self.name)
            self.link.publish(topic, self._channel.seal(topic, message), qos)

    def ledger(self) -> dict[str, Any]:
        """What became of its parts, as JSON."""
        return {"samples": self.samples, "parts": {str(r): asdict(p) for r, p in self.parts.items()}}
