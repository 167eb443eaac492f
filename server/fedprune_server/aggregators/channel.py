"""One end of the connection between an aggregator and its parent: messages in order, and blobs on request.

A message is JSON text; those that wait are sent together, as a list. A blob follows the message that names it, in
binary pieces; messages that wait are sent between two pieces. No state survives the connection: both sides start from
the beginning on the next one.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from websockets.exceptions import ConnectionClosed
from websockets.sync.connection import Connection

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.closing import Closing
from fedprune.core.errors import BrokerError, ProtocolError, StorageError
from fedprune.core.json_file import decode_json
from fedprune_server.transfer.http_server import shut

log = logging.getLogger("fedprune.server")

QUIET = logging.getLogger("fedprune.websockets")
"""For the library, which logs a traceback for each peer that connects and sends nothing."""
QUIET.setLevel(logging.CRITICAL)

PIECE = 256 * 1024
MAX_TEXT = 64 * 2**20
"""Bytes of a message: a region's rows after a reconnection are the longest."""

_TOGETHER = 2**18
"""Characters of messages that are sent together, at least if more wait."""

PING_TIMEOUT_S = 120.0
"""A connection that has answered no ping for so long has ended: a slow one may have megabytes to send before it."""

Message = Mapping[str, Any]

BlobWanted = tuple[str, str, str]
"""A request for a blob: job, digest and region, which is empty where any will do."""


_Item = TypeVar("_Item")


def drained(items: queue.SimpleQueue[_Item], most: int = sys.maxsize) -> list[_Item]:
    """The items of a queue, `most` of them at most, which are taken out."""
    found: list[_Item] = []
    with suppress(queue.Empty):
        while len(found) < most:
            found.append(items.get_nowait())
    return found


class ParentLostError(BrokerError):
    """The connection to the other side ended while something was awaited from it."""


class UnansweredError(ParentLostError):
    """The other side is connected and can't tell now whether there is a blob: it has lost its own parent or ends, or
    can't read its disk."""


