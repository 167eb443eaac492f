"""What a console knows: built from the server's lines, asked by pages and by programs.

All of it fits in memory, and all of it is bounded: whoever keeps a console open for a year sees the latest rounds,
lines and alerts. It is read and written by one thread.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedprune_server.web.state.device_messages import Coverage, DeviceDetails, Devices
from fedprune_server.web.state.log_messages import AlertNews, BoardLog, LogLine
from fedprune_server.web.state.order_messages import Answer
from fedprune_server.web.state.publisher_messages import Beat, Begin, JobNews, Rollouts, RoundNews, Site, ToConsole
from fedprune_server.web.views.paging import Page, paged

KEPT_ROUNDS = 2000
"""Rounds that are kept of each job."""

KEPT_LINES = 5000
KEPT_ALERTS = 1000
KEPT_DETAILS = 50
KEPT_ANSWERS = 500

SILENT_S = 15.0
"""A server that has said nothing for so long is taken for stuck: it says something every few seconds."""

SORTABLE = (
    "name", "job", "online", "state", "profile", "slot", "release", "density", "parameters", "samples", "seen_at",
    "temperature_c", "bytes_down", "bytes_up", "seconds", "accuracy", "loss", "staleness", "status",
)  # fmt: skip

Row = dict[str, Any]


@dataclass
class Known:
    """What is known of one job.

    Attributes:
        job: As it stands.
        rounds: Its latest rounds, oldest first.
        coverage: The round of the coverage and its groups; None until somebody asked.
    """

    job: Row | None = None
    rounds: deque[Row] = field(default_factory=lambda: deque(maxlen=KEPT_ROUNDS))
    coverage: Row | None = None


class Model:
    """What the server has told.

    Args:
        orders: Which orders the server takes: `none`, `look` or `all`.
        clock: Seconds since 1970.

    Attributes:
        site: The server, as JSON; None before it said anything.
        whole: Whether it has told of all devices that it knew when it began to tell.
        rollouts: All rollouts that it told of, the latest first.
        releases: Names of releases that an order may begin.
    """

    def __init__(self, orders: str = "all", clock: Callable[[], float] = time.time) -> None:
        self.orders = orders
        self._clock = clock
        self._heard_at = clock()
        self._listeners: list[Callable[[str, Any], None]] = []
        self._begin()

    def _begin(self) -> None:
        """Forget everything: another server has started, or the same one anew."""
        self.site: Row | None = None
        self.whole = False
        self.rollouts: list[Row] = []
        self.releases: list[str] = []
        self._jobs: dict[str, Known] = {}
        self._devices: dict[str, Row] = {}
        self._counts: dict[str, Counter[Any]] = {k: Counter() for k in ("state", "profile", "job", "status", "online")}
        self._details: dict[str, Row] = {}
        self._told: dict[str, Row] = {}
        self._alerts: dict[str, Row] = {}
        self._lines: deque[Row] = deque(maxlen=KEPT_LINES)
        self._answers: dict[int, Row] = {}
        self._partial: dict[str, Row] = {}

    def listen(self, told: Callable[[str, Any], None]) -> Callable[[], None]:
        """Let somebody hear what changes: its kind and, of devices, their names, of all else the row.

        Returns:
            Ends it.
        """
        self._listeners.append(told)
        return lambda: self._listeners.remove(told)

    def hear(self, word: ToConsole) -> None:
        """Take in what the server says."""
        self._heard_at = self._clock()
        match word:
            case Begin():
                return
            case Beat():
                self.whole = self.whole or (word.whole and self.site is not None)
            case Site():
                if self.site is None or self.site["started_at"] != word.started_at:
                    self._begin()
                self.site = _row(word)
                self._tell("site", self.site)
            case JobNews():
                row = self._job(word.name).job = _row(word)
                self._tell("job", row)
            case RoundNews():
                row = _row(word)
                rounds = self._job(word.job).rounds
                while rounds and rounds[-1]["round"] >= word.round:  # told again, after the console was started anew
                    rounds.pop()
                rounds.append(row)
                self._tell("round", row)
            case Devices():
                self._update(word.rows, word.gone)
                self._tell("devices", [*(r["name"] for r in word.rows), *word.gone])
            case DeviceDetails():
                self._details.pop(word.name, None)
                self._details[word.name] = {**_row(word), "at": self._heard_at}
                _trim(self._details, KEPT_DETAILS)
                self._tell("device", {"name": word.name})
            case Coverage():
                self._cover(word)
            case Rollouts():
                self.rollouts, self.releases = [dict(r) for r in word.rows], list(word.releases)
                self._tell("rollouts", self.rollouts)
            case AlertNews():
                row = self._alerts[word.id] = _row(word)
                self._trim_alerts()
                self._tell("alert", row)
            case LogLine():
                row = _row(word)
                self._lines.append(row)
                self._tell("log", row)
            case BoardLog():
                self._told.pop(word.name, None)
                self._told[word.name] = _row(word)
                _trim(self._told, KEPT_DETAILS)
                self._tell("device", {"name": word.name})
            case Answer():
                self.answered(word)

    def answered(self, word: Answer) -> None:
        """Take in what came of an order, whoever says it."""
        row = self._answers[word.order] = _row(word)
        _trim(self._answers, KEPT_ANSWERS)
        self._tell("answer", row)

    # What there is to see.

    @property
    def silent_s(self) -> float:
        """For how long the server has said nothing."""
        return max(0.0, self._clock() - self._heard_at)

    @property
    def ready(self) -> bool:
        """Whether the server has told something, and still does."""
        return self.site is not None and self.silent_s < SILENT_S

    @property
    def jobs(self) -> list[Row]:
        """All jobs as they stand, in the server's order."""
        order = self.job_names + sorted(self._jobs)
        return [row for name in dict.fromkeys(order) if (row := self._jobs.get(name, Known()).job) is not None]

    @property
    def job_names(self) -> list[str]:
        """Names of all jobs that the server has, told of or not."""
        return list((self.site or {}).get("jobs", ()))

    @property
    def device_names(self) -> Collection[str]:
        """Names of all devices that it told of."""
        return self._devices.keys()

    def job(self, name: str) -> Row | None:
        """A job as it stands."""
        return self._jobs.get(name, Known()).job

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many devices there are of each state, profile, job and status, and online."""
        found = {k: {str(v): n for v, n in c.items() if n} for k, c in self._counts.items() if k != "online"}
        online = self._counts["online"]
        found["online"] = {"yes": online[True], "no": online[False]}
        return found

    def device(self, name: str) -> Row | None:
        """A device's row."""
        return self._devices.get(name)

    def details(self, name: str) -> Row | None:
        """What an operator asked to see of a device last, with when that came as `at`."""
        return self._details.get(name)

    def board_log(self, name: str) -> Row | None:
        """What a board told of its own log and crashes, as it was with the details."""
        return self._told.get(name)

    def devices(
        self,
        *,
        page: int = 1,
        size: int = 50,
        sort: str = "name",
        q: str = "",
        only: Mapping[str, str] | None = None,
    ) -> Page:
        """Rows of devices.

        Args:
            page: From 1.
            size: Rows of a page.
            sort: One of `SORTABLE`, with `-` before it for the other direction; rows without a value come last.
            q: What the name holds, in any case.
            only: Values that columns have: `state`, `profile`, `job`, `status`, and `online` (`yes` or `no`).

        Raises:
            ValueError: There is no such column.
        """
        rows: Iterable[Row] = self._devices.values()
        for column, wanted in (only or {}).items():
            if column not in self._counts:
                raise ValueError(f"no filter {column!r}")
            value: Any = wanted == "yes" if column == "online" else wanted
            rows = [r for r in rows if r[column] == value]
        if q:
            part = q.casefold()
            rows = [r for r in rows if part in r["name"].casefold()]
        return paged(list(rows), page, size, sort, SORTABLE, tie="name")

    def rounds(self, job: str, *, page: int = 1, size: int = 50) -> Page:
        """A job's rounds, the latest first."""
        rows = list(reversed(self._jobs.get(job, Known()).rounds))
        return paged(rows, page, size)

    def coverage(self, job: str) -> Row | None:
        """A job's coverage: round, when it came, and groups; None until somebody asked for it."""
        return self._jobs.get(job, Known()).coverage

    def alerts(self, *, page: int = 1, size: int = 50, gone: bool = True) -> Page:
        """Alerts, the latest first.

        Args:
            page: From 1.
            size: Of a page.
            gone: Whether those that are over are among them.
        """
        rows = [r for r in self._alerts.values() if gone or r["gone_at"] is None]
        return paged(sorted(rows, key=lambda r: (-r["at"], r["id"])), page, size)

    def lines(self, *, page: int = 1, size: int = 100, q: str = "", only: Mapping[str, str] | None = None) -> Page:
        """Lines of logs, the latest first.

        Args:
            page: From 1.
            size: Of a page.
            q: What the text holds, in any case.
            only: Values of `level`, `device`, `job`.

        Raises:
            ValueError: There is no such column.
        """
        rows: Iterable[Row] = reversed(self._lines)
        for column, wanted in (only or {}).items():
            if column not in ("level", "device", "job"):
                raise ValueError(f"no filter {column!r}")
            rows = [r for r in rows if r[column] == wanted]
        if q:
            part = q.casefold()
            rows = [r for r in rows if part in r["text"].casefold()]
        return paged(list(rows), page, size)

    def answer(self, order: int) -> Row | None:
        """What came of an order; None while it isn't known, or not any more."""
        return self._answers.get(order)

    # Taking in.

    def _job(self, name: str) -> Known:
        return self._jobs.setdefault(name, Known())

    def _update(self, rows: Iterable[Row], gone: Iterable[str]) -> None:
        for row in rows:
            self._count(self._devices.get(row["name"]), -1)
            self._devices[row["name"]] = row
            self._count(row, 1)
        for name in gone:
            self._count(self._devices.pop(name, None), -1)
            self._details.pop(name, None)
            self._told.pop(name, None)

    def _count(self, row: Row | None, by: int) -> None:
        if row is not None:
            for column, counts in self._counts.items():
                counts[row[column]] += by
                if not counts[row[column]]:
                    del counts[row[column]]

    def _cover(self, word: Coverage) -> None:
        known = self._partial.get(word.job)
        if word.part == 0:
            known = {"job": word.job, "round": word.round, "groups": [], "next": 0}
        if known is None or known["next"] != word.part or known["round"] != word.round:
            self._partial.pop(word.job, None)  # a piece is missing
            return
        known["groups"].extend(word.groups)
        known["next"] += 1
        self._partial[word.job] = known
        if word.last:
            del self._partial[word.job]
            del known["next"]
            self._job(word.job).coverage = {**known, "at": self._heard_at}
            self._tell("coverage", {"job": word.job, "round": word.round})

    def _trim_alerts(self) -> None:
        """Let go of what is over first, then of the oldest."""
        over = len(self._alerts) - KEPT_ALERTS
        if over > 0:
            oldest = sorted(self._alerts.values(), key=lambda r: (r["gone_at"] is None, r["at"]))
            for row in oldest[:over]:
                del self._alerts[row["id"]]

    def _tell(self, kind: str, what: Any) -> None:
        for told in list(self._listeners):
            told(kind, what)


def _row(word: Any) -> Row:
    return asdict(word)


def _trim(rows: dict[Any, Row], limit: int) -> None:
    while len(rows) > limit:
        del rows[next(iter(rows))]
