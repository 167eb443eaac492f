"""A console that is served on this machine, with a fleet that isn't there, for browsers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from argon2 import PasswordHasher

from fedprune_server.web.app import make_app
from fedprune_server.web.context import make_console
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.demo_fleet import TrialFleet
from fedprune_server.web.events import GATHER_S, Streams
from fedprune_server.web.state.model import Model
from fedprune_server.web.state.order_messages import Answer, Order
from fedprune_server.web.state.publisher_messages import ToConsole

PASSWORD = "correct horse battery"
ROLES = ("viewer", "operator", "admin")


class ServedConsole:
    """A console, its server, and what was ordered there; operators are called like their roles.

    Args:
        folder: For its database.
        fleet: What it shows.
        carry: Carries an order out, and says what a server would; None for the fleet's own answers.
        gather_s: For how long changes are gathered before browsers hear of them.
    """

    def __init__(
        self,
        folder: Path,
        fleet: TrialFleet,
        carry: Callable[[Order], Iterable[ToConsole]] | None = None,
        gather_s: float = GATHER_S,
    ) -> None:
        self.fleet = fleet
        self.model = Model()
        self.orders: list[Order] = []
        self._carry = carry or fleet.answer
        for word in fleet.begin():
            self.model.hear(word)
        self._database = ConsoleDatabase(folder / "console.db")
        # Quick hashes: what is shown here is no secret.
        self.console = make_console(self.model, self._database, self._ordered, hasher=PasswordHasher(1, 8, 1))
        self.console.streams = Streams(self.model, gather_s)
        for role in ROLES:
            self.console.accounts.add(role, role, PASSWORD)
        config = uvicorn.Config(make_app(self.console), "127.0.0.1", 0, log_level="critical", lifespan="off")
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
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

    def hear(self, words: Iterable[ToConsole]) -> None:
        """Let the console hear this, on its own thread, and wait until it has."""
        told, done = list(words), threading.Event()

        def tell() -> None:
            for word in told:
                self.model.hear(word)
            done.set()

        if self._loop is None:
            raise RuntimeError("the console is not served")
        self._loop.call_soon_threadsafe(tell)
        if not done.wait(10):
            raise TimeoutError("the console heard nothing")

    def _ordered(self, order: Order) -> None:
        self.orders.append(order)
        answers = list(self._carry(order))

        def tell() -> None:
            for word in answers:
                self.model.hear(word)

        # Not at once: a server answers later, too.
        asyncio.get_running_loop().call_later(0.02, tell)

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve()

        asyncio.run(serve())


def answered(order: Order, text: str, ok: bool = True) -> Any:
    """What a server says of an order when it is done with it."""
    return Answer(order.number, ok, text)
