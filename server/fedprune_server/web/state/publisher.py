"""What a running server tells its console, and what it does on operators' orders.

It is called at every turn of the server's loop and does something twice a second: it tells what has changed, for a few
milliseconds; the rest waits for the next time. Nobody looks through a fleet in which nothing has happened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from fedprune.core.errors import FedpruneError, ProtocolError, reason
from fedprune.core.text import one_line
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.observer import Onlooker
from fedprune_server.monitoring.view import JobView
from fedprune_server.web.auth.roles import LOOKS
from fedprune_server.web.process import Child
from fedprune_server.web.state import rows
from fedprune_server.web.state.admin_executor import KINDS, Clerk
from fedprune_server.web.state.board_logs import BoardTold
from fedprune_server.web.state.details import coverage_news, details
from fedprune_server.web.state.device_messages import Devices
from fedprune_server.web.state.log_messages import AlertNews
from fedprune_server.web.state.log_tap import LogTap
from fedprune_server.web.state.order_messages import EXPIRED, Answer, Order
from fedprune_server.web.state.poller import SWEEP_S, Lookout
from fedprune_server.web.state.publisher_messages import Beat, JobNews, Rollouts, RoundNews, Site, ToConsole
from fedprune_server.web.state.surroundings import Member

log = logging.getLogger("fedprune.server")

EVERY_S = 0.5
BUDGET_S = 0.02
"""What telling may take of the loop's time, each time."""

BEAT_S = 3.0
COMPLAIN_S = 60.0
ROUNDS_TOLD = 500
"""Finished rounds that a console that starts is told of, of each job."""

COVERED_S = 5.0
"""Coverage is made of all devices: whoever asks again so soon is told nothing new."""

_BATCH, _LINES, _ORDERS = 50, 50, 20


