"""The web server for Prometheus and for probes: `/metrics`, `/healthz` and `/readyz`."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from fedprune.core.errors import ConfigError
from fedprune_server.monitoring.alerts import HANG_THRESHOLD_S
from fedprune_server.monitoring.metrics import Metrics

log = logging.getLogger("fedprune.server")

# Requests that are answered at the same time, each on a thread. Prometheus and probes make one or two; more are closed
# unanswered, so that nobody can use up the server's threads.
MAX_REQUESTS = 32

_TIMEOUT_S = 10.0

# The header Host: an address of IPv6 in brackets, or another host, and perhaps a port.
_HOST_HEADER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d+)?")

# Checks of readiness by name: each returns what is wrong, or an empty text.
ReadinessChecks = Mapping[str, Callable[[], str]]


class _Server(ThreadingHTTPServer):
    """A web server with one thread per request, and a limit on their number."""

    def __init__(
        self, place: tuple[str, int], metrics: Metrics, checks: ReadinessChecks, hosts: Collection[str]
    ) -> None:
        self.metrics, self.checks, self.hosts = metrics, checks, hosts
        self._request_slots = threading.BoundedSemaphore(MAX_REQUESTS)
        self.address_family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        super().__init__(place, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._request_slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._request_slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._request_slots.release()

    def server_bind(self) -> None:
        """Listen, without looking up this machine's name: the library's version waits for DNS."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing: clients may leave."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        metrics, path = self.server.metrics, self.path.partition("?")[0]
        if path == "/metrics" and not is_own_name(self.headers.get("Host"), self.server.hosts):
            self._answer(421, b"called by a name that is not this server's ([server] console_hosts)\n")
        elif path == "/metrics":
            self._answer(200, metrics.text(), CONTENT_TYPE_LATEST)
        elif path == "/healthz":
            self._answer_problems(_hang_problems(metrics))
        elif path == "/readyz":
            problems = [f"{name}: {text}" for name, check in self.server.checks.items() if (text := check())]
            self._answer_problems(problems + _hang_problems(metrics))
        else:
            self._answer(404, b"try /metrics, /healthz or /readyz\n")

    do_HEAD = do_GET  # noqa: N815 - the library's name

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Log no requests."""

    def _answer_problems(self, problems: list[str]) -> None:
        self._answer(503 if problems else 200, "\n".join([*(problems or ["ok"]), ""]).encode())

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve_metrics(
    place: tuple[str, int], metrics: Metrics, checks: ReadinessChecks, hosts: Collection[str] = ()
) -> Iterator[int]:
    """Serve metrics and health, on a free port if the port is 0; yields the port.

    `hosts` are further names of this server, in small letters, for which it answers `/metrics`. Raises `ConfigError` if
    the address can't be used.
    """
    host, port = place
    try:
        server = _Server(place, metrics, checks, hosts)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            ("server", "metrics"), expected="an address of this machine and a free port", got=f"{host}:{port} ({error})"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    bound_port = int(server.server_address[1])
    log.info("metrics are at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, bound_port)
    try:
        yield bound_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_TIMEOUT_S)


def is_own_name(host: str | None, hosts: Collection[str]) -> bool:
    """Whether a request's Host is an address, a name without a dot, this machine's, or one of `hosts`.

    Another site can let any other name point here, so that a browser in this network would read metrics for it (DNS
    rebinding). Every browser sends Host, so that a request without it is no danger.
    """
    if not host:
        return True
    match = _HOST_HEADER.fullmatch(host)
    if match is None:
        return False
    name = (match[1] or match[2]).lower().rstrip(".")
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return "." not in name or name in hosts or name == socket.gethostname().lower()


def _hang_problems(metrics: Metrics) -> list[str]:
    if metrics.turned_at is None:
        return ["loop: it hasn't begun to turn"]
    since = metrics.clock() - metrics.turned_at
    return [f"loop: it hasn't turned for {since:.0f} s"] if since > HANG_THRESHOLD_S else []
