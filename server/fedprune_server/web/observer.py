"""The console's part of the server's loop: publishes the status, takes orders, and watches the console's process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from fedprune.core.errors import FedpruneError
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.observation.observer import LoopBlocked, ServerEnding, TurnEvent
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.web.process import ConsoleProcess, ConsoleStart
from fedprune_server.web.state.order_handler import OrderHandler
from fedprune_server.web.state.publisher import StatusPublisher

log = logging.getLogger("fedprune.server")

# Pause between two turns of the console, in the server's loop: an operator waits half a second for an order's answer.
TURN_INTERVAL_S = 0.5


class ConsoleObserver:
    """Publishes the server's status, takes orders and keeps the console's process running, in the server's loop."""

    def __init__(
        self,
        publisher: StatusPublisher,
        orders: OrderHandler,
        process: ConsoleProcess | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._publisher, self._orders, self._process, self._monotonic = publisher, orders, process, monotonic
        self._next_at = 0.0

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self._publisher.note(snapshot, events)
        now = self._monotonic()
        if now < self._next_at:
            return
        self._next_at = now + TURN_INTERVAL_S
        try:
            if not any(isinstance(event.payload, (LoopBlocked, ServerEnding)) for event in events):
                if self._process is not None:
                    self._process.turn(now)
                self._orders.turn()  # not while the loop waits for its database, which orders need
        finally:
            self._publisher.publish()

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
        try:
            self._orders.close()  # the console's process doesn't write to its database any more
        except FedpruneError as error:
            log.error("answers to the console's last orders are lost: %s", error)


def console_start(config: ServerConfig, address: str, port: int) -> ConsoleStart:
    """What the console's process of a server reads at its start, with absolute paths."""
    return ConsoleStart(
        address=address,
        port=port,
        folder=str(config.state.resolve()),
        certificate=None if config.console_certificate is None else str(config.console_certificate.resolve()),
        key=None if config.console_key is None else str(config.console_key.resolve()),
        orders=config.console_orders,
        hosts=config.console_host_names,
        proxied=config.console_proxy,
        parent=os.getpid(),
    )
