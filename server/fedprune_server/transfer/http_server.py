"""A web server for blobs, for boards with a certificate of the fleet: each gets what it is offered, and may upload the
update that is awaited from it.

Connections, heads of requests, bodies and times are bounded. Idle connections time out, and are closed first when all
are in use.
"""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import IO, Any

from fedprune.blobs.blob_ref import LEAF, SUFFIX, table_file
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.streamed_blob import StreamedBlob
from fedprune.core.errors import ConfigError, FedpruneError, ProtocolError, StorageError, StorageFullError
from fedprune.security.tls import peer_name
from fedprune.wire.transfer import LEAST_BYTES_PER_S
from fedprune_server.transfer.upload_place import ByteCounter, UploadPlace
from fedprune_server.transfer.web_uploads import Awaited, HttpUploads

log = logging.getLogger("fedprune.server")

CONNECTIONS = 64
"""Connections at a time, and one more for each upload that is awaited at a time; each has a thread."""

MOST_CONNECTIONS = 512
"""The same, however many uploads are awaited: each takes two of a process's 1024 file descriptors."""

HEAD_BYTES = 8192
FIRST_S = 15.0
"""How long a handshake and the first request may take to come."""

NEXT_S = 60.0
"""The same for a further request: a board may be writing to its disk."""

PIECE_S = 60.0
_PIECE = 4 * LEAF
"""The bytes of a block, and the seconds that a board may take to receive it."""

UPLOAD_PIECE_S = 30.0
"""How long a leaf of an upload may take to come."""

POLL_S = 0.5
"""Seconds between checks for slow clients."""

_NAME = re.compile(r"(?:/[A-Za-z0-9._~-]{1,255}){0,32}/([0-9a-f]{2})/(\1[0-9a-f]{62})(\.leaves)?")
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{0,15})")


class ServedJob:
    """The blobs that the devices of a job may fetch and upload.

    Args:
        may_fetch: Whether a device, or without certificates any device, may have a blob; called from any thread.
        place: Where devices upload updates; this server takes in only those of `HttpUploads`.
        pulls: How many uploads are awaited at a time.
    """

    def __init__(
        self,
        store: BlobStore,
        may_fetch: Callable[[str | None, str], bool],
        place: UploadPlace | None = None,
        pulls: int = 0,
    ) -> None:
        self.store, self.may_fetch = store, may_fetch
        self.uploads = place if isinstance(place, HttpUploads) else None
        self.connections = 0 if self.uploads is None else pulls
        self._sent = ByteCounter()

    def count(self, device: str | None, size: int) -> None:
        """Bytes were sent, to a device if it is known which."""
        if device is not None:
            self._sent.add(device, size)

    def taken(self) -> dict[str, int]:
        """Bytes of blobs that were sent to devices since this was last asked."""
        return self._sent.taken()


class BlobServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens at once, and answers until `close`.

    Args:
        port: The port; 0 for a free one.
        context: Gives TLS for a new connection, which asks for the board's certificate; None to do without.
        connections: How many there may be at a time, without those for uploads.

    Attributes:
        jobs: What may be fetched and uploaded; nothing, at first.
        sent: Bytes of blobs that were sent.
        received: Updates that were taken in.

    Raises:
        ConfigError: The address can't be listened on.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext] | None,
        connections: int = CONNECTIONS,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), BlobHandler)
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"can't listen on {host}, port {port} ({why})", path=("server", "serve_blobs")) from error
        self.jobs: Sequence[ServedJob] = ()
        self.sent = self.received = 0
        self._context = context
        self._connections = connections
        self._lock = threading.Lock()
        self._clients: dict[Any, tuple[bool, float]] = {}  # whether it waits for a request, and until when
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_S,), name="fedprune-blobs", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port."""
        return int(self.socket.getsockname()[1])

    def close(self) -> None:
        """Listen no longer, and cut all connections."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._cut(float("inf"))

    def expect(self, client: Any, seconds: float, *, waits: bool) -> None:
        """A client has so long for what comes next.

        Args:
            waits: Whether that is a request; else it is being answered, and keeps its place.
        """
        with self._lock:
            if client in self._clients:
                self._clients[client] = (waits, time.monotonic() + seconds)

    def count(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes that were sent, and updates that were taken in."""
        with self._lock:
            self.sent += sent
            self.received += received

    # What the standard library calls

    def get_request(self) -> tuple[Any, Any]:
        """Accept a client; its handshake is for its own thread."""
        try:
            client, address = super().get_request()
        except OSError as error:
            log.warning("the web server of blobs: %s", error)
            time.sleep(0.1)  # too many open files, for example, which would come again at once
            raise
        if self._context is None:
            return client, address
        try:
            return self._context().wrap_socket(client, server_side=True, do_handshake_on_connect=False), address
        except FedpruneError as error:
            client.close()
            log.warning("the web server of blobs: %s", error)
            raise OSError(str(error)) from error
        except OSError:
            client.close()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a client a thread; where none is left, that of who has been waiting for longest."""
        most = min(self._connections + sum(job.connections for job in self.jobs), MOST_CONNECTIONS)
        with self._lock:
            if len(self._clients) >= most:
                waiting = [(until, c) for c, (waits, until) in self._clients.items() if waits]
                for _, client in sorted(waiting, key=lambda pair: pair[0])[:1]:
                    shut(client)
                    del self._clients[client]
            if admitted := len(self._clients) < most:
                self._clients[request] = (True, time.monotonic() + FIRST_S)
        if admitted:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """A client is done with."""
        with self._lock:
            self._clients.pop(request, None)
        shut(request)
        self.close_request(request)

    def service_actions(self) -> None:
        """Every `POLL_S`: cut off those who are too slow."""
        self._cut(time.monotonic())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One client must not end the service of others; a mistake of this server's is logged."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # the client left, or uses no TLS that is accepted here
            log.debug("a client of the web server of blobs went: %s", error)
        else:
            log.error("the web server of blobs could not answer a request", exc_info=error)

    def _cut(self, now: float) -> None:
        with self._lock:
            for client, (_, until) in self._clients.items():
                if until < now:
                    shut(client)


class _Head:
    """A request's stream, with a limit on its head."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.left = HEAD_BYTES

    def read(self, size: int) -> bytes:
        """Bytes of a body; fewer only at its end."""
        return self._stream.read(size)

    def readline(self, limit: int = -1) -> bytes:
        """The next line. Raises `ConnectionError` if the request is too long."""
        most = self.left + 1
        line = self._stream.readline(most if limit < 0 else min(limit, most))
        self.left -= len(line)
        if self.left < 0:
            raise ConnectionError("the head of a request is too long")
        return line

    def close(self) -> None:
        self._stream.close()


class BlobHandler(BaseHTTPRequestHandler):
    """Answers a client's requests, one after the other."""

    server: BlobServer
    protocol_version = "HTTP/1.1"
    timeout = FIRST_S

    def setup(self) -> None:
        """See who it is."""
        self._device: str | None = None
        self.request.settimeout(self.timeout)
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
            self._device = peer_name(self.request)
            if not self._device:
                raise ConnectionError("a certificate without a name")
        super().setup()
        self.rfile: Any = _Head(self.rfile)

    def handle(self) -> None:
        """Answer until it says nothing more."""
        self.close_connection = False
        while not self.close_connection:
            self.close_connection = True
            self.rfile.left = HEAD_BYTES
            self.handle_one_request()
            self.connection.settimeout(NEXT_S)
            self.server.expect(self.connection, NEXT_S, waits=True)

    def do_GET(self) -> None:
        """Give a blob, its leaf table, or a part of one."""
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the rest of the request is not read
        self.server.expect(self.connection, PIECE_S, waits=False)
        found = _NAME.fullmatch(self.path)
        jobs = [] if found is None else [j for j in self.server.jobs if j.may_fetch(self._device, found[2])]
        if found is None or not jobs:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            job = next((j for j in jobs if j.store.has(found[2])), jobs[0])
            store = job.store
            view = memoryview(table_file(store.table(found[2]))) if found[3] == SUFFIX else store.map(found[2])
        except StorageError as error:
            log.debug("the web server of blobs: %s", error)
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._give(view, job)

    def do_PUT(self) -> None:
        """Take in an update that is awaited."""
        keep_alive, self.close_connection = not self.close_connection, True  # unless all of the body is read
        found = _NAME.fullmatch(self.path)
        sha256 = "" if found is None or found[3] else found[2]
        for uploads in [job.uploads for job in self.server.jobs if job.uploads is not None]:
            awaited = uploads.awaits(self._device, sha256)
            if awaited is not None:
                self._take(uploads, awaited, keep_alive=keep_alive)
                return
        self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815 - the library's names

    def _take(self, uploads: HttpUploads, awaited: Awaited, *, keep_alive: bool) -> None:
        ref = awaited.ref
        if self.headers.get_all("Content-Length") != [str(ref.size)] or "Transfer-Encoding" in self.headers:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        ends = time.monotonic() + UPLOAD_PIECE_S + ref.size / LEAST_BYTES_PER_S
        uploads.begin(awaited, self.connection)
        try:
            with StreamedBlob(uploads.store, ref) as blob:
                while uploads.note_progress(awaited, self.connection, blob.size) and blob.missing:
                    left = ends - time.monotonic()
                    self.server.expect(self.connection, min(UPLOAD_PIECE_S, left), waits=False)
                    data = self.rfile.read(min(LEAF, blob.missing))
                    if not data:
                        raise ConnectionError("an upload ended early")
                    blob.write(data)
                if not uploads.note_progress(awaited, self.connection, blob.size):
                    self.send_error(HTTPStatus.CONFLICT)
                    return
                self.close_connection = not keep_alive
                self.server.expect(self.connection, PIECE_S, waits=False)
                blob.finish()
        except ProtocolError as error:
            log.debug("an upload of device %s: %s", awaited.device, error)
            uploads.end(awaited, stored=False)
            self.send_error(HTTPStatus.UNPROCESSABLE_ENTITY)
        except StorageError as error:
            log.error("an update of device %s can't be stored: %s", awaited.device, error)
            full = isinstance(error, StorageFullError)
            self.send_error(HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.INTERNAL_SERVER_ERROR)
        else:
            self.server.count(received=1)
            uploads.end(awaited, stored=True)
            self._begin(HTTPStatus.CREATED, 0)

    def _give(self, view: memoryview, job: ServedJob) -> None:
        size = len(view)
        start, stop, status = 0, size, HTTPStatus.OK
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is not None:  # anything else that may be asked for isn't understood, and may be ignored
            start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
            if start >= stop:
                self._begin(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, f"bytes */{size}")
                return
            status = HTTPStatus.PARTIAL_CONTENT
        self._begin(status, stop - start, f"bytes {start}-{stop - 1}/{size}" if asked is not None else "")
        if self.command == "HEAD":
            return
        while start < stop:
            piece = view[start : min(start + _PIECE, stop)]
            self.server.expect(self.connection, PIECE_S, waits=False)
            self.wfile.write(piece)
            self.server.count(sent=len(piece))
            job.count(self._device, len(piece))
            start += len(piece)

    def _begin(self, status: HTTPStatus, length: int, range_: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        if range_:
            self.send_header("Content-Range", range_)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Say that there is nothing: a number is enough."""
        self._begin(HTTPStatus(code), 0)

    def version_string(self) -> str:
        """The `Server` header of an answer."""
        return "fedprune"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Requests are no news."""


def shut(client: Any) -> None:
    """End a connection, also one that another thread reads from or writes to."""
    with suppress(OSError, ValueError):
        socket.socket.shutdown(client, socket.SHUT_RDWR)  # not that of TLS, which isn't made for another thread
