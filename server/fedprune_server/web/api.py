"""The console's API for its own pages, and for programs that log in as they do: JSON below `/api/v1`.

Handlers that read or write a database are plain functions, which run in threads: a query of a large fleet takes long
enough to delay all other requests on the event loop.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedprune.core.errors import ProtocolError
from fedprune.core.json_file import decode_json
from fedprune.wire.topics import check_device
from fedprune_server.web.auth.roles import ORDER_KINDS, has_role
from fedprune_server.web.context import Console, session_of
from fedprune_server.web.events import LiveStream
from fedprune_server.web.parameters import filters, order_number, paging, search_text, sort_column
from fedprune_server.web.state.fleet_view import DEVICE_FILTERS
from fedprune_server.web.state.orders import RefusedError
from fedprune_server.web.state.record_page import RecordPage

PREFIX = "/api/v1"


class Api:
    """The handlers of the API's routes."""

    def __init__(self, console: Console) -> None:
        self._console, self._view = console, console.view

    def routes(self) -> list[Route]:
        fleet = self.me, self.site, self.jobs, self.rounds, self.devices, self.coverage, self.rollouts
        named_by_path = *fleet, self.alerts, self.logs, self.audit, self.orders, self.events
        return [
            *(Route(f"{PREFIX}/{handler.__name__}", handler) for handler in named_by_path),
            Route(PREFIX + "/devices/{name}", self.device),
            Route(PREFIX + "/orders/{number}", self.order),
            Route(PREFIX + "/orders", self.give, methods=["POST"]),
        ]

    def me(self, request: Request) -> Response:
        session = session_of(request)
        orders = sorted(k for k, order in ORDER_KINDS.items() if has_role(session.operator.role, order.role))
        body = {"name": session.operator.name, "role": session.operator.role, "csrf": session.csrf}
        return JSONResponse({**body, "orders": orders, "server_takes": self._view.accepted_orders})

    def site(self, _: Request) -> Response:
        view = self._view
        body = {"site": view.site, "ready": view.is_ready, "silent_s": view.silent_s, "counts": view.counts}
        return JSONResponse({**body, "jobs": view.jobs})

    def jobs(self, _: Request) -> Response:
        return JSONResponse({"items": self._view.jobs})

    def rounds(self, request: Request) -> Response:
        job = self._chosen_job(request)
        return _page_response(self._view.rounds(job, **paging(request)), job=job)

    def _chosen_job(self, request: Request) -> str:
        return request.query_params.get("job") or next((j["name"] for j in self._view.jobs), "")

    def devices(self, request: Request) -> Response:
        only = filters(request, *DEVICE_FILTERS)
        page = self._view.devices(**paging(request), sort=sort_column(request), q=search_text(request), only=only)
        return _page_response(page, counts=self._view.counts)

    def device(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            row = self._view.device(check_device(name))
        except ProtocolError as error:
            raise HTTPException(404) from error
        if row is None:
            raise HTTPException(404)
        return JSONResponse({"device": row, "details": self._view.details(name), "reported": self._view.crashes(name)})

    def coverage(self, request: Request) -> Response:
        return JSONResponse({"coverage": self._view.coverage(self._chosen_job(request))})

    def rollouts(self, _: Request) -> Response:
        return JSONResponse({"items": self._view.rollouts, "releases": self._view.releases})

    def alerts(self, request: Request) -> Response:
        bounds, includes_closed = paging(request), filters(request, "gone").get("gone") != "no"
        return _page_response(self._view.alerts(page=bounds["page"], size=bounds["size"], gone=includes_closed))

    def logs(self, request: Request) -> Response:
        only = filters(request, "level", "device", "job")
        return _page_response(self._view.lines(**paging(request, 100), q=search_text(request), only=only))

    def audit(self, request: Request) -> Response:
        if not has_role(session_of(request).operator.role, "admin"):
            return JSONResponse({"error": "the audit log needs the role admin"}, 403)
        operator = request.query_params.get("operator")
        return _page_response(self._console.audit.page(**paging(request), operator=operator))

    def orders(self, _: Request) -> Response:
        return JSONResponse({"items": self._console.orders.latest()})

    def order(self, request: Request) -> Response:
        answer = self._console.orders.get(order_number(request))
        if answer is None:
            raise HTTPException(404)
        return JSONResponse(answer)

    async def give(self, request: Request) -> Response:
        # A form of another site can't send this type without asking first (CORS preflight).
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return JSONResponse({"error": "expected application/json"}, 415)
        try:
            body = decode_json(await request.body())
        except (ValueError, RecursionError):
            return JSONResponse({"error": "the body is no JSON"}, 422)
        try:
            number = await run_in_threadpool(
                self._console.orders.give, session_of(request), request.state.address, body
            )
        except RefusedError as error:
            return JSONResponse({"error": error.text}, error.status)
        return JSONResponse({"order": number}, 202)

    def events(self, request: Request) -> Response:
        session, token = session_of(request), request.state.token

        def is_logged_in() -> bool:
            return self._console.sessions.find(token, used=False) is not None

        streams, name = self._console.streams, session.operator.name
        return LiveStream(streams, name, ready=self._view.is_ready, is_logged_in=is_logged_in)


def _page_response(page: RecordPage, **further_fields: Any) -> Response:
    return JSONResponse({**asdict(page), **further_fields})
