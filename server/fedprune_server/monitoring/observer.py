"""Observers of a running job. The server waits for none of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, ParamSpec

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune_server.monitoring.view import JobView

P = ParamSpec("P")


class Calls(Generic[P]):
    """A list of functions, called one after the other."""

    def __init__(self) -> None:
        self._all: list[Callable[P, object]] = []

    def __len__(self) -> int:
        return len(self._all)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for call in self._all:
            call(*args, **kwargs)

    def add(self, call: Callable[P, object]) -> None:
        self._all.append(call)


class Observer:
    """Observes a job. The server's loop calls every method that an observer implements, so all must be quick.

    Attributes:
        trace_id: What log lines are marked with; None for nothing.
    """

    trace_id: str | None = None

    def event(self, event: on.Event, now: float) -> None:
        """The coordinator has handled an event."""

    def command(self, command: do.Command, now: float) -> None:
        """A command of the coordinator is about to be carried out."""

    def noticed(self, devices: Collection[str]) -> None:
        """These devices have changed, and are about to be saved."""

    def saved(self, seconds: float) -> None:
        """A turn's events were saved within this time."""

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        """A round has finished."""

    def finished(self, seen: JobView) -> None:
        """The job is finished, or was when the server started."""

    def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
        """A turn of the loop is over; `seconds` tells how long it took, without waiting."""

    def waiting(self) -> None:
        """The loop waits for its database, or for a lock that another process holds: it lives, and turns later."""

    def ended(self) -> None:
        """The server ends."""


_CALLS = ("event", "command", "noticed", "saved", "round_over", "finished", "turned", "waiting", "ended")


class Observers:
    """The observers of a job. Each attribute calls the observers that implement the method of that name, in the order
    in which they joined.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._all: list[Observer] = []
        self.event: Calls[[on.Event, float]] = Calls()
        self.command: Calls[[do.Command, float]] = Calls()
        self.noticed: Calls[[Collection[str]]] = Calls()
        self.saved: Calls[[float]] = Calls()
        self.round_over: Calls[[dict[str, Any], float, JobView]] = Calls()
        self.finished: Calls[[JobView]] = Calls()
        self.turned: Calls[[Callable[[], float], JobView]] = Calls()
        self.waiting: Calls[[]] = Calls()
        self.ended: Calls[[]] = Calls()
        for observer in observers:
            self.join(observer)

    @property
    def trace_id(self) -> str | None:
        return next((o.trace_id for o in self._all if o.trace_id is not None), None)

    def join(self, observer: Observer) -> None:
        self._all.append(observer)
        for name in _CALLS:
            if getattr(type(observer), name) is not getattr(Observer, name):
                getattr(self, name).add(getattr(observer, name))

    def each_turn(self, action: Callable[[], object]) -> None:
        """Call `action` after each turn of the loop, and again and again while it waits within one."""
        self.turned.add(lambda seconds, seen: action())
        self.waiting.add(action)
