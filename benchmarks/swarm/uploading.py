"""Updates put at web addresses, as boards put them into a bucket: some at a time, over connections that stay open."""

from __future__ import annotations

import asyncio
import http.client
import threading
from concurrent.futures import ThreadPoolExecutor

from fedprune.wire.urls import UploadUrl

AT_ONCE = 16
TIMEOUT_S = 120.0


class Uploader:
    """Puts bytes at addresses of one web server."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._own = threading.local()

    async def put(self, url: str, raw: bytes) -> str | None:
        """Put bytes; returns why that failed, or None."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._put, url, raw)

    def _put(self, url: str, raw: bytes) -> str | None:
        place, failure = UploadUrl.parse(url), ""
        for _ in range(2):  # the other side may have closed a connection that was long unused
            try:
                connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
                if connection is None:
                    connection = http.client.HTTPConnection(place.host, place.port, timeout=TIMEOUT_S)
                    self._own.connection = connection
                connection.request("PUT", place.target, raw)
                answer = connection.getresponse()
                answer.read()
                return None if answer.status in (200, 201) else f"status {answer.status}"
            except (OSError, http.client.HTTPException) as error:  # noqa: PERF203 - each turn waits for a network
                self._own.connection, failure = None, f"{type(error).__name__}: {error}"
        return failure[:400]
