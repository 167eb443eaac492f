"""The web server for Prometheus and for probes: `/metrics`, `/healthz` and `/readyz`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import inf
from typing import Generic, TypeVar

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
MAX_CONNECTIONS = 32

# Seconds in which a request must come.
_REQUEST_TIMEOUT_S = 10.0

# Seconds after which a request is answered without the figures or checks that it waits for: Prometheus waits as long.
ANSWER_TIMEOUT_S = 10.0

# The header Host: an address of IPv6 in brackets, or another host, and perhaps a port.
_HOST_HEADER = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d+)?")

# Checks of readiness by name: each returns what is wrong, or an empty text.
ReadinessChecks = Mapping[str, Callable[[], str]]

T = TypeVar("T")


@contextmanager
def serve_metrics(
    place: tuple[str, int], metrics: Metrics, checks: ReadinessChecks, hosts: Collection[str] = ()
) -> Iterator[int]:
    """Serve metrics and health, on a free port if the port is 0; yields the port.

    `hosts` are further names of this server, in small letters, for which it answers `/metrics`. Raises `ConfigError` if
    the address can't be used.
    """
    app = _make_routes(metrics, checks, hosts)
    timeout_s = _REQUEST_TIMEOUT_S
    with WebServer(app, place, "metrics", lambda: MAX_CONNECTIONS, first_s=timeout_s, next_s=timeout_s) as server:
        server.start("metrics")
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        log.info("metrics are at http://%s:%d/metrics", host, server.port)
        yield server.port


class _SharedCall(Generic[T]):
    """Calls a function on a thread, once at a time: who asks meanwhile gets the same result. So a function that hangs
    takes one thread, which ends with the process, however many clients ask and give up."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: Future[T] | None = None

    async def result(self, request: Request) -> T:
        """What the function returns. Raises `asyncio.TimeoutError` after `ANSWER_TIMEOUT_S`."""
        request.state.client.expect(inf, waits=True)  # if it hangs, many that wait for it must not keep others out
        if self._result is None or self._result.done():
            self._result = Future()
            self._result.set_running_or_notify_cancel()  # so that no client who gives up cancels it
            threading.Thread(target=self._run, args=(self._result,), name="metrics-call", daemon=True).start()
        return await asyncio.wait_for(asyncio.wrap_future(self._result), ANSWER_TIMEOUT_S)

    def _run(self, result: Future[T]) -> None:
        try:
            result.set_result(self._function())
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            result.set_exception(error)


def _make_routes(metrics: Metrics, checks: ReadinessChecks, hosts: Collection[str]) -> Starlette:
    figures_call = _SharedCall(metrics.text)
    checks_call = _SharedCall(lambda: [f"{name}: {text}" for name, check in checks.items() if (text := check())])

    async def figures(request: Request) -> Response:
        if not is_own_name(request.headers.get("host"), hosts):
            return _answer("called by a name that is not this server's ([server] console_hosts)\n", 421)
        try:
            return _answer(await figures_call.result(request), kind=CONTENT_TYPE_LATEST)
        except asyncio.TimeoutError:
            return _problems_answer([f"metrics: not counted within {ANSWER_TIMEOUT_S:g} s"])

    # It waits for no thread: while a database hangs, this server is alive.
    async def health(_: Request) -> Response:
        return _problems_answer(_hang_problems(metrics))

    async def readiness(request: Request) -> Response:
        try:
            problems = await checks_call.result(request)
        except asyncio.TimeoutError:
            problems = [f"checks of {', '.join(checks)}: no answer within {ANSWER_TIMEOUT_S:g} s"]
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
