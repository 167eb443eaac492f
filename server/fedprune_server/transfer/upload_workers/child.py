"""The process of an upload worker: it receives updates from the broker, verifies them and writes them to the disk.

`transfer.upload_workers.workers.UploadWorker` starts it and exchanges lines with it over its standard streams
(`transfer.upload_workers.messages`). It sends devices nothing: the server signs and sends its requests. It holds no
signing key, and ends with the server.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune.security.tls import pinned_context
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import Link
from fedprune.wire.messages import RejectedMessageLog
from fedprune.wire.topics import Topics
from fedprune_server.process.child_side import end_with_parent, reply_stream
from fedprune_server.transfer.upload_workers.messages import (
    Asks,
    Beat,
    Begin,
    Born,
    Drop,
    Fetch,
    Interrupted,
    There,
    Took,
    ToServer,
    ToWorker,
    line,
    read,
)
from fedprune_server.transfer.uploads import Uploads, Wants

log = logging.getLogger("fedprune.server")

TICK_S, TURN_S = 0.5, 0.02

MOST_NAMES = 256
"""Devices whose received bytes are reported per tick, at most: names in topics can be invented by anybody."""


class Receiving:
    """An upload worker's logic, without pipes and network.

    Args:
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self, uploads: Uploads, site: str, say: Callable[[ToServer], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._uploads = uploads
        self._topics = Topics(site)
        self._say = say
        self._clock = clock
        self._complaints = RejectedMessageLog(log, clock)
        self._taken: dict[str, int] = {}
        self._fetched: set[str] = set()

    def order(self, message: ToWorker | ToServer) -> None:
        """Handle a message of the server.

        Raises:
            ProtocolError: The message is not one for an upload worker.
            StorageError: The disk fails.
        """
        now = self._clock()
        match message:
            case Fetch():
                self._fetched.add(message.device)
                if message.session is not None:
                    self._ask(self._uploads.born(message.device, message.session, message.answer_s, now))
                self._ask(self._uploads.add(message.device, message.round, message.attempt, message.blob, now))
            case Drop():
                self._fetched.discard(message.device)
                self._uploads.drop(message.device)
            case There():
                self._ask(self._uploads.heard(message.device, now))
            case Born():
                self._ask(self._uploads.born(message.device, message.session, message.answer_s, now))
            case Interrupted():
                self._uploads.interrupted(now)
            case _:
                raise ProtocolError("message to an upload worker", got=message.kind)
        self._tell()

    def receive(self, topic: str, payload: bytes) -> None:
        """Handle an MQTT message. One from a device that has no fetch under way is counted and otherwise ignored.
        Raises `StorageError` if the disk fails.
        """
        try:
            device = self._topics.parse(topic).device
            # Counted first, so that the messages that follow from it already report these bytes.
            if device in self._taken or len(self._taken) < MOST_NAMES:
                self._taken[device] = self._taken.get(device, 0) + len(payload)
            if device in self._fetched:
                self._ask(self._uploads.chunk(device, Chunk.parse(payload), self._clock()))
        except ProtocolError as error:
            self._complaints.about(topic, error)
        self._tell()

    def tick(self, *, up: bool) -> None:
        """Request overdue pieces again, and report progress.

        Args:
            up: Whether the broker is connected.

        Raises:
            StorageError: The disk fails.
        """
        self._ask(self._uploads.tick(self._clock()))
        self._tell()
        for device in list(self._taken):
            self._count(device)
        self._say(Beat(int(up)))

    def _count(self, device: str) -> None:
        size = self._taken.pop(device, 0)
        if size:
            self._say(Took(device, size, (self._uploads.progress(device) or (0, 0))[0]))

    def _ask(self, wants: Wants) -> None:
        for device, want in wants:
            self._say(Asks(device, want.sha256, want.part, want.first, want.count, want.most))

    def _tell(self) -> None:
        for outcome in self._uploads.outcomes():
            self._fetched.discard(outcome.device)
            self._count(outcome.device)
            self._say(outcome)


def _context(begin: Begin) -> Callable[[], ssl.SSLContext] | None:
    if begin.authority is None or begin.certificate is None or begin.key is None:
        return None
    authority, certificate, key = Path(begin.authority), Path(begin.certificate), Path(begin.key)
    return lambda: pinned_context(authority, certificate, key, lambda: max(begin.floor, int(time.time())))


def _listen(orders: queue.Queue[ToWorker | ToServer], stream: BinaryIO, link: Link) -> None:
    """Read messages of the server; when the pipe ends, this process ends."""
    try:
        while (message := read(stream)) is not None:
            orders.put(message)
            link.wake()
    finally:
        os._exit(0)


def run(begin: Begin, stream: BinaryIO, replies: BinaryIO) -> None:
    """Receive until the server is gone.

    Raises `FedpruneError` if the broker's address is invalid, or the disk fails.
    """

    def say(message: ToServer) -> None:
        replies.write(line(message))

    store = BlobStore(Path(begin.blobs), sweep=False)
    receiving = Receiving(Uploads(store, begin.pulls, begin.max_packet), begin.site, say)
    name, context = f"fedprune-{secrets.token_hex(12)}", _context(begin)
    link = Link(begin.url, name) if context is None else Link(begin.url, name, tls=context)
    link.subscribe([Topics(begin.site).upload_worker_subscription(begin.tag)])
    orders: queue.Queue[ToWorker | ToServer] = queue.Queue()
    link.start(patient=True)
    threading.Thread(target=_listen, args=(orders, stream, link), daemon=True).start()
    ticked = 0.0
    while True:
        item = link.get(0.1)
        until = time.monotonic() + TURN_S
        while item is not None:
            if isinstance(item, tuple):
                receiving.receive(*item)
            item = None if time.monotonic() > until else link.get()
        while link.connected and not orders.empty():
            receiving.order(orders.get())
        if time.monotonic() - ticked >= TICK_S:
            ticked = time.monotonic()
            receiving.tick(up=link.connected)
        replies.flush()


def main() -> None:
    """Run until the parent asks this process to end, or ends itself."""
    replies = reply_stream()
    begin = read(sys.stdin.buffer)
    if not isinstance(begin, Begin):
        sys.exit(2)
    end_with_parent(begin.parent)
    try:
        run(begin, sys.stdin.buffer, replies)
    except BrokenPipeError:
        sys.exit(0)
    except FedpruneError as error:
        print(f"an upload worker ends: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))


if __name__ == "__main__":
    main()
