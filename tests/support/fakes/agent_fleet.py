"""A server and a link in memory, for tests of the agent."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import Accepted, Birth, BlobRequest, Finished, Offer, UpdateAnnouncement, parse_message
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Pull

TOPICS = Topics("site")
SPEED = 50.0  # how much faster the agent's clock goes, so that lost messages cost little time


def clock() -> float:
    return time.monotonic() * SPEED


class MemoryLink:
    """The agent's link: what it publishes goes to the server at once; `mangle` may drop, double or change it."""

    unsent = 0
    room = True

    def __init__(self, server: MemoryServer) -> None:
        self.inbox: queue.Queue[Any] = queue.Queue()
        self.listened: set[str] = set()
        self.server = server
        self.up = True
        self.spread_s = 0.0
        self.left: list[float] = []
        """Seconds for which the agent has disconnected; a test restores the connection."""
        server.link = self
        self.inbox.put(ConnectionUp())

    def get(self, timeout: float | None = 0.0) -> Any:
        self.server.tick()
        try:
            return self.inbox.get(timeout=min(timeout or 0.001, 0.02))
        except queue.Empty:
            self.server.idle += 1
            return None

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        if not self.up:
            return False
        for raw in self.server.mangle("up", payload):
            self.server.receive(topic, raw)
        return True

    def deliver(self, topic: str, payload: bytes) -> None:
        if self.up:
            for raw in self.server.mangle("down", payload):
                self.inbox.put((topic, raw))

    def leave(self, seconds: float) -> None:
        self.left.append(seconds)
        self.drop()

    def drop(self) -> None:
        self.up = False
        self.inbox.put(ConnectionDown("a test"))

    def restore(self) -> None:
        self.up = True
        self.inbox.put(ConnectionUp())


class MemoryServer:
    """Offers rounds one after the other, pulls updates, accepts them, and says that the job is finished."""

    def __init__(self, folder: Path, graphs: Path, weights: dict[str, Any], now: Callable[[], float] = clock) -> None:
        self.clock = now
        self.blobs = BlobStore(folder)
        self.graphs = {n: self.blobs.put((graphs / f"{n}.onnx").read_bytes()) for n in ("plain", "full", "inference")}
        self.weights = self.blobs.put(tensorfile.encode(weights))
        self.plan: list[Offer] = []
        self.seen: list[Any] = []
        self.updates: dict[int, UpdateAnnouncement] = {}
        self.link: Any = None
        self.mangle: Callable[[str, bytes], list[bytes]] = lambda _, raw: [raw]
        self.react: Callable[[Any], None] = lambda _: None
        self.watch: Callable[[], None] = lambda: None
        """Called at each turn of the agent's loop."""
        self.accepts = True
        self.ends = True
        self.idle = 0
        """How often the agent has waited for a message and got none."""
        self._pull: tuple[UpdateAnnouncement, Pull] | None = None
        self._offered_at = 0.0
        self._lock = threading.RLock()

    def offer(
        self, number: int, recipe: Recipe | dict[str, Any] | None = None, graph: str = "plain", **changes: Any
    ) -> Offer:
        if not isinstance(recipe, dict):
            recipe = (recipe or Recipe(epochs=2, batch_size=16)).to_dict()
        values = {
            "job": "job",
            "round": number,
            "attempt": 0,
            "seed": 7,
            "architecture": "a" * 64,
            "selection": "b" * 64,
            "widths": (3,),
            "classes": 3,
            "weights": self.weights,
            "training": self.graphs[graph],
            "inference": self.graphs["inference"],
            "recipe": recipe,
        }
        return Offer(**{**values, **changes})

    def say(self, message: Any) -> None:
        self.link.deliver(TOPICS.down("d", getattr(message, "job", "-")), message.to_bytes())

    def receive(self, topic: str, raw: bytes) -> None:
        address = TOPICS.parse(topic)
        now = self.clock()
        if address.channel == "up/blob":
            if self._pull is not None:
                self._ask(self._pull[1].on_chunk(Chunk.parse(raw), now))
                self._close()
            return
        message = parse_message(raw)
        self.seen.append(message)
        if isinstance(message, BlobRequest):
            answer = BlobSender(self.blobs).answer(message)
            for chunk in answer if hasattr(answer, "__iter__") else ():
                self.link.deliver(TOPICS.down_blob("d", "job"), chunk)
        elif isinstance(message, Birth):
            self._offered_at = 0.0
        elif isinstance(message, UpdateAnnouncement) and self.accepts:
            if self._pull is None or self._pull[0] != message:
                pull = Pull(message.weights, self.blobs.partial(message.weights), patience_s=1.0)
                self._pull = message, pull
                self._ask(pull.start(now))
            self._close()
        self.react(message)

    def tick(self) -> None:
        self.watch()
        now = self.clock()
        if self._pull is not None:
            self._ask(self._pull[1].on_tick(now))
        if now - self._offered_at < 5:
            return
        self._offered_at = now
        left = [o for o in self.plan if o.round not in self.updates]
        if left:
            self.say(left[0])
        elif self.plan and self.ends:
            self.say(Finished("job"))

    def result(self, number: int) -> dict[str, np.ndarray]:
        return tensorfile.decode(self.blobs.read(self.updates[number].weights.sha256))

    def of(self, kind: type) -> list[Any]:
        return [m for m in self.seen if isinstance(m, kind)]

    def _ask(self, wants: list[BlobRequest]) -> None:
        for want in wants:
            self.say(want)

    def _close(self) -> None:
        if self._pull is not None and self._pull[1].is_done:
            update = self._pull[0]
            self.updates[update.round] = update
            self._offered_at = 0.0
            self.say(Accepted(update.job, update.round, update.attempt, update.weights.sha256))
