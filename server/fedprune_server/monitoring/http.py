"""The web server for Prometheus and for probes: `/metrics`, `/healthz` and `/readyz`."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedprune_server.monitoring.alerts import HANG_THRESHOLD_S
from fedprune_server.monitoring.metrics import Metrics
from fedprune_server.process.web_server import WebServer

log = logging.getLogger("fedprune.server")

# Open connections: Prometheus and probes make one or two.
MAX_REQUESTS = 32

_TIMEOUT_S = 10.0

# The header Host: an address of IPv6 in brackets, or another host, and perhaps a port.
_HOST_HEADER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d+)?")

# Checks of readiness by name: each returns what is wrong, or an empty text.
ReadinessChecks = Mapping[str, Callable[[], str]]


@contextmanager
def serve_metrics(
    place: tuple[str, int], metrics: Metrics, checks: ReadinessChecks, hosts: Collection[str] = ()
) -> Iterator[int]:
    """Serve metrics and health, on a free port if the port is 0; yields the port.

    `hosts` are further names of this server, in small letters, for which it answers `/metrics`. Raises `ConfigError` if
    the address can't be used.
    """
    app = _make_routes(metrics, checks, hosts)
    with WebServer(app, place, "metrics", lambda: MAX_REQUESTS, first_s=_TIMEOUT_S, next_s=_TIMEOUT_S) as server:
        server.start("metrics")
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        log.info("metrics are at http://%s:%d/metrics", host, server.port)
        yield server.port


def _make_routes(metrics: Metrics, checks: ReadinessChecks, hosts: Collection[str]) -> Starlette:
    # Handlers are plain functions, which run in threads: none waits for another's check of a database.
    def figures(request: Request) -> Response:
        if not is_own_name(request.headers.get("host"), hosts):
            return _answer("called by a name that is not this server's ([server] console_hosts)\n", 421)
        return _answer(metrics.text(), kind=CONTENT_TYPE_LATEST)

    def health(_: Request) -> Response:
        return _problems_answer(_hang_problems(metrics))

    def readiness(_: Request) -> Response:
        problems = [f"{name}: {text}" for name, check in checks.items() if (text := check())]
        return _problems_answer(problems + _hang_problems(metrics))

    def missing(_: Request, __: Exception) -> Response:
        return _answer("try /metrics, /healthz or /readyz\n", 404)

    routes = {"/metrics": figures, "/healthz": health, "/readyz": readiness}
    return Starlette(routes=[Route(*route) for route in routes.items()], exception_handlers={404: missing})


def _answer(body: str | bytes, status: int = 200, kind: str = "text/plain; charset=utf-8") -> Response:
    return Response(body, status, {"content-type": kind, "cache-control": "no-store"})


def _problems_answer(problems: list[str]) -> Response:
    return _answer("\n".join([*(problems or ["ok"]), ""]), 503 if problems else 200)


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
