"""Display of a running job for people: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from fedprune.core.metrics import ACCURACY, METRICS, leading
from fedprune.core.text import quantity, some
from fedprune.jobs.job import Job
from fedprune.output.log_lines import OneLine
from fedprune.output.tables import ATTENTION, BAD, BUSY, GOOD, Cell, Column, fitted
from fedprune_server.devices.job_snapshot import DeviceRow, JobSnapshot
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.round_rows import round_scores
from fedprune_server.monitoring.round_times import RoundTimes
from fedprune_server.monitoring.view import JobView

log = logging.getLogger("fedprune.server")

REFRESH_S = 0.5

_WIDE = 120
"""Columns of a terminal that has room for profiles' whole names."""


_COLUMNS = (
    Column("device", wrap=10),
    Column("profile", drop=2),
    Column("density", right=True),
    Column("parameters", right=True, drop=4),
    Column("MB down", right=True, drop=1),
    Column("MB up", right=True, drop=1),
    Column("seconds", right=True, drop=3),
    Column("accuracy", right=True),
    Column("state", wrap=16),
)

_STATES = {
    "ready": GOOD, "aggregated": GOOD, "refused": BAD, "late": ATTENTION, "lost": ATTENTION, "gone": ATTENTION,
    "offline": ATTENTION, "excluded": ATTENTION, "unknown": ATTENTION,
}  # fmt: skip
"""Styles of states by their first word; all others are work that is being done."""


class Lines(Observer):
    """One line per round, devices at debug level, for logs. Lines of one job `of_several` name it."""

    def __init__(self, of_several: bool = False) -> None:
        self._of_several = of_several
        self._times = RoundTimes()

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        job = f"{seen.job.name}: " if self._of_several else ""
        down, up = seen.registry.total
        line = round_line(summary, seen.job, down, up)
        self._times.note_end(summary["round"], now)
        log.info("%s%s%s", job, line, _time_left(self._times, summary["round"], seen))
        if log.isEnabledFor(logging.DEBUG):  # it takes a look at every device
            for row in seen.snapshot().rows:
                log.debug("  %s", row_line(row))


class LiveTable(Observer):
    """A table that is redrawn in place; log lines scroll by above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream or sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._logged = ExitStack()
        self._logged.enter_context(logged_above(self._console))
        self._live.start()
        self._drawn = -REFRESH_S
        self._times = RoundTimes()

    def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
        """Draw, at most twice a second."""
        now = time.monotonic()
        if now - self._drawn >= REFRESH_S:
            self._drawn = now
            self._draw(seen.snapshot())

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        """Print the round's line above the table and draw."""
        down, up = seen.registry.total
        self._times.note_end(summary["round"], now)
        line = round_line(summary, seen.job, down, up)
        log.info("%s%s", line, _time_left(self._times, summary["round"], seen))
        self._draw(seen.snapshot())

    def ended(self) -> None:
        """Leave the last table on the screen."""
        self._live.stop()
        self._logged.close()

    def _draw(self, snapshot: JobSnapshot) -> None:
        from rich.text import Text

        rows: list[Sequence[Cell]] = []
        for row in snapshot.rows:
            device, profile, *others, state = cells(row)
            if self._console.width < _WIDE:
                profile = profile.removeprefix("raspberry-")
            rows.append((device, profile, *others, (state, state_style(state))))
        table, _ = fitted(_COLUMNS, rows, self._console.width)
        table.title, table.title_justify = Text(title(snapshot), "bold"), "left"
        self._live.update(table, refresh=True)


