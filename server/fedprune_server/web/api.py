"""The console's API for its own pages, and for programs that log in like them: JSON below `/api/v1`.

What reads or writes a database is a plain function, which runs in a thread: a query of a large fleet takes long enough
to delay everybody else on the event loop.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fedprune.core.errors import ProtocolError, shown
from fedprune.core.json_file import decode_json
from fedprune.core.validation import whole_text
from fedprune.wire.topics import check_device
from fedprune_server.web.auth.roles import NEEDED, may
from fedprune_server.web.context import Console, session_of
from fedprune_server.web.events import LiveStream
from fedprune_server.web.state.orders import RefusedError
from fedprune_server.web.state.records import DEVICE_STATES, LEVELS, STATUSES
from fedprune_server.web.state.status import MAX_SIZE, Page

PREFIX = "/api/v1"
_MAX_Q = 100
_YES_NO = ("yes", "no")
_VALUES = {"state": DEVICE_STATES, "status": STATUSES, "online": _YES_NO, "gone": _YES_NO, "level": LEVELS}


def router(console: Console) -> APIRouter:
    routes, view = APIRouter(prefix=PREFIX), console.view

    @routes.get("/me")
    def me(request: Request) -> Response:
        session = session_of(request)
        orders = sorted(k for k, role in NEEDED.items() if may(session.operator.role, role))
        body = {"name": session.operator.name, "role": session.operator.role, "csrf": session.csrf}
        return JSONResponse({**body, "orders": orders, "server_takes": view.orders})

    @routes.get("/site")
    def site() -> Response:
        body = {"site": view.site, "ready": view.ready, "silent_s": view.silent_s, "counts": view.counts}
        return JSONResponse({**body, "jobs": view.jobs})

    @routes.get("/jobs")
    def jobs() -> Response:
        return JSONResponse({"items": view.jobs})

    @routes.get("/rounds")
    def rounds(request: Request) -> Response:
        job = request.query_params.get("job") or next((j["name"] for j in view.jobs), "")
        return _page(lambda: view.rounds(job, **_paging(request)), job=job)

    @routes.get("/devices")
    def devices(request: Request) -> Response:
        query = request.query_params
        sort, q = query.get("sort", "name"), query.get("q", "")[:_MAX_Q]

        def find() -> Page:
            only = _filters(request, "state", "profile", "job", "status", "online")
            return view.devices(**_paging(request), sort=sort, q=q, only=only)

        return _page(find, counts=view.counts)

    @routes.get("/devices/{name}")
    def device(name: str) -> Response:
        try:
            row = view.device(check_device(name))
        except ProtocolError as error:
            raise HTTPException(404) from error
        if row is None:
            raise HTTPException(404)
        return JSONResponse({"device": row, "details": view.details(name), "reported": view.crashes(name)})

    @routes.get("/coverage")
    def coverage(request: Request) -> Response:
        job = request.query_params.get("job") or next((j["name"] for j in view.jobs), "")
        return JSONResponse({"coverage": view.coverage(job)})

    @routes.get("/rollouts")
    def rollouts() -> Response:
        return JSONResponse({"items": view.rollouts, "releases": view.releases})

    @routes.get("/alerts")
    def alerts(request: Request) -> Response:
        def page() -> Page:
            paging = _paging(request)
            gone = _filters(request, "gone").get("gone") != "no"
            return view.alerts(page=paging["page"], size=paging["size"], gone=gone)

        return _page(page)

    @routes.get("/logs")
    def logs(request: Request) -> Response:
        q = request.query_params.get("q", "")[:_MAX_Q]
        names = ("level", "device", "job")
        return _page(lambda: view.lines(**_paging(request, 100), q=q, only=_filters(request, *names)))

    @routes.get("/audit")
    def audit(request: Request) -> Response:
        if not may(session_of(request).operator.role, "admin"):
            return JSONResponse({"error": "the audit log needs the role admin"}, 403)
        operator = request.query_params.get("operator")
        return _page(lambda: console.audit.page(**_paging(request), operator=operator))

    @routes.get("/orders")
    def orders() -> Response:
        return JSONResponse({"items": console.orders.latest()})

    @routes.get("/orders/{number}")
    def order(number: str) -> Response:
        try:
            found = console.orders.get(whole_text("number", number, error=ProtocolError))
        except ProtocolError as error:
            return JSONResponse({"error": str(error)}, 422)
        if found is None:
            raise HTTPException(404)
        return JSONResponse(found)

    @routes.post("/orders")
    async def give(request: Request) -> Response:
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

    @routes.get("/events")
    def events(request: Request) -> Response:
        session, token = session_of(request), request.state.token

        def allowed() -> bool:
            return console.sessions.find(token, used=False) is not None

        return LiveStream(console.streams, session.operator.name, ready=view.ready, allowed=allowed)

    return routes


def _paging(request: Request, size: int = 50) -> dict[str, int]:
    query = request.query_params
    try:
        return {
            "page": whole_text("page", query.get("page", "1"), 1, error=ProtocolError),
            "size": whole_text("size", query.get("size", str(size)), 1, MAX_SIZE, error=ProtocolError),
        }
    except ProtocolError as error:
        raise ValueError(str(error)) from error


def _filters(request: Request, *names: str) -> dict[str, str]:
    """The filters of a request that are set. Raises `ValueError` if one has no such value."""
    found = {name: value for name in names if (value := request.query_params.get(name))}
    for name, value in found.items():
        if value not in _VALUES.get(name, (value,)):
            raise ValueError(f"{name}: expected one of {', '.join(_VALUES[name])}, got {shown(value)}")
    return found


def _page(find: Any, **more: Any) -> Response:
    try:
        page: Page = find()
    except ValueError as error:
        return JSONResponse({"error": str(error)}, 422)
    return JSONResponse({**asdict(page), **more})
