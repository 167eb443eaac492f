"""A browser as far as a console notices: it keeps cookies, and speaks to an application without a network."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from argon2 import PasswordHasher

from fedprune_server.web.app import make_app
from fedprune_server.web.auth.middleware import Exposure
from fedprune_server.web.context import Console, make_console
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.order_queue import Order, OrderAnswer, answer_statements, read_order
from fedprune_server.web.state.records import StatusRecord
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter
from support.fakes.console_fleet import ConsoleFleet, write

QUICK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
PASSWORD = "a long horse, a battery"


@dataclass
class Reply:
    """What an application answered."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k == name), None)

    def cookies(self) -> list[str]:
        return [v for k, v in self.headers if k == "set-cookie"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Browser:
    """Somebody at an application, whose cookies and address it holds; `host` is what it calls the console."""

    app: Any
    address: str = "127.0.0.1"
    host: str = "127.0.0.1:8470"
    secure: bool = False
    cookies: dict[str, str] = field(default_factory=dict)
    csrf: str = ""

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        pieces: list[bytes] | None = None,
    ) -> Reply:
        """Ask for something, in one piece or several."""
        return asyncio.run(self.answer(method, path, body, headers, pieces))

    async def answer(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        pieces: list[bytes] | None = None,
    ) -> Reply:
        """The same among other requests of one event loop."""
        sent_headers = {"host": self.host, **(headers or {})}
        if self.cookies:
            sent_headers["cookie"] = "; ".join(f"{k}={v}" for k, v in self.cookies.items())
        plain, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "https" if self.secure else "http", "path": plain, "raw_path": plain.encode(),
            "query_string": query.encode(), "root_path": "", "client": (self.address, 5), "server": ("127.0.0.1", 8470),
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in sent_headers.items()],
        }  # fmt: skip
        sent: list[Any] = []
        left = list(pieces if pieces is not None else [body])

        async def receive() -> Any:
            if left:
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start = next(m for m in sent if m["type"] == "http.response.start")
        response_headers = [(k.decode().lower(), v.decode("latin-1")) for k, v in start.get("headers", [])]
        reply = Reply(start["status"], response_headers, b"".join(m.get("body", b"") for m in sent))
        for text in reply.cookies():
            for name, morsel in SimpleCookie(text).items():
                self.cookies[name] = morsel.value
                if morsel["max-age"] == "0":
                    del self.cookies[name]
        return reply

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def form(self, path: str, **fields: str) -> Reply:
        return self.ask("POST", path, urlencode(fields).encode(), {"content-type": "application/x-www-form-urlencoded"})

    def order(self, **body: Any) -> Reply:
        headers = {"content-type": "application/json", "x-csrf-token": self.csrf}
        return self.ask("POST", "/api/v1/orders", json.dumps(body).encode(), headers)

    def login(self, console: Console, name: str, password: str = PASSWORD) -> Reply:
        """Log in by the form, as pages show it."""
        self.get("/login")
        nonce = self.cookies.get(console.exposure.login_cookie, "")
        reply = self.form("/login", csrf=console.sessions.login_token(nonce), name=name, password=password)
        if reply.status == 303:
            self.csrf = self.get("/api/v1/me").json["csrf"]
        return reply


@dataclass
class Trial:
    """A console of a fleet that isn't there, with a viewer, an operator and an admin."""

    console: Console
    app: Any
    fleet: ConsoleFleet
    writer: StatusWriter
    database: ConsoleDatabase
    clock: Callable[[], float]

    def browser(self, name: str = "", **options: Any) -> Browser:
        browser = Browser(self.app, **options)
        if name:
            assert browser.login(self.console, name).status == 303
        return browser

    @property
    def orders(self) -> list[Order]:
        """All orders so far."""
        return [read_order(r) for r in self.database.rows("SELECT * FROM orders ORDER BY number")]

    def write(self, *records: StatusRecord, **options: Any) -> None:
        """Publish records as the server does."""
        write(self.writer, *records, at=self.clock(), **options)

    def answer(self, number: int, ok: bool, text: str) -> None:
        """Answer an order as the server does."""
        assert self.database.try_execute(*answer_statements(OrderAnswer(number, ok, text), self.clock()))


def trial(
    folder: Path,
    devices: int = 20,
    around: Exposure | None = None,
    clock: Callable[[], float] = time.time,
    allowed: str = "all",
) -> Trial:
    """A console with its fleet; orders are kept, and not answered."""
    fleet, writer = ConsoleFleet(devices, 3), StatusWriter(folder / STATUS_FILE)
    fleet.publish(writer, clock())
    database = ConsoleDatabase(folder / "console.db")
    console = make_console(FleetView(folder / STATUS_FILE, allowed, clock), database, around, QUICK, clock)
    for role in ("viewer", "operator", "admin"):
        console.accounts.add(role, role, PASSWORD)
    return Trial(console, make_app(console), fleet, writer, database, clock)
