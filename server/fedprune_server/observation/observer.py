"""Observers of running jobs, what they are shown, and the one rule that keeps them from disturbing a turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import FedpruneError, error_reason
from fedprune_server.observation.snapshot import JobSnapshot

log = logging.getLogger("fedprune.server")

# The share of the loop's time that one observer may take: with all of them the loop still has most of its time for
# boards.
MAX_LOOP_SHARE = 0.05

# The longest time without a call: unseen events are kept in memory until then, and alerts are late by as much.
MAX_DEFERRAL_S = 30.0

# An observer that fails at every turn must not fill the log.
_LOG_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class DevicesChanged:
    """These devices have changed, or their parts."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class TurnSaved:
    """A turn's events were saved within this time."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A round has finished, with its entry in the job's history, and the payload bytes to and from all devices by then,
    over all starts of the server. `unreached` are devices of the round that were sent no offer of it."""

    summary: Mapping[str, Any]
    bytes_down: int = 0
    bytes_up: int = 0
    unreached: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """A turn of the loop is over, and took these seconds, without waiting for messages."""

    seconds: float


@dataclass(frozen=True, slots=True)
class LoopBlocked:
    """The loop waits for its database, or for a lock that another process holds.

    The server lives, and goes on later. Mappings of a snapshot may need the database, too, so that no observer may read
    one now.
    """


@dataclass(frozen=True, slots=True)
class ServerEnding:
    """The server ends."""


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """Something that has happened to a job, with its time in seconds since 1970: an event that the coordinator has
    handled, a command that was carried out (a job ends with the command `Finish`), or a change of the loop."""

    happened_at: float
    payload: on.Event | do.Command | DevicesChanged | TurnSaved | RoundEnded | TurnEnded | LoopBlocked | ServerEnding


class Observer(Protocol):
    """Observes jobs. It decides nothing, and what it raises is logged."""

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Observe a job after a turn (one transaction of its coordinator), with its events since the last call.

        No event comes twice. So an event that can't be handled must not prevent the others (`handle_each`).
        """


def handle_each(events: Iterable[TurnEvent], handle: Callable[[TurnEvent], None]) -> None:
    """Handle every event, also those after one that fails; then raise what the first one raised."""
    failure: Exception | None = None
    for event in events:
        try:
            handle(event)
        except Exception as error:  # noqa: BLE001, PERF203 - it is raised below
            failure = failure or error
    if failure is not None:
        raise failure


# A job after a turn, and its events since the turn before.
JobTurn = tuple[JobSnapshot, Sequence[TurnEvent]]


@dataclass
class _Subscription:
    """An observer, which isn't called before `due_at` (monotonic clock), and by job the events that it hasn't seen
    yet."""

    observer: Observer
    due_at: float = 0.0
    unseen_events: dict[str, list[TurnEvent]] = field(default_factory=dict)
    next_log_at: float = 0.0


class Observers:
    """Shows turns to observers, so that none that fails or is slow ends a turn, or makes it much longer.

    What an observer raises is logged, once a minute at most. One that takes time is called less often, so that it has
    at most `MAX_LOOP_SHARE` of the loop's; it gets what it has missed at the next call.
    """

    def __init__(self, observers: Iterable[Observer] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._subscriptions = [_Subscription(observer) for observer in observers]
        self._clock = clock
        self._is_showing = False

    def show(self, jobs: Sequence[JobTurn], *, at_once: bool = False) -> None:
        """Show each job after a turn; `at_once` to all observers, however long they take: while the loop waits, and at
        its end."""
        if self._is_showing:
            return  # an observer itself waits for the database, which shows `LoopBlocked`
        self._is_showing = True
        try:
            for subscription in self._subscriptions:
                self._show_to(subscription, jobs, at_once=at_once)
        finally:
            self._is_showing = False

    def _show_to(self, subscription: _Subscription, jobs: Sequence[JobTurn], *, at_once: bool) -> None:
        started_at = self._clock()
        if started_at < subscription.due_at and not at_once:
            for snapshot, events in jobs:
                subscription.unseen_events.setdefault(snapshot.name, []).extend(events)
            return
        for snapshot, events in jobs:
            unseen_events = subscription.unseen_events.pop(snapshot.name, None)
            try:
                subscription.observer.observe(snapshot, [*unseen_events, *events] if unseen_events else events)
            except Exception as error:  # noqa: BLE001 - an observer must not end what it observes
                self._log_failure(subscription, error)
        now = self._clock()
        # A call of 10 ms is followed by 200 ms without one, which keeps the share at `MAX_LOOP_SHARE`.
        if not at_once:
            subscription.due_at = now + min((now - started_at) / MAX_LOOP_SHARE, MAX_DEFERRAL_S)

    def _log_failure(self, subscription: _Subscription, error: Exception) -> None:
        now = self._clock()
        if now >= subscription.next_log_at:
            subscription.next_log_at = now + _LOG_INTERVAL_S
            what = str(error) if isinstance(error, FedpruneError) else f"{type(error).__name__}: {error_reason(error)}"
            log.error("observer %s failed, and is called again: %s", type(subscription.observer).__name__, what)
