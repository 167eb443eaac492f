"""Checks every request to the console: without a session, only the paths named here can be reached.

A request that changes something must come from these pages, by the browser's headers, and repeat the session's token.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedprune.core.errors import FedpruneError
from fedprune_server.web.auth.sessions import OperatorSessions

# Paths that need no session: logging in, and probes.
OPEN_PATHS = frozenset({"/login", "/healthz", "/readyz"})

# The prefix of public files: scripts and styles, no data.
STATIC_PREFIX = "/static/"

# Paths whose forms work without JavaScript: they repeat the token in a field, and check it themselves. All other paths
# take it from a header.
FORM_PATHS = frozenset({"/login", "/logout"})

CSRF_HEADER = "x-csrf-token"
# An order or a form has some hundred bytes; a body is held in memory before the application sees it.
MAX_BODY_BYTES = 64 * 1024
# How long a request's body may take.
BODY_TIMEOUT_S = 30.0

MAX_PATH, MAX_QUERY = 2048, 4096

_SAFE_METHODS = ("GET", "HEAD")
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": _CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Exposure:
    """How browsers reach a console.

    Attributes:
        has_tls: Whether the console speaks TLS itself.
        has_proxy: Whether a reverse proxy on this machine speaks for browsers.
        hosts: Names that browsers may use without TLS, in addition to addresses and `localhost`.
    """

    has_tls: bool = False
    has_proxy: bool = False
    hosts: tuple[str, ...] = ()

    @property
    def cookie(self) -> str:
        return "__Host-fedprune" if self.has_tls else "fedprune"

    @property
    def login_cookie(self) -> str:
        return f"{self.cookie}-login"


class _TooLongError(Exception):
    pass


class SecurityMiddleware:
    """Passes requests to the application, with `session` (or None), `address` and `secure` in their state."""

    def __init__(self, app: ASGIApp, sessions: OperatorSessions, exposure: Exposure) -> None:
        self._app = app
        self._sessions = sessions
        self._exposure = exposure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers, path = Headers(scope=scope), scope["path"]
        state = scope.setdefault("state", {})
        state["address"], state["secure"] = self._client(scope, headers)
        send_with_headers = _add_headers(scope, send)
        try:
            refusal = await run_in_threadpool(self._refusal, scope, headers, state)  # it reads the database
        except FedpruneError:
            refusal = 503, "the console's database can't be used"
        if refusal is not None:
            await _refuse(send_with_headers, path, *refusal)
            return
        if scope["method"] not in _SAFE_METHODS:
            try:
                body = await asyncio.wait_for(_read_body(receive), BODY_TIMEOUT_S)
            except _TooLongError:
                await _refuse(send_with_headers, path, 413, f"at most {MAX_BODY_BYTES} bytes")
                return
            except asyncio.TimeoutError:
                await _refuse(send_with_headers, path, 408, f"the body took longer than {BODY_TIMEOUT_S:.0f} s")
                return
            receive = _replay_body(body, receive)
        await self._app(scope, receive, send_with_headers)

    def _client(self, scope: Scope, headers: Headers) -> tuple[str, bool]:
        """The browser's address, and whether the connection uses TLS."""
        client = scope.get("client")
        address, secure = (client[0] if client else "unknown"), self._exposure.has_tls
        ip_address = address_of(address)
        if self._exposure.has_proxy and (address == "localhost" or (ip_address is not None and ip_address.is_loopback)):
            # Only the last entry is the proxy's; clients can send the ones before it.
            address = headers.get("x-forwarded-for", "").rpartition(",")[2].strip() or address
            secure = secure or headers.get("x-forwarded-proto", "").strip().lower() == "https"
        return address[:64], secure

    def _refusal(self, scope: Scope, headers: Headers, state: dict[str, Any]) -> tuple[int, str] | None:
        path, method = scope["path"], scope["method"]
        state["session"] = None
        if len(scope.get("raw_path") or b"") > MAX_PATH or len(scope["query_string"]) > MAX_QUERY:
            return 414, "the address is too long"
        if not state["secure"] and not self._is_own_host(headers.get("host", "")):
            return 421, "called by a name that is not this console's ([server] console_hosts)"
        length = headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length[:12]) > MAX_BODY_BYTES):
            return 413, f"at most {MAX_BODY_BYTES} bytes"
        token = cookie_parser(headers.get("cookie", "")[:8192]).get(self._exposure.cookie)
        session = state["session"] = self._sessions.find(token)
        state["token"] = token if session is not None else None
        if session is None and path not in OPEN_PATHS and not path.startswith(STATIC_PREFIX):
            return 401, "log in first"
        if method in _SAFE_METHODS:
            return None
        if not is_same_origin(headers):
            return 403, "the request comes from another site"
        if path in FORM_PATHS:
            return None
        csrf_token = headers.get(CSRF_HEADER, "")
        if session is None or not hmac.compare_digest(csrf_token.encode(), session.csrf.encode()):
            return 403, f"the header {CSRF_HEADER} is missing or wrong"
        return None

    def _is_own_host(self, host: str) -> bool:
        """Whether a browser calls the console by an address or a configured name.

        Another site can let any other name point here (DNS rebinding); with TLS the certificate prevents that.
        """
        name = host_of(f"//{host}") if host and _is_plain(host) else None
        return name is not None and (
            name == "localhost" or name in self._exposure.hosts or address_of(name) is not None
        )


async def _refuse(send: Send, path: str, status: int, text: str) -> None:
    headers, body = [(b"content-type", b"application/json")], json.dumps({"error": text}).encode()
    if status == 401 and not path.startswith("/api/"):
        status, body = 303, b""
        headers = [(b"location", f"/login?next={quote(path, safe='/')}".encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_same_origin(headers: Headers) -> bool:
    """Whether a changing request comes from this console's pages, by the browser's headers."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    # Older browsers send no Sec-Fetch-Site, and programs no Origin either; the token protects these requests.
    origin = headers.get("origin")
    if origin is None:
        return True
    scheme, separator, host = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and host == headers.get("host")


def host_of(url: str) -> str | None:
    """The host of a URL; None for an invalid one."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A host as an IP address; None if it is a name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def safe_path(path: str | None) -> str:
    """The path to go to after the login: never another site's, which a link to the login form could name."""
    if not path or not path.startswith("/") or path.startswith("//") or "\\" in path or not _is_plain(path):
        return "/"
    return path


def _is_plain(text: str) -> bool:
    return len(text) <= MAX_PATH and text.isascii() and text.isprintable() and " " not in text


async def _read_body(receive: Receive) -> bytes:
    """Read a request's body, limited in size.

    It is read before the application is called, because that couldn't answer a body that is too long with 413.
    """
    body, has_more = b"", True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise _TooLongError
    return body


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """A receiver that returns the buffered body first."""
    is_sent = False

    async def receive_body() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


def _add_headers(scope: Scope, send: Send) -> Send:
    """Add the headers that every answer has."""
    added_headers = dict(SECURITY_HEADERS)
    if not scope["path"].startswith(STATIC_PREFIX):
        added_headers["cache-control"] = "no-store"  # pages show a fleet's names and an operator's token

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in added_headers.items():
                headers[name] = value
        await send(message)

    return send_with_headers
