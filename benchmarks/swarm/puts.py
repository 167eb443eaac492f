"""Uploads of updates by presigned PUT, over a few connections that all devices of a process share."""

from __future__ import annotations

import asyncio
import base64
import http.client
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fedprune.wire.urls import UploadUrl

_CONNECTIONS = 4
_TIMEOUT_S = 60.0
_TAKEN = (200, 201, 204)


class Uploader:
    """PUTs updates as boards do, with the same headers; what fails is reported.

    Attributes:
        sent: Bytes of updates that were taken.
        failed: Uploads that weren't.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "swarm-puts")
        self._local = threading.local()
        self._loop = asyncio.get_running_loop()
        self.sent = self.failed = 0

    def put(self, url: str, sha256: str, raw: bytes, over: Callable[[str | None], None]) -> None:
        """Upload an update; `over` is called in the loop with the reason of a failure, or None."""

        def ended(done: Future[None]) -> None:
            self._loop.call_soon_threadsafe(self._ended, done, len(raw), over)

        self._pool.submit(self._put, UploadUrl.parse(url), sha256, raw).add_done_callback(ended)

    def _ended(self, done: Future[None], size: int, over: Callable[[str | None], None]) -> None:
        error = done.exception()
        if error is None:
            self.sent += size
        else:
            self.failed += 1
        over(None if error is None else f"{type(error).__name__}: {error}"[:400])

    def _put(self, url: UploadUrl, sha256: str, raw: bytes) -> None:
        connection, reused = getattr(self._local, "connection", None), True
        if connection is None:
            connection, reused = http.client.HTTPConnection(url.host, url.port, timeout=_TIMEOUT_S), False
            self._local.connection = connection
        headers = {
            "Content-Type": "application/octet-stream",
            "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode(),
        }
        try:
            connection.request("PUT", url.target, raw, headers)
            answer = connection.getresponse()
            text = answer.read(2048)
        except (OSError, http.client.HTTPException):
            connection.close()
            self._local.connection = None
            if not reused:
                raise
            self._put(url, sha256, raw)  # the server had closed it between two rounds
            return
        if answer.status not in _TAKEN:
            raise ConnectionError(f"the bucket answers {answer.status}: {text[:200]!r}")