class Channel(Closing):
    """A connection's messages and blobs. `run` reads until it ends; other threads send.

    Args:
        find: Gives the store that has a blob of a job, or None.
        received: Takes each message, in the thread of `run`. A `ProtocolError` ends the connection.
        wanted: Takes each request of the other side, and calls `give`, now or later.
    """

    def __init__(
        self,
        socket: Connection,
        find: Callable[[str, str], BlobStore | None],
        received: Callable[[Channel, Message], None],
        wanted: Callable[[Channel, BlobWanted], None],
    ) -> None:
        self._socket, self._find, self._received = socket, find, received
        self._asked = wanted
        self._changed = threading.Condition()
        self._texts: deque[str] = deque()
        self._wanted: deque[tuple[BlobWanted, bytes | None, bool]] = deque()
        self._awaited: dict[BlobWanted, Future[bytes | None]] = {}
        self._arriving: tuple[BlobWanted, BlobRef, bytearray] | None = None
        self._busy = False
        self.closed = False
        self._writer = threading.Thread(target=self._write, name="fedprune-channel", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        """Queue a message. Messages that are queued as the connection ends are dropped."""
        text = json.dumps(message, separators=(",", ":"), default=vars)
        with self._changed:
            self._texts.append(text)
            self._changed.notify_all()

    def give(self, request: BlobWanted, data: bytes | None = None, *, lost: bool = False) -> None:
        """Queue the answer to a request: a blob, which is `data` or in a store, or that it is missing, or that this is
        unknown since this side has `lost` its parent or can't read its store."""
        with self._changed:
            self._wanted.append((request, data, lost))
            self._changed.notify_all()

    def fetch(self, job: str, sha256: str, region: str = "") -> bytes | None:
        """A blob of the other side, or of a region below it; None if it has none. Waits, so not for the server's loop.
        Raises `ParentLostError` if the connection ends, and `UnansweredError` if the other side can't tell."""
        request = job, sha256, region
        with self._changed:
            if self.closed:
                raise ParentLostError("the connection has ended")
            first = request not in self._awaited
            awaited = self._awaited.setdefault(request, Future())
        if first:
            self.send({"kind": "want", **_named(request)})
        return awaited.result()

    def flush(self, patience_s: float) -> None:
        """Wait until all queued messages and blobs are sent."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or not (self._texts or self._wanted or self._busy), patience_s)

    def run(self) -> None:
        """Read until the connection ends."""
        try:
            for data in self._socket:
                if isinstance(data, bytes):
                    self._piece(data)
                else:
                    self._text(data)
        except ConnectionClosed:
            pass
        except (ProtocolError, StorageError) as error:
            log.warning("the connection between aggregator and parent ends: %s", error)
        finally:
            self.close()

    def close(self) -> None:
        """End the connection at once; may be called from any thread."""
        with self._changed:
            self.closed = True
            left, self._awaited = self._awaited, {}
            self._changed.notify_all()
        for awaited in left.values():
            awaited.set_exception(ParentLostError("the connection ended while a blob was on its way"))
        shut(self._socket.socket)  # without the library's own farewell, which waits for the other side

    # Reading.

    def _text(self, text: str) -> None:
        try:
            found = decode_json(text)
            for message in found if found and isinstance(found, list) else (found,):
                self._message(message)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"message of an aggregator or parent ({type(error).__name__}: {error})") from error

    def _message(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "want":
            self._asked(self, _request(message))
        elif kind == "blob":
            self._begin(_request(message), BlobRef.from_dict(message["ref"]))
        elif kind in ("absent", "lost"):
            self._arrived(_request(message), None, lost=kind == "lost")
        else:
            self._received(self, message)

    def _begin(self, request: BlobWanted, ref: BlobRef) -> None:
        if self._arriving is not None:
            raise ProtocolError("a blob began before the one before it ended")
        if request not in self._awaited or request[1] != ref.sha256:
            raise ProtocolError("a blob without a request", got=ref.sha256)
        self._arriving = request, ref, bytearray()
        self._piece(b"")

    def _piece(self, data: bytes) -> None:
        if self._arriving is None:
            raise ProtocolError("a piece of no blob")
        request, ref, arrived = self._arriving
        arrived += data
        if len(arrived) > ref.size:
            raise ProtocolError("bytes of a blob", expected=ref.size, got=len(arrived))
        if len(arrived) == ref.size:
            self._arriving = None
            blob = bytes(arrived)
            found = BlobRef.of(blob)
            if found != ref:
                raise ProtocolError("what was sent is not the blob", expected=ref.sha256, got=found.sha256)
            self._arrived(request, blob)

    def _arrived(self, request: BlobWanted, data: bytes | None, *, lost: bool = False) -> None:
        with self._changed:
            awaited = self._awaited.pop(request, None)
        if awaited is not None and lost:
            why = "the other server can't tell whether there is such a blob: it has lost its parent, or can't read it"
            awaited.set_exception(UnansweredError(why))
        elif awaited is not None:
            awaited.set_result(data)

    # Writing.

    def _write(self) -> None:
        try:
            while self._send_texts():
                if self._wanted:
                    self._give(*self._wanted.popleft())
        except (ConnectionClosed, OSError):
            pass
        except Exception:
            log.exception("the connection between aggregator and parent ends")
        finally:
            self.close()

    def _send_texts(self, *, wait: bool = True) -> bool:
        """Send queued messages; with `wait` until a blob is requested. Returns False at the end."""
        while True:
            with self._changed:
                if wait:
                    self._changed.wait_for(lambda: self.closed or self._texts or self._wanted)
                if self.closed:
                    return False
                if not self._texts:
                    return True
                texts, self._busy = [self._texts.popleft()], True
                size = len(texts[0])
                while self._texts and (size := size + len(self._texts[0])) <= _TOGETHER:
                    texts.append(self._texts.popleft())
            self._socket.send(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]")
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _give(self, request: BlobWanted, data: bytes | None, lost: bool) -> None:
        job, sha256, _ = request
        view, ref = (None, None) if data is None else (memoryview(data), BlobRef.of(data))
        try:
            if data is None and (store := self._find(job, sha256)) is not None:
                view, ref = store.map(sha256), store.ref(sha256)
        except StorageError as error:
            log.warning("a blob can't be given to another server of the tier: %s", error)
            lost = True
        if view is None or ref is None:
            self._socket.send(json.dumps({"kind": "lost" if lost else "absent", **_named(request)}))
            return
        self._socket.send(json.dumps({"kind": "blob", **_named(request), "ref": ref.to_dict()}))
        for start in range(0, len(view), PIECE):
            self._socket.send(bytes(view[start : start + PIECE]))
            if not self._send_texts(wait=False):
                return


def _named(request: BlobWanted) -> dict[str, str]:
    return dict(zip(("job", "sha256", "region"), request, strict=True))


def _request(message: Message) -> BlobWanted:
    return str(message["job"]), str(message["sha256"]), str(message["region"])
