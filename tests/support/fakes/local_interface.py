"""A board's local interface without a board: it answers as one does, and keeps what it was asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LocalInterface:
    """`address` is what a client takes; `samples` are the path, type and body of every sample that was added.

    `shape` is that of the model's input, or None while there is no model.
    """

    def __init__(self, shape: list[int] | None) -> None:
        self.shape = shape
        self.samples: list[tuple[str, str, bytes]] = []
        interface = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"input": interface.shape})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                interface.samples.append((self.path, self.headers["Content-Type"], body))
                self.answer(201, {"id": f"{len(interface.samples):032x}", "kept": True, "duplicate": False})

            def answer(self, status: int, body: dict[str, Any]) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                """Nothing: a test's output is its own."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"


@contextmanager
def local_interface(shape: list[int] | None) -> Iterator[LocalInterface]:
    """An interface of a board whose model takes inputs of this shape."""
    interface = LocalInterface(shape)
    thread = threading.Thread(target=interface.server.serve_forever)
    thread.start()
    try:
        yield interface
    finally:
        interface.server.shutdown()
        thread.join()
        interface.server.server_close()
