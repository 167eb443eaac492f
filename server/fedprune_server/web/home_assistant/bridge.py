"""Publishes what the console shows to Home Assistant's broker, and gives the orders of its switches.

It is an operator like any other: it reads `status.db` as pages do, and an order of a switch goes through
`OrderService`, with its limits and its audit log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from fedprune.core.errors import FedpruneError, reason
from fedprune_server.web.auth.accounts import HOME_ASSISTANT, Operator
from fedprune_server.web.auth.sessions import Session
from fedprune_server.web.home_assistant.broker_client import Arrival
from fedprune_server.web.home_assistant.discovery import (
    BOARDS,
    JOBS,
    OFF,
    OFFLINE,
    ON,
    ONLINE,
    Discovery,
    Message,
    identifier,
)
from fedprune_server.web.state.orders import OrderService, RefusedError
from fedprune_server.web.state.status import FleetView

EVERY_S = 1.0
"""Pause between two turns."""

MOST = 1000
"""Boards that are shown: Home Assistant is made for a house."""

_BATCH = 50
_SWEEP_S = 60.0
_ORDERS = {ON: "pause", OFF: "resume"}


class Client(Protocol):
    """A bridge's interface of `BrokerClient`."""

    connections: int

    @property
    def address(self) -> str: ...

    @property
    def connected(self) -> bool: ...

    def publish(self, topic: str, payload: str) -> bool: ...

    def unsubscribe(self, topics: Iterable[str]) -> None: ...

    def arrivals(self) -> Iterable[Arrival]: ...


def will(discovery: Discovery) -> tuple[str, str]:
    """The will, which the broker publishes when the server is gone."""
    return discovery.status, OFFLINE


def topics(discovery: Discovery) -> list[str]:
    """The subscriptions of a bridge: the switches, and the messages that earlier starts published."""
    switches = [discovery.commands] if discovery.pause else []
    return [*switches, *_published(discovery)]


class HomeAssistantBridge:
    """Publishes jobs and boards, at most `_BATCH` boards a turn, and only what has changed.

    Args:
        view: A view of its own, because each change is reported to a view once.
    """

    def __init__(
        self,
        discovery: Discovery,
        view: FleetView,
        orders: OrderService,
        client: Client,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._discovery, self._view, self._orders, self._client = discovery, view, orders, client
        self._monotonic = monotonic
        self._connection = 0
        self._published: dict[str, str] = {}
        self._shown: dict[tuple[str, str], None] = {}
        self._left: dict[tuple[str, str], None] = {}
        self._pending: dict[str, None] = {}
        self._emptied: list[Message] = []
        self._sweep_at: float | None = None
        self._hears_states = False
        self._complaint = ""

    def turn(self) -> None:
        """Publish what has changed, and give the orders that have arrived; a failure is printed once and costs the
        console nothing."""
        try:
            self._turn()
            self._complaint = ""
        except RefusedError as error:
            self._complain(f"an order was refused: {error.text}")
        except FedpruneError as error:
            self._complain(str(error))
        except Exception as error:  # noqa: BLE001 - it must not end the console that it is a guest of
            self._complain(f"{type(error).__name__}: {reason(error)}")

    def _turn(self) -> None:
        for kind, what in self._view.changes():
            if kind == "devices":
                self._pending.update(dict.fromkeys(what))
        if not self._client.connected:
            return
        if self._client.connections != self._connection:
            self._connection = self._client.connections
            self._published.clear()
            self._pending.update(dict.fromkeys(self._view.device_names))
            self._sweep_at, self._hears_states = None, True
        for message in self._emptied:  # a turn late: an entity that is about to go would fail to read an empty state
            if message.topic not in self._published:
                self._client.publish(*message)
        self._emptied.clear()
        self._publish([Message(self._discovery.status, ONLINE if self._view.ready else OFFLINE)])
        for job in self._view.jobs:
            self._show(JOBS, job["name"], self._discovery.job(job))
        for name in list(islice(self._pending, _BATCH)):
            del self._pending[name]
            self._show_board(name)
        if not self._pending and self._view.ready and self._view.whole:
            self._sweep()
        for arrival in self._client.arrivals():
            self._hear(arrival)

    def _show_board(self, name: str) -> None:
        row = self._view.device(name)
        if row is not None and row["status"] == "member":
            shown = (BOARDS, identifier(name)) in self._shown
            if shown or sum(kind == BOARDS for kind, _ in self._shown) < MOST:
                self._show(BOARDS, name, self._discovery.board(row))
        elif (BOARDS, identifier(name)) in self._shown:
            self._remove(BOARDS, identifier(name))

    def _show(self, kind: str, name: str, messages: list[Message]) -> None:
        self._shown[kind, identifier(name)] = None
        self._publish(messages)

    def _sweep(self) -> None:
        """Remove, once a minute, what is not in the fleet any more, also if an earlier start has published it."""
        now = self._monotonic()
        if self._sweep_at is not None and now < self._sweep_at:
            return
        if self._sweep_at is not None and self._hears_states:  # what is retained has arrived since the first look
            self._client.unsubscribe(_published(self._discovery))
            self._hears_states = False
        self._sweep_at = now + (_SWEEP_S if self._sweep_at is not None else 5 * EVERY_S)
        known = {(BOARDS, identifier(name)) for name in self._view.device_names}
        known |= {(JOBS, identifier(name)) for name in self._view.job_names}
        for kind, name in (self._shown.keys() - known) | (self._left.keys() - self._shown.keys()):
            self._remove(kind, name)
        self._left.clear()

    def _remove(self, kind: str, name: str) -> None:
        *configs, state = self._discovery.removal(kind, name)
        for message in (*configs, state):
            self._published.pop(message.topic, None)
        for message in configs:
            self._client.publish(*message)
        self._emptied.append(state)
        self._shown.pop((kind, name), None)

    def _publish(self, messages: Iterable[Message]) -> None:
        for topic, payload in messages:
            if self._published.get(topic) != payload and self._client.publish(topic, payload):
                self._published[topic] = payload

    def _hear(self, arrival: Arrival) -> None:
        for kind in (BOARDS, JOBS):
            prefix = self._discovery.state(kind, "")
            name = arrival.topic.removeprefix(prefix)
            if name != arrival.topic and "/" not in name:
                if arrival.retained and arrival.payload and len(self._left) < 2 * MOST:
                    self._left[kind, name] = None
                return
        wanted = _ORDERS.get(arrival.payload.decode("ascii", "replace"))
        for job in self._view.job_names:
            # A retained order would be given again at each connection.
            if wanted and not arrival.retained and arrival.topic == self._discovery.command(identifier(job)):
                session = Session(Operator(HOME_ASSISTANT, "operator", 0.0, 0.0), "", "")
                self._orders.give(session, self._client.address, {"order": wanted, "job": job})

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            print(f"Home Assistant: {text}", file=sys.stderr, flush=True)


def _published(discovery: Discovery) -> list[str]:
    return [discovery.state(kind, "+") for kind in (BOARDS, JOBS)]
