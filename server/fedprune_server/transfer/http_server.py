"""A web server for blobs, for boards with a certificate of the fleet: each may fetch the blobs that it is offered, and
upload the update that is awaited from it.
"""

from __future__ import annotations

import logging
import re
import ssl
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fedprune.blobs.blob_ref import LEAF_BYTES, table_file
from fedprune.blobs.streamed_blob import StreamedBlob
from fedprune.core.errors import FedpruneError, ProtocolError, StorageError, StorageFullError
from fedprune.security.tls import peer_name
from fedprune.wire.transfer import MIN_BYTES_PER_S
from fedprune_server.process.web_server import WebClient, WebServer
from fedprune_server.transfer.served_job import ServedJob
from fedprune_server.transfer.web_uploads import AwaitedUpload, HttpUploads

log = logging.getLogger("fedprune.server")

# Maximum number of connections, to which the number of concurrent uploads is added.
BASE_CONNECTIONS = 64

# Maximum number of connections, uploads included: each takes two of a process's 1024 file descriptors.
MAX_CONNECTIONS = 512

# Seconds in which the handshake and the first request must come.
FIRST_REQUEST_TIMEOUT_S = 15.0

# Seconds in which a further request must come: between two requests a board may be writing to its disk.
NEXT_REQUEST_TIMEOUT_S = 60.0

# Seconds in which a board must receive a piece of a file.
SEND_TIMEOUT_S = 60.0

# Seconds in which a leaf of an upload must come.
UPLOAD_LEAF_TIMEOUT_S = 30.0

_PIECE_BYTES = 8 * LEAF_BYTES

# The only kind of range that boards ask for. A request for another kind gets the whole file, as HTTP allows.
_RANGE_PATTERN = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")

_BLOB_PATH_PATTERN = re.compile(r"(?:/[A-Za-z0-9._~-]{1,255}){0,32}/([0-9a-f]{2})/(\1[0-9a-f]{62})(\.leaves)?")


