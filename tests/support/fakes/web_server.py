"""A web server of a test's own, which has the blobs of a store and behaves as it is told."""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore

Behaviour = Callable[["Handler", bytes], bool]  # given the whole of what is asked for; whether it has answered


class Handler(BaseHTTPRequestHandler):
    server: WebPlace
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        place = self.server
        place.asked.append((self.path, self.headers.get("Range")))
        path = place.root / self.path.lstrip("/")
        if (
            place.answers == 0
            or not re.fullmatch(r"/[0-9a-f]{2}/[0-9a-f]{64}(\.leaves)?", self.path)
            or not path.exists()
        ):
            self.say(404, b"")
            return
        place.answers -= 1
        data = path.read_bytes()
        if not place.behave(self, data):
            self.give(data)

    def do_PUT(self) -> None:
        place = self.server
        place.uploads.append((self.path, dict(self.headers)))
        if place.take(self):
            return
        place.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.say(200, b"")

    def give(self, data: bytes, *, until: int | None = None, ranges: bool = True, **headers: str) -> None:
        """Give all of it, or the range that is asked for; of that only so many bytes."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
        if asked is None:
            self.say(200, data, until=until, **headers)
            return
        first, last = int(asked[1]), int(asked[2])
        content_range = f"bytes {first}-{last}/{len(data)}"
        self.say(206, data[first : last + 1], until=until, **{"Content-Range": content_range, **headers})

    def say(self, status: int, body: bytes, *, until: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        sent_body = body if until is None else body[:until]
        self.wfile.write(sent_body)
        self.server.sent += len(sent_body)
        if until is not None:
            self.close_connection = True

    def drip(self, head: bytes, seconds: float) -> None:
        """Send something, and then nothing, until nobody listens any more."""
        self.wfile.write(head)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self.server.closing.is_set():
            time.sleep(0.01)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        pass


class WebPlace(ThreadingHTTPServer):
    """Serves until its end as a context.

    Attributes:
        behave: What it does; what it leaves is answered as it should be.
        answers: How many requests it still answers; beyond them it has nothing. Negative for all.
        asked: Paths and ranges that were asked for.
        sent: Bytes of bodies.
        take: What it does with an upload, of which the body is unread; whether it has answered.
        uploads: Paths and heads of uploads, of which `bodies` were taken.
    """

    daemon_threads = True

    def __init__(self, store: BlobStore, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root: Path = store.root
        self.behave: Behaviour = lambda handler, data: False
        self.answers = -1
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0
        self.take: Callable[[Handler], bool] = lambda handler: False
        self.uploads: list[tuple[str, dict[str, str]]] = []
        self.bodies: list[bytes] = []
        self.closing = threading.Event()
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.server_address[1]}"
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()
