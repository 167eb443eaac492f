"""A console that is served on this machine, with a fleet that isn't there, for browsers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from argon2 import PasswordHasher

from fedprune_server.web.app import make_app
from fedprune_server.web.context import make_console
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.events import POLL_INTERVAL_S, send_changes
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.order_queue import Order, OrderAnswer, OrderQueue
from fedprune_server.web.state.records import StatusRecord
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter
from support.fakes.console_fleet import ConsoleFleet, write

PASSWORD = "correct horse battery"
ROLES = ("viewer", "operator", "admin")


Carried = tuple[list[StatusRecord], dict[str, str], str]
"""What a server publishes on an order, records and devices, and its answer."""


class ServedConsole:
    """A console, its server, and what was ordered there; operators are called like their roles.

    `carry` publishes what a server would on an order, and says what came of it; None for the fleet's own answers.
    `look_s` is the pause between two looks for changes.
    """

    def __init__(
        self,
        folder: Path,
        fleet: ConsoleFleet,
        carry: Callable[[Order], Carried] | None = None,
        look_s: float = POLL_INTERVAL_S,
    ) -> None:
        self.fleet = fleet
        self.orders: list[Order] = []
        self._carry = carry or (lambda order: (list(fleet.answer(order)), {}, f"{order.kind}: a trial"))
        self.writer = StatusWriter(folder / STATUS_FILE)
        fleet.publish(self.writer)
        self._look_s = look_s
        self._database = ConsoleDatabase(folder / "console.db")
        self._queue = OrderQueue(self._database)
        # Of a clock that stands: else, in a slow test, the server seems to be silent.
        view = FleetView(folder / STATUS_FILE, clock=lambda: 0.0)
        # Quick hashes: what is shown here is no secret.
        self.console = make_console(view, self._database, hasher=PasswordHasher(1, 8, 1))
        for role in ROLES:
            self.console.accounts.add(role, role, PASSWORD)
        config = uvicorn.Config(make_app(self.console), "127.0.0.1", 0, log_level="critical", lifespan="off")
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="console", daemon=True)

    def __enter__(self) -> ServedConsole:
        """Begin."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the console did not start")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._server.should_exit = True
        self._thread.join(10)
        self._database.close()

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    def write(self, *records: StatusRecord, **options: Any) -> None:
        """Publish records, as a server does."""
        write(self.writer, *records, **options)

    def _serve(self) -> None:
        async def serve() -> None:
            tasks = [
                asyncio.create_task(
                    send_changes(self.console.streams, self.console.view, self.console.audit, self._look_s)
                ),
                asyncio.create_task(self._answer()),
            ]
            await self._server.serve()
            for task in tasks:
                task.cancel()

        asyncio.run(serve())

    async def _answer(self) -> None:
        """Take orders and answer them."""
        while True:
            await asyncio.sleep(0.02)
            for order in self._queue.take(20):
                self.orders.append(order)
                records, rows, text = self._carry(order)
                self.write(*records, rows=rows)
                self._queue.answer(OrderAnswer(order.number, True, text))
            self._queue.flush()
