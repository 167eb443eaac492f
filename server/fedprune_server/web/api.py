"""The console's API for its own pages, and for programs that log in like them: JSON below `/api/v1`.

What reads or writes a database is a plain function, which runs in a thread: a query of a large fleet takes long enough
to delay everybody else on the event loop.
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
from fedprune_server.web.auth.roles import NEEDED, may
from fedprune_server.web.context import Console, session_of
from fedprune_server.web.events import LiveStream
from fedprune_server.web.parameters import filters, order_number, paging, search_text, sort_column
from fedprune_server.web.state.orders import RefusedError
from fedprune_server.web.state.status import Page

PREFIX = "/api/v1"


def routes(console: Console) -> list[Route]:
    view = console.view

    def me(request: Request) -> Response:
        session = session_of(request)
        orders = sorted(k for k, role in NEEDED.items() if may(session.operator.role, role))
        body = {"name": session.operator.name, "role": session.operator.role, "csrf": session.csrf}
        return JSONResponse({**body, "orders": orders, "server_takes": view.orders})

    def site(_: Request) -> Response:
        body = {"site": view.site, "ready": view.ready, "silent_s": view.silent_s, "counts": view.counts}
        return JSONResponse({**body, "jobs": view.jobs})

    def jobs(_: Request) -> Response:
        return JSONResponse({"items": view.jobs})

    def rounds(request: Request) -> Response:
        job = request.query_params.get("job") or next((j["name"] for j in view.jobs), "")
        return _page(view.rounds(job, **paging(request)), job=job)

    def devices(request: Request) -> Response:
        only = filters(request, "state", "profile", "job", "status", "online")
        page = view.devices(**paging(request), sort=sort_column(request), q=search_text(request), only=only)
        return _page(page, counts=view.counts)

    def device(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            row = view.device(check_device(name))
        except ProtocolError as error:
            raise HTTPException(404) from error
        if row is None:
            raise HTTPException(404)
        return JSONResponse({"device": row, "details": view.details(name), "reported": view.crashes(name)})

    def coverage(request: Request) -> Response:
        job = request.query_params.get("job") or next((j["name"] for j in view.jobs), "")
        return JSONResponse({"coverage": view.coverage(job)})

    def rollouts(_: Request) -> Response:
        return JSONResponse({"items": view.rollouts, "releases": view.releases})

    def alerts(request: Request) -> Response:
        page_bounds, includes_closed = paging(request), filters(request, "gone").get("gone") != "no"
        return _page(view.alerts(page=page_bounds["page"], size=page_bounds["size"], gone=includes_closed))

    def logs(request: Request) -> Response:
        only = filters(request, "level", "device", "job")
        return _page(view.lines(**paging(request, 100), q=search_text(request), only=only))

    def audit(request: Request) -> Response:
        if not may(session_of(request).operator.role, "admin"):
            return JSONResponse({"error": "the audit log needs the role admin"}, 403)
        operator = request.query_params.get("operator")
        return _page(console.audit.page(**paging(request), operator=operator))

    def orders(_: Request) -> Response:
        return JSONResponse({"items": console.orders.latest()})

    def order(request: Request) -> Response:
        answer = console.orders.get(order_number(request))
        if answer is None:
            raise HTTPException(404)
        return JSONResponse(answer)

    async def give(request: Request) -> Response:
        # A form of another site can't send this type without asking first (CORS preflight).
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return JSONResponse({"error": "expected application/json"}, 415)
        try:
            body = decode_json(await request.body())
        except (ValueError, RecursionError):
            return JSONResponse({"error": "the body is no JSON"}, 422)
        try:
            number = await run_in_threadpool(console.orders.give, session_of(request), request.state.address, body)
        except RefusedError as error:
            return JSONResponse({"error": error.text}, error.status)
        return JSONResponse({"order": number}, 202)

    def events(request: Request) -> Response:
        session, token = session_of(request), request.state.token

        def is_logged_in() -> bool:
            return console.sessions.find(token, used=False) is not None

        return LiveStream(console.streams, session.operator.name, ready=view.ready, allowed=is_logged_in)

    return [
        Route(PREFIX + "/me", me),
        Route(PREFIX + "/site", site),
        Route(PREFIX + "/jobs", jobs),
        Route(PREFIX + "/rounds", rounds),
        Route(PREFIX + "/devices", devices),
        Route(PREFIX + "/devices/{name}", device),
        Route(PREFIX + "/coverage", coverage),
        Route(PREFIX + "/rollouts", rollouts),
        Route(PREFIX + "/alerts", alerts),
        Route(PREFIX + "/logs", logs),
        Route(PREFIX + "/audit", audit),
        Route(PREFIX + "/orders", orders),
        Route(PREFIX + "/orders/{number}", order),
        Route(PREFIX + "/orders", give, methods=["POST"]),
        Route(PREFIX + "/events", events),
    ]


def _page(page: Page, **further_fields: Any) -> Response:
    return JSONResponse({**asdict(page), **further_fields})