class _BlobResponse(Response):
    """A mapped blob or a range of it, sent from memory: a thread that reads a file takes as long as sending a piece."""

    def __init__(self, blob: memoryview, range_header: str) -> None:
        size, status, headers = len(blob), HTTPStatus.OK, {"accept-ranges": "bytes"}
        if byte_range := _RANGE_PATTERN.fullmatch(range_header):
            blob = blob[int(byte_range[1]) : int(byte_range[2] or size) + 1]
            status = HTTPStatus.PARTIAL_CONTENT if blob else HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            sent_range = f"{byte_range[1]}-{int(byte_range[1]) + len(blob) - 1}" if blob else "*"
            headers["content-range"] = f"bytes {sent_range}/{size}"
        self._blob = blob
        super().__init__(None, status, headers | {"content-length": str(len(blob))}, "application/octet-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self._blob) if scope["method"] == "GET" else 0, _PIECE_BYTES):
            piece = self._blob[start : start + _PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


class BlobServer(WebServer):
    """The web server: it answers until `close`, on a thread of its own. Raises `ConfigError` if the address can't be
    listened on.

    `context` returns TLS for a new connection, which asks for the board's certificate; None to do without. At most
    `connections` are open, apart from those for uploads. `jobs`, at first none, have the blobs that may be fetched and
    uploaded; `sent` counts bytes, and `received` updates."""

    def __init__(
        self, host: str, port: int, context: Callable[[], ssl.SSLContext] | None, connections: int = BASE_CONNECTIONS
    ) -> None:
        self.jobs: Sequence[ServedJob] = ()
        self.sent = self.received = 0
        super().__init__(
            self._respond,
            (host, port),
            "serve_blobs",
            lambda: min(connections + sum(job.connections for job in self.jobs), MAX_CONNECTIONS),
            first_s=FIRST_REQUEST_TIMEOUT_S,
            next_s=NEXT_REQUEST_TIMEOUT_S,
            tls=None if context is None else _renewing_context(context),
            client_name=peer_name,
        )
        self.start("fedprune-blobs")

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        client: WebClient = scope["state"]["client"]
        client.expect(SEND_TIMEOUT_S)
        serving_job: ServedJob | None = None

        async def send_counted(message: Message) -> None:
            client.expect(SEND_TIMEOUT_S)
            await send(message)
            if serving_job is not None:
                size = len(message.get("body", b""))
                self.sent += size
                serving_job.count_sent(client.name, size)

        try:
            request = Request(scope, receive)
            path = scope["raw_path"].decode("ascii") + ("?" if scope["query_string"] else "")
            name = _BLOB_PATH_PATTERN.fullmatch(path)
            if request.method in ("GET", "HEAD"):
                response, serving_job = await run_in_threadpool(
                    self._blob_response, client, name, request.headers.get("range", "")
                )
            elif request.method == "PUT":
                response = await self._upload_response(client, name, request)
            else:
                response = Response(status_code=HTTPStatus.NOT_IMPLEMENTED)
            await response(scope, receive, send_counted)
        except ClientDisconnect:
            log.debug("a client of the web server of blobs went")
        except Exception as error:
            log.error("the web server of blobs could not answer a request", exc_info=error)
            client.cut()

    def _blob_response(
        self, client: WebClient, name: re.Match[str] | None, range_header: str
    ) -> tuple[Response, ServedJob | None]:
        """The answer with a blob, a range of it or its leaf table, and the job to which the blob belongs."""
        jobs = [] if name is None else [j for j in self.jobs if j.may_fetch(client.name, name[2])]
        if name is None or not jobs:
            return Response(status_code=HTTPStatus.NOT_FOUND), None
        job = next((j for j in jobs if j.store.has(name[2])), jobs[0])
        try:
            if name[3]:
                return Response(table_file(job.store.table(name[2]))), job
            return _BlobResponse(job.store.map(name[2]), range_header), job
        except (StorageError, OSError) as error:
            log.debug("the web server of blobs: %s", error)
            return Response(status_code=HTTPStatus.NOT_FOUND), None

    async def _upload_response(self, client: WebClient, name: re.Match[str] | None, request: Request) -> Response:
        """The answer to an upload, whose blob is stored if it is an awaited update."""
        sha256 = "" if name is None or name[3] else name[2]
        for uploads in [job.uploads for job in self.jobs if job.uploads is not None]:
            awaited = uploads.find_awaited(client.name, sha256)
            if awaited is not None:
                return Response(status_code=await self._store_upload(client, uploads, awaited, request))
        return Response(status_code=HTTPStatus.NOT_FOUND)

    async def _store_upload(
        self, client: WebClient, uploads: HttpUploads, awaited: AwaitedUpload, request: Request
    ) -> HTTPStatus:
        ref = awaited.ref
        if request.headers.getlist("content-length") != [str(ref.size)] or "transfer-encoding" in request.headers:
            return HTTPStatus.BAD_REQUEST
        deadline = time.monotonic() + UPLOAD_LEAF_TIMEOUT_S + ref.size / MIN_BYTES_PER_S
        client.expect(UPLOAD_LEAF_TIMEOUT_S)
        uploads.begin_upload(awaited, client)
        try:
            with StreamedBlob(uploads.store, ref) as blob:
                leaves = 0
                async for data in request.stream():
                    await run_in_threadpool(blob.write, data)
                    if not uploads.note_progress(awaited, client, blob.received_bytes):
                        client.cut()
                        return HTTPStatus.CONFLICT
                    if blob.received_bytes // LEAF_BYTES > leaves:  # a byte now and then doesn't count as progress
                        leaves = blob.received_bytes // LEAF_BYTES
                        client.expect(min(UPLOAD_LEAF_TIMEOUT_S, deadline - time.monotonic()))
                client.expect(SEND_TIMEOUT_S)
                await run_in_threadpool(blob.finish)
        except ProtocolError as error:
            log.debug("an upload of device %s: %s", awaited.device, error)
            uploads.end_upload(awaited, stored=False)
            return HTTPStatus.UNPROCESSABLE_ENTITY
        except StorageError as error:
            log.error("an update of device %s can't be stored: %s", awaited.device, error)
            full = isinstance(error, StorageFullError)
            return HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.INTERNAL_SERVER_ERROR
        self.received += 1
        uploads.end_upload(awaited, stored=True)
        return HTTPStatus.CREATED


def _renewing_context(context: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """TLS each of whose handshakes uses the context that `context` returns at that moment."""

    def renew(connection: ssl.SSLObject, host: str | None, initial: ssl.SSLContext) -> int | None:
        try:
            connection.context = context()
        except FedpruneError as error:
            log.warning("the web server of blobs: %s", error)
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        return None

    initial = context()
    initial.sni_callback = renew  # OpenSSL calls it for each handshake, even if the client sends no name
    return initial