class Feed(Onlooker):
    """Tells a console of jobs.

    Args:
        views: The jobs, the first one first.
        site: The server as a whole, but for `connected`, as `publisher_messages.Site` has it.
        child: The console's process; see `ConsoleProcess`.
        clerk: Carries out orders that concern who is let in, and releases; None for a server without an identity.
        lookout: Looks at who is let in, and at releases; None for one that has nothing to look at.
        boards: What boards tell of their logs; None where nobody keeps that.
        allowed: Which orders are taken: `none`, `look` or `all`.
        lent: Which job has which device, of several jobs.
        here: Whether a device is there, whatever job has it; None where the only job knows.
        alerts: The open alerts; None for none.
        clock: Seconds since 1970.
        monotonic: Seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        views: Sequence[JobView],
        site: Mapping[str, Any],
        child: Child,
        *,
        clerk: Clerk | None = None,
        lookout: Lookout | None = None,
        boards: BoardTold | None = None,
        allowed: str = "all",
        lent: Callable[[str], str | None] = lambda device: None,
        here: Callable[[str], bool] | None = None,
        alerts: AlertBook | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._views = {v.job.name: v for v in views}
        self._site, self._child, self._clerk = dict(site), child, clerk
        self._lookout = Lookout() if lookout is None else lookout
        self._members, self._releases = self._lookout.members, self._lookout.releases
        self._boards, self._allowed = boards, allowed
        self._lent, self._here = lent, here
        self._clock, self._monotonic = clock, monotonic
        self.tap = LogTap()
        self._alerts = AlertBook() if alerts is None else alerts
        self._held: set[str] = set()
        self._next_at = self._beat_at = self._sweep_at = self._complain_at = 0.0
        self._of: dict[str, str] = {}
        self._seen: dict[str, tuple[int, float]] = {}
        self._pending: dict[str, None] = {}
        self._told: dict[str, int] = {}
        self._jobs: dict[str, JobNews] = {}
        self._connected: bool | None = None
        self._looked = self._whole = False
        self._news: list[ToConsole] = []
        self._later: list[Answer] = []
        self._before: dict[str, tuple[float | None, tuple[int, int]]] = {}
        self._rollouts: Rollouts | None = None
        self._under_way: tuple[dict[str, Any], ...] = ()
        self._covered: dict[str, float] = {}
        for name, view in self._views.items():
            history = view.state.history
            self._before[name] = (history[-1]["at"] if history else None, self._bytes(view))

    # What the server's loop calls.

    def noticed(self, devices: Collection[str]) -> None:
        """Tell of these devices soon."""
        for name in devices:
            self._pending.setdefault(name)

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        """Tell of a finished round."""
        self._safely(lambda: self._note_round(seen, summary))

    def _note_round(self, seen: JobView, summary: dict[str, Any]) -> None:
        job = seen.job.name
        view, (before, counted) = self._views[job], self._before[job]
        sums = self._bytes(view)
        moved = max(0, sums[0] - counted[0]), max(0, sums[1] - counted[1])
        self._before[job] = (summary["at"], sums)
        self._news.append(RoundNews(**rows.round_news(job, summary, before, moved)))

    def turned(self, seconds: Callable[[], float] | None, seen: JobView | None) -> None:
        """Tell what has changed, and take in orders; most of the time it isn't time for either.

        What fails here is said in the log, and costs the job nothing.
        """
        now = self._monotonic()
        if now < self._next_at:
            return
        self._next_at = now + EVERY_S
        self._safely(lambda: self._once(now))

    def _safely(self, act: Callable[[], None]) -> None:
        try:
            act()
        except FedpruneError as error:
            self._complain(self._monotonic(), str(error))
        except Exception as error:  # noqa: BLE001 - whoever only looks on must not end what is looked at
            self._complain(self._monotonic(), f"{type(error).__name__}: {reason(error)}")

    def _complain(self, now: float, text: str) -> None:
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_S
            log.error("the console isn't told all: %s", text)

    def _once(self, now: float) -> None:
        self._news += self._later
        self._later.clear()
        for order in islice(self._child.orders(now), _ORDERS):
            self._take(order)
        while self._clerk is not None and (answer := self._clerk.answer()) is not None:
            self._news.append(answer)
        if self._child.start(now):
            self._begin()
        if self._child.full:
            del self._news[:-1000]
            return
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            held = set(next(iter(self._views.values())).quarantine.all_held())
            self.noticed(held | self._held)
            self._held = held
        self._look()
        self._tell(now)

    def close(self) -> None:
        """End the console."""
        if self._clerk is not None:
            self._clerk.close()
        self._child.stop()

    # What is told.

    def _begin(self) -> None:
        """A console that has just started knows nothing."""
        self._told, self._jobs, self._covered, self._connected, self._rollouts = {}, {}, {}, None, None
        self._whole = False
        answers = [w for w in self._news if isinstance(w, Answer)]
        self._news = [self._site_news(), *answers, *map(_alert_news, self._alerts.open)]
        self._alerts.changes()
        for name, view in self._views.items():
            self._news.append(self._job_news(view))
            before: float | None = None
            for summary in view.state.history[-ROUNDS_TOLD:]:
                self._news.append(RoundNews(**rows.round_news(name, summary, before, None)))
                before = summary["at"]
            self.noticed(view.state.devices.keys())
            self.noticed(view.roster.names)
        if self._members is not None:
            self.noticed(self._members.names)
        if self._boards is not None:
            self._news += self._boards.latest()

    def _tell(self, now: float) -> None:
        until = now + BUDGET_S
        site = self._site_news()
        if site.connected != self._connected:
            self._news.insert(0, site)
        for view in self._views.values():
            self.noticed(view.roster.moved)
            job = self._job_news(view)
            if job != self._jobs.get(job.name):
                self._jobs[job.name] = job
                self._news.append(job)
        self._news += [
            *(_alert_news(c.alert, c.closed_at) for c in self._alerts.changes()),
            *self.tap.take(_LINES),
            *(self._boards.take(_LINES) if self._boards else ()),
        ]
        if not self._news and not self._pending and now >= self._beat_at:
            self._news.append(Beat(self._clock(), self._whole))
        if self._news:
            self._beat_at = now + BEAT_S
        told, self._news = self._news, []
        for word in told:
            self._say(word)
            if isinstance(word, Site):
                self._connected = word.connected
        while self._pending and not self._child.full:
            self._tell_devices()
            if self._monotonic() >= until:
                break
        if self._looked and not self._pending and not self._whole:  # said once, however busy the fleet is
            self._whole = True
            self._say(Beat(self._clock()))

    def _tell_devices(self) -> None:
        """The next few devices that have changed."""
        found, gone = [], []
        for name in [n for n, _ in zip(self._pending, range(_BATCH), strict=False)]:
            del self._pending[name]
            row = self._row(name)
            if row is None:
                if self._told.pop(name, None) is not None:
                    gone.append(name)
                continue
            mark = hash(repr(row))
            if self._told.get(name) != mark:
                self._told[name] = mark
                found.append(row)
        if found or gone:
            self._say_devices(found, gone)

    def _say_devices(self, found: list[dict[str, Any]], gone: list[str]) -> None:
        """Rows in as many lines as it takes: boards' own words are in them. A wrong one costs itself alone."""
        try:
            self._child.tell(Devices(tuple(found), tuple(gone)))
        except ProtocolError as error:
            if len(found) + bool(gone) < 2:
                self._complain(self._monotonic(), str(error))
                return
            half = max(1, len(found) // 2)
            self._say_devices(found[:half], [])
            self._say_devices(found[half:], gone)

    def _row(self, name: str) -> dict[str, Any] | None:
        member = Member("member") if self._members is None else self._members.status(name)
        job = self._lent(name) or self._of.get(name)
        if job is None or name not in self._views[job].state.devices:
            job = next((j for j, v in self._views.items() if name in v.state.devices), job)
        view = self._views[job] if job is not None else next(iter(self._views.values()))
        known = name in view.state.devices or name in view.roster.names
        if not known and member is None:
            return None
        if job is not None:
            self._of[name] = job
        contacts = [v.roster[name] for v in self._views.values()]
        up = sum(c.up for c in contacts)
        before = self._seen.get(name)
        if before is None or before[0] != up:
            # What a server that has just started has read from its disk says nothing of when that was.
            before = self._seen[name] = (up, 0.0 if before is None and not self._online(name, view) else self._clock())
        device = view.state.devices.get(name)
        return rows.device_row(
            view,
            name,
            job=job if device is not None else None,
            here=False if self._here is None else self._here(name),
            member=member or Member("revoked"),
            traffic=(sum(c.down for c in contacts), up),
            now=before[1] or None,
            update=None if self._releases is None else self._releases.standing(name),
        )

    def _online(self, name: str, view: JobView) -> bool:
        device = view.state.devices.get(name)
        return (device is not None and device.online) or (self._here is not None and self._here(name))

    def _site_news(self) -> Site:
        view = next(iter(self._views.values()))
        return Site(**self._site, jobs=tuple(self._views), connected=view.connected())

    def _job_news(self, view: JobView) -> JobNews:
        state = view.state
        counts = {k.value: n for k, n in state.tasks.counts.items() if n}
        return JobNews(
            name=view.job.name,
            round=state.round,
            rounds=view.job.rounds,
            phase=state.phase.value,
            deadline_at=state.deadline,
            paused=state.paused,
            metrics=dict(list(state.history[-1]["metrics"].items())[:64]) if state.history else {},
            strategy=view.job.strategy[:200],
            model_digest=state.model,
            weight=view.weight(),
            parts=counts,
            parameters=view.roster.whole,
        )

    def _look(self) -> None:
        """Hear what was found beside the jobs."""
        seen = self._lookout.seen()
        if seen is None:
            return
        self._looked = True
        self.noticed(seen.changed)
        if seen.rollouts is not None:
            self._under_way = seen.rollouts
        told = Rollouts(self._under_way, seen.releases)
        if self._releases is not None and told != self._rollouts:
            self._rollouts = told
            self._news.append(told)

    def _say(self, word: ToConsole) -> None:
        try:
            self._child.tell(word)
        except ProtocolError as error:  # longer than a line may be
            self._complain(self._monotonic(), str(error))

    @staticmethod
    def _bytes(view: JobView) -> tuple[int, int]:
        traffic = view.roster.traffic.values()
        return sum(down for down, _ in traffic), sum(up for _, up in traffic)

    # What is ordered.

    def _take(self, order: Order) -> None:
        """Carry an order out, or say why not; nothing that it says is believed but its form."""
        try:
            if order.expired(self._clock()):
                raise ProtocolError(EXPIRED)
            if self._allowed == "none" or (self._allowed == "look" and order.order not in LOOKS):
                raise ProtocolError("this server takes no such orders from its console")
            if order.order in KINDS:
                if self._clerk is None:
                    raise ProtocolError("this server has no identity, so it lets everybody in and has no releases")
                self._clerk.give(order)
                return
            text = self._carry_out(order)
        except FedpruneError as error:
            self._news.append(Answer(order.number, False, one_line(str(error), 1500)))
            return
        # What changes a job is saved as the next turn ends: before that nobody is told that it is done.
        answers = self._later if order.order in ("pause", "resume") else self._news
        answers.append(Answer(order.number, True, text))

    def _carry_out(self, order: Order) -> str:
        if order.order in ("pause", "resume", "coverage"):
            view = self._views.get(order.job or "")
            if view is None:
                raise ProtocolError("no such job", expected=", ".join(self._views), got=order.job)
            if order.order == "coverage":
                self._cover(view)
                return "coverage"
            view.pause(order.order == "pause")
            return f"job {order.job} {'is paused' if order.order == 'pause' else 'goes on'}"
        name = order.device or ""
        job = self._lent(name) or self._of.get(name)
        view = self._views[job] if job is not None else next(iter(self._views.values()))
        if name not in view.state.devices and name not in view.roster.names:
            raise ProtocolError(f"no such device takes part: {name}")
        if order.order == "look":
            self._news.append(details(view, name))
            if self._boards is not None:
                self._news.append(self._boards.of(name))
            return name
        if not view.quarantine.release(name):
            raise ProtocolError(f"{name} is not in quarantine")
        self.noticed([name])
        return f"{name} is listened to again"

    def _cover(self, view: JobView) -> None:
        now = self._monotonic()
        if now - self._covered.get(view.job.name, -COVERED_S) >= COVERED_S:
            self._covered[view.job.name] = now
            self._news += coverage_news(view)


def _alert_news(alert: Alert, closed_at: float | None = None) -> AlertNews:
    """An alert as the console shows it."""
    text = one_line(f"{alert.what}. To do: {alert.todo}", 1000)
    return AlertNews(
        f"{alert.key[:100]}@{alert.since:.0f}", alert.since, alert.kind, alert.severity, alert.device, alert.job,
        text, closed_at,
    )  # fmt: skip
