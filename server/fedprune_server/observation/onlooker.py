"""Who looks on while a job runs, and what they hear of. The daemon waits for none of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.job import Job
from fedprune_server.observation.facts import Facts
from fedprune_server.terminal.table import Display, Snapshot


class Seen(Protocol):
    """The job that is looked at. What is dear to put together is put together when somebody asks for it."""

    @property
    def job(self) -> Job:
        """The job."""
        ...

    def snapshot(self) -> Snapshot:
        """The job as people see it."""
        ...

    def facts(self) -> Facts:
        """The job as figures."""
        ...


class Onlooker:
    """Looks on, and says nothing. Every method is called by the daemon's loop, and must be quick.

    An onlooker has those of these methods that it wants to be called; `Onlookers` calls no others.

    Attributes:
        trace_id: What lines of the log are marked with; None for nothing.
    """

    trace_id: str | None = None

    def event(self, event: on.Event, now: float) -> None:
        """The coordinator was told of an event."""

    def command(self, command: do.Command, now: float) -> None:
        """The coordinator's command is about to be carried out."""

    def noticed(self, devices: Collection[str]) -> None:
        """Something of these devices has changed, and is about to be saved."""

    def saved(self, seconds: float) -> None:
        """The database took so long to save a turn's events."""

    def round_over(self, summary: dict[str, Any], now: float, seen: Seen) -> None:
        """A round has been finished."""

    def turned(self, seconds: float, seen: Seen) -> None:
        """A turn of the loop is over, which took so long beside waiting."""

    def ended(self) -> None:
        """The daemon ends."""


_CALLS = ("event", "command", "noticed", "saved", "round_over", "turned", "ended")


class Onlookers:
    """All who look on at a job: for each of an `Onlooker`'s methods those that are to be called, in order of joining.

    Args:
        onlookers: Who looks on from the beginning.
    """

    def __init__(self, onlookers: Iterable[Onlooker] = ()) -> None:
        self._all: list[Onlooker] = []
        self.event: list[Callable[[on.Event, float], None]] = []
        self.command: list[Callable[[do.Command, float], None]] = []
        self.noticed: list[Callable[[Collection[str]], None]] = []
        self.saved: list[Callable[[float], None]] = []
        self.round_over: list[Callable[[dict[str, Any], float, Seen], None]] = []
        self.turned: list[Callable[[float, Seen], None]] = []
        self.ended: list[Callable[[], None]] = []
        for onlooker in onlookers:
            self.join(onlooker)

    @property
    def trace_id(self) -> str | None:
        """The first that there is."""
        return next((o.trace_id for o in self._all if o.trace_id is not None), None)

    def join(self, onlooker: Onlooker) -> None:
        """Let somebody look on from now on."""
        self._all.append(onlooker)
        for name in _CALLS:
            if getattr(type(onlooker), name) is not getattr(Onlooker, name):
                getattr(self, name).append(getattr(onlooker, name))

    def each_turn(self, action: Callable[[], object]) -> None:
        """Call this, too, in every turn of the loop."""
        self.turned.append(lambda seconds, seen: action())


class Shown(Onlooker):
    """Shows a job to people.

    Args:
        display: Where.
    """

    def __init__(self, display: Display) -> None:
        self._display = display

    def round_over(self, summary: dict[str, Any], now: float, seen: Seen) -> None:
        """Show the round."""
        self._display.round_over(seen.snapshot(), summary)

    def turned(self, seconds: float, seen: Seen) -> None:
        """Show the present, if it is time to."""
        self._display.refresh(seen.snapshot)

    def ended(self) -> None:
        """Show no more."""
        self._display.close()
