"""The console's application: logging in and out, health, and the API; the pages come from `pages`."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune.core.text import one_line
from fedprune_server.web.api import Api
from fedprune_server.web.auth.accounts import MAX_PASSWORD
from fedprune_server.web.auth.middleware import SecurityMiddleware, safe_path
from fedprune_server.web.auth.sessions import MAX_SESSION_S
from fedprune_server.web.context import Console
from fedprune_server.web.parameters import form_fields
from fedprune_server.web.views.pages import Pages

# Passwords that are compared with their hashes at the same time: argon2id takes 64 MiB for each, on purpose.
_MAX_HASHING = 2

# Logins that wait for that. Further ones are answered 503 at once, so that a flood of them holds no memory.
_MAX_WAITING_LOGINS = 32


def make_app(console: Console) -> ASGIApp:
    """The application with its security middleware."""
    return SecurityMiddleware(make_routes(console), console.sessions, console.exposure)


def make_routes(console: Console) -> Starlette:
    """The application's routes. Without the security middleware nothing protects them."""
    pages = Pages(console)
    app = Starlette(
        routes=[*_EntryRoutes(console, pages).routes(), *Api(console).routes(), *pages.routes()],
        exception_handlers={
            404: pages.answer_missing,
            HTTPException: answer_refusal,
            ProtocolError: pages.answer_invalid,
            FedpruneError: answer_failure,
        },
    )
    app.router.redirect_slashes = False  # no address but a route's own answers
    return app


class _EntryRoutes:
    """The handlers of health, logging in and logging out."""

    def __init__(self, console: Console, pages: Pages) -> None:
        self._console, self._pages = console, pages
        self._hashing = anyio.CapacityLimiter(_MAX_HASHING)
        self._waiting = 0  # logins whose password isn't compared yet

    def routes(self) -> list[Route]:
        return [
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/login", self.login_form),
            Route("/login", self.login, methods=["POST"]),
            Route("/logout", self.logout, methods=["POST"]),
        ]

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"ok": True})

    def readyz(self, _: Request) -> Response:
        ready = self._console.view.is_ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    def login_page(self, request: Request, status: int = 200, error: str = "", next_path: str = "/") -> Response:
        nonce = secrets.token_urlsafe(32)
        csrf = self._console.sessions.login_token(nonce)
        has_no_accounts = len(self._console.accounts) == 0
        answer = self._pages.login(request, csrf=csrf, wrong=error, next=next_path, nobody=has_no_accounts)
        answer.status_code = status
        _set_cookie(request, answer, self._console.exposure.login_cookie, nonce, 3600)
        return answer

    def login_form(self, request: Request) -> Response:
        next_path = safe_path(request.query_params.get("next"))
        if request.state.session is not None:
            return RedirectResponse(next_path, 303)
        return self.login_page(request, next_path=next_path)

    async def login(self, request: Request) -> Response:
        fields = await form_fields(request)
        name, password, next_path = fields.get("name", ""), fields.get("password", ""), safe_path(fields.get("next"))
        if self._waiting >= _MAX_WAITING_LOGINS:
            return await run_in_threadpool(
                self.login_page, request, 503, "Too many are logging in. Try again in a moment.", next_path
            )
        self._waiting += 1
        try:
            refusal = await run_in_threadpool(self.refuse, request, fields, next_path)
            if refusal is not None:
                return refusal
            hashed = await run_in_threadpool(self._console.accounts.hash_of, name)
            is_right = await anyio.to_thread.run_sync(
                self._console.accounts.is_password, hashed, password, limiter=self._hashing
            )
        finally:
            self._waiting -= 1
        return await run_in_threadpool(self.log_in, request, fields, next_path, hashed if is_right else None)

    def refuse(self, request: Request, fields: Mapping[str, str], next_path: str) -> Response | None:
        """Refuse a login before its password is checked: a form that is too old, or too many attempts."""
        expected = self._console.sessions.login_token(request.cookies.get(self._console.exposure.login_cookie, ""))
        if not hmac.compare_digest(fields.get("csrf", "").encode(), expected.encode()):
            return self.login_page(request, 403, "The form was open for too long. Try again.", next_path)
        wait = self._console.throttle.admit(fields.get("name", "")[:64], request.state.address)
        if wait == 0:
            return None
        answer = self.login_page(request, 429, f"Too many attempts. Try again in {wait:.0f} seconds.", next_path)
        answer.headers["retry-after"] = str(int(wait) + 1)
        return answer

    def log_in(self, request: Request, fields: Mapping[str, str], next_path: str, hashed: str | None) -> Response:
        """Begin a session if the password fitted `hashed`, and the operator's hash is still the same."""
        name, address = fields.get("name", ""), request.state.address
        operator = self._console.accounts.get(name) if hashed is not None else None
        is_too_long = len(fields.get("password", "")) > MAX_PASSWORD
        if operator is None or is_too_long or self._console.accounts.hash_of(name) != hashed:
            self._console.audit.note_failed_login(one_line(name, 64), address)
            return self.login_page(request, 401, "Name or password is wrong.", next_path)
        self._console.throttle.reset(name, address)
        # Another token than before the login, so that nobody can have planted it in this browser.
        self._console.sessions.end(request.state.token)
        token = self._console.sessions.begin(operator, address)
        self._console.audit.note(name, address, "login", outcome="done")
        answer = RedirectResponse(next_path, 303)
        _set_cookie(request, answer, self._console.exposure.cookie, token, int(MAX_SESSION_S))
        _delete_cookie(request, answer, self._console.exposure.login_cookie)
        return answer

    async def logout(self, request: Request) -> Response:
        fields, session = await form_fields(request), request.state.session
        csrf_token = request.headers.get("x-csrf-token", fields.get("csrf", ""))
        if not hmac.compare_digest(csrf_token.encode(), session.csrf.encode()):
            return JSONResponse({"error": "the token is missing or wrong"}, 403)
        await run_in_threadpool(self._console.sessions.end, request.state.token)
        await run_in_threadpool(self._console.audit.note, session.operator.name, request.state.address, "logout")
        answer = RedirectResponse("/login", 303)
        _delete_cookie(request, answer, self._console.exposure.cookie)
        return answer


def answer_refusal(_: Request, error: Exception) -> Response:
    """The answer to a request that no route accepts, or that a route refuses."""
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse({"error": error.detail.lower()}, error.status_code, error.headers)


def answer_failure(_: Request, error: Exception) -> Response:
    """The answer while a database or file can't be used."""
    return JSONResponse({"error": error.what if isinstance(error, FedpruneError) else str(error)}, 503)


def _set_cookie(request: Request, answer: Response, name: str, value: str, seconds: int) -> None:
    answer.set_cookie(
        name, value, max_age=seconds, path="/", httponly=True, samesite="strict", secure=request.state.secure
    )


def _delete_cookie(request: Request, answer: Response, name: str) -> None:
    answer.delete_cookie(name, path="/", httponly=True, samesite="strict", secure=request.state.secure)
