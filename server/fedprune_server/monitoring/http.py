"""The small web server that gives a server's figures to Prometheus, and says whether it lives and is ready."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from fedprune.core.errors import ConfigError
from fedprune_server.monitoring.metrics import Metrics

log = logging.getLogger("fedprune.server")

HANGS_S = 60.0
"""A loop that hasn't turned for so long counts as hung."""

_TEXT = "text/plain; charset=utf-8"
_PATIENCE_S = 10.0

MOST = 32
"""Requests that are answered at the same time, each by a thread of the server's process; others are hung up on."""

Checks = Mapping[str, Callable[[], str]]
"""By name what must be so for a server to be ready: each says what is wrong, or nothing."""


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Requests are nobody's news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._places = threading.BoundedSemaphore(MOST)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request on a thread, if one is free."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def server_bind(self) -> None:
        """Listen, without resolving this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Who asks and goes away is nobody's news."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def application(metrics: Metrics, checks: Checks) -> Callable[..., Iterable[bytes]]:
    """The WSGI application: `/metrics`, `/healthz` and `/readyz`.

    Args:
        metrics: The figures.
        checks: What must be so to be ready.
    """

    def answer(environ: Mapping[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, kind = environ.get("PATH_INFO", ""), _TEXT
        status, body = "404 Not Found", b"try /metrics, /healthz or /readyz\n"
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"GET alone\n"
        elif path == "/metrics":
            status, kind, body = "200 OK", "text/plain; version=0.0.4; charset=utf-8", metrics.text()
        elif path == "/healthz":
            status, body = _verdict(_hangs(metrics))
        elif path == "/readyz":
            status, body = _verdict([f"{n}: {t}" for n, look in checks.items() if (t := look())] + _hangs(metrics))
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")])
        return [b"" if environ.get("REQUEST_METHOD") == "HEAD" else body]

    return answer


@contextmanager
def served(place: tuple[str, int], metrics: Metrics, checks: Checks) -> Iterator[int]:
    """Serve metrics and health until the end.

    Args:
        place: Address and port; port 0 for a free one.
        metrics: The figures.
        checks: What must be so to be ready.

    Yields:
        The port.

    Raises:
        ConfigError: The address can't be listened on.
    """
    host, port = place
    kind = _Server6 if ":" in host else _Server
    try:
        server = make_server(host, port, application(metrics, checks), kind, _Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "server: metrics", expected="an address of this machine and a free port", got=f"{host}:{port} ({error})"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics are at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_PATIENCE_S)


def _verdict(wrong: list[str]) -> tuple[str, bytes]:
    if wrong:
        return "503 Service Unavailable", ("\n".join(wrong) + "\n").encode()
    return "200 OK", b"ok\n"


def _hangs(metrics: Metrics) -> list[str]:
    """What is wrong with the loop, if it doesn't turn."""
    if metrics.turned_at is None:
        return ["loop: it hasn't begun to turn"]
    since = metrics.clock() - metrics.turned_at
    return [f"loop: it hasn't turned for {since:.0f} s"] if since > HANGS_S else []