class _Above(logging.Handler):
    """Prints log lines above a live table."""

    def __init__(self, console: Any) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(OneLine("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else None
        try:
            self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)
        except Exception:  # noqa: BLE001 - as every handler does: a line that can't be shown ends nothing
            self.handleError(record)


def _time_left(times: RoundTimes, number: int, seen: JobView) -> str:
    """Addition to a round's line; nothing before the usual time of a round is known, at the last one, and in a
    pause."""
    rounds, usual_s = seen.job.rounds, times.usual_s()
    if usual_s is None or number >= rounds or seen.state.paused:
        return ""
    return f", about {span((rounds - number) * usual_s)} left"


def span(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


@contextmanager
def logged_above(console: Any) -> Iterator[None]:
    """Print fedprune's log lines on a console, above what is drawn there in place."""
    logger = logging.getLogger("fedprune")
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [_Above(console)], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before


def make_display(stream: TextIO | None = None) -> Observer:
    """A live table on a terminal that can draw in place, lines elsewhere."""
    stream = stream or sys.stdout
    return LiveTable(stream) if stream.isatty() and os.environ.get("TERM") != "dumb" else Lines()


def title(snapshot: JobSnapshot) -> str:
    parts = [f"{snapshot.job}: round {snapshot.round} of {snapshot.rounds}", snapshot.phase]
    if (found := leading(snapshot.metrics)) is not None:
        parts.append(f"global {found[0].said(found[1])}")
    if snapshot.remaining_s is not None:
        parts.append(f"deadline in {max(0, round(snapshot.remaining_s))} s")
    if not snapshot.connected:
        parts.append("no connection to the broker")
    return ", ".join(parts)


def state_style(state: str) -> str:
    return ATTENTION if "two boards" in state else _STATES.get(state.partition(" ")[0].rstrip(":"), BUSY)


def cells(row: DeviceRow) -> tuple[str, ...]:
    """A row of the table, as texts; `-` where nothing is known."""
    found = leading(row.metrics)
    return (
        row.device,
        row.profile,
        "-" if row.density is None else f"{row.density:.3g}",
        f"{row.parameters:,}" if row.parameters else "-",
        _mb(row.bytes_down),
        _mb(row.bytes_up),
        "-" if row.seconds is None else f"{row.seconds:.1f}",
        "-" if found is None else found[0].shown(found[1]) if found[0] is ACCURACY else found[0].said(found[1]),
        row.state,
    )


def row_line(row: DeviceRow) -> str:
    device, profile, density, parameters, down, up, seconds, _, state = cells(row)
    found = leading(row.metrics)
    return (
        f"{device} ({profile}): density {density}, {parameters} parameters, {down} MB down, {up} MB up, "
        f"{seconds} s, {'accuracy -' if found is None else found[0].said(found[1])}, {state}"
    )


def round_line(summary: Mapping[str, Any], job: Job, bytes_down: int, bytes_up: int) -> str:
    """A finished round as one line of a log, with the payload bytes of all devices so far."""
    devices = summary["devices"]
    counted = sum(d["progress"] == "folded" for d in devices.values())
    parts = [f"{counted} of {quantity(len(devices), 'device')} counted"]
    parts += [*metric_texts(summary["metrics"]), *board_texts(summary, job.recipe.judged_by)]
    parts.append(f"{_mb(bytes_down)} MB down and {_mb(bytes_up)} MB up so far")
    return f"round {summary['round']} of {job.rounds}: {', '.join(parts)}, model {summary['model'][:12]}"


def secure_sum_line(report: Mapping[str, Any]) -> str:
    """How the sum of a cohort went (`fedprune.coordination.events.Unmasked`), as one line."""
    lost = "".join(f"; lost at the step of {step}: {some(names)}" for step, names in report["lost"].items())
    return f"secure sum of {quantity(report['boards'], 'board')}: {report['summed']} summed{lost}"


def metric_texts(metrics: Mapping[str, float]) -> list[str]:
    """Measurements of a global model, for people."""
    known = [METRICS[k].said(v) for k, v in sorted(metrics.items()) if k in METRICS]
    return [*known, *(f"{k} {v:.4g}" for k, v in sorted(metrics.items()) if k not in METRICS and k != "samples")]


def board_texts(summary: Mapping[str, Any], judge: str) -> list[str]:
    """What boards measured in a finished round by a metric, for people; nothing where they did not."""
    scores = round_scores(summary, judge)
    if math.isnan(scores.received):
        return []
    metric = METRICS[judge]
    received, trained = metric.shown(scores.received), metric.shown(scores.trained)
    return [f"local {metric.title} {received} as received and {trained} as trained"]


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
