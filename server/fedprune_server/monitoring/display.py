"""Shows a running job to people: as a live table on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from fedprune.coordination import Phase
from fedprune.core.metrics import ACCURACY, METRICS, primary_metric
from fedprune.core.text import quantity, round_text
from fedprune.output.log_lines import OneLineFormatter
from fedprune.output.tables import ATTENTION, BAD, BUSY, GOOD, Cell, Column, fit_table
from fedprune_server.monitoring.job_watch import RoundTimes
from fedprune_server.monitoring.round_rows import round_scores
from fedprune_server.observation.observer import Observer, RoundEnded, ServerEnding, TurnEvent, handle_each
from fedprune_server.observation.snapshot import DeviceSnapshot, JobSnapshot

log = logging.getLogger("fedprune.server")

# A terminal over SSH takes a while for a table of a hundred rows; drawing it in every turn would slow the loop.
REFRESH_INTERVAL_S = 0.5

# Columns of a terminal that has room for profiles' full names.
_MIN_FULL_WIDTH = 120

_COLUMNS = (
    Column("device", min_width=10),
    Column("profile", drop_order=2),
    Column("density", is_right_aligned=True),
    Column("parameters", is_right_aligned=True, drop_order=4),
    Column("MB down", is_right_aligned=True, drop_order=1),
    Column("MB up", is_right_aligned=True, drop_order=1),
    Column("seconds", is_right_aligned=True, drop_order=3),
    Column("accuracy", is_right_aligned=True),
    Column("state", min_width=16),
)

# Styles of states by their first word; every other state is work in progress. The rest of a state's text varies.
_STATE_STYLES = {
    "ready": GOOD, "aggregated": GOOD, "refused": BAD, "late": ATTENTION, "lost": ATTENTION, "gone": ATTENTION,
    "offline": ATTENTION, "excluded": ATTENTION, "unknown": ATTENTION,
}  # fmt: skip


class RoundLines:
    """Logs one line per round, devices at debug level. If the server has several jobs, each line begins with its
    job's name."""

    def __init__(self) -> None:
        self._times: dict[str, RoundTimes] = {}

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        handle_each(events, lambda event: self._log(event.payload, event.happened_at, snapshot))

    def _log(self, event: object, now: float, snapshot: JobSnapshot) -> None:
        if not isinstance(event, RoundEnded):
            return
        summary = event.summary
        times = self._times.setdefault(snapshot.name, RoundTimes())
        times.note_end(summary["round"], now)
        job = f"{snapshot.name}: " if snapshot.fleet.has_several_jobs else ""
        log.info("%s%s%s", job, round_line(summary, snapshot), _time_left(times, summary["round"], snapshot))
        if log.isEnabledFor(logging.DEBUG):  # reading devices costs time for every device
            for device in snapshot.devices.values():
                log.debug("  %s", device_line(device))


class LiveTable:
    """A table that is redrawn in place; log lines scroll by above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream or sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._log_redirection = ExitStack()
        self._log_redirection.enter_context(log_above(self._console))
        self._live.start()
        self._drawn_at = -REFRESH_INTERVAL_S
        self._lines = RoundLines()

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        """Print a line per round above the table, and draw the table at most twice a second."""
        self._lines.observe(snapshot, events)
        is_round_over = any(isinstance(event.payload, RoundEnded) for event in events)
        now = time.monotonic()
        if is_round_over or now - self._drawn_at >= REFRESH_INTERVAL_S:
            self._drawn_at = now
            self._draw(snapshot)
        if any(isinstance(event.payload, ServerEnding) for event in events):
            self._live.stop()
            self._log_redirection.close()

    def _draw(self, snapshot: JobSnapshot) -> None:
        from rich.text import Text

        rows: list[Sequence[Cell]] = []
        for row in snapshot.devices.values():
            device, profile, *figures, state = device_cells(row)
            if self._console.width < _MIN_FULL_WIDTH:
                profile = profile.removeprefix("raspberry-")
            rows.append((device, profile, *figures, (state, state_style(state))))
        table, _ = fit_table(_COLUMNS, rows, self._console.width)
        table.title, table.title_justify = Text(job_title(snapshot), "bold"), "left"
        self._live.update(table, refresh=True)


class _LinesAboveTable(logging.Handler):
    """Prints log lines above a live table."""

    def __init__(self, console: Any) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(OneLineFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else None
        try:
            self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)
        except Exception:  # noqa: BLE001 - as every handler does: a line that can't be shown ends nothing
            self.handleError(record)


def _time_left(times: RoundTimes, number: int, snapshot: JobSnapshot) -> str:
    """The end of a round's line; empty while no usual time is known, after the last round, and in a pause."""
    rounds, usual_s = snapshot.rounds, times.usual_s()
    if usual_s is None or number >= rounds or snapshot.is_paused:
        return ""
    return f", about {duration_text((rounds - number) * usual_s)} left"


def duration_text(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:  # 80 minutes are "80 min": rounded to hours they would be 25 % off
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


@contextmanager
def log_above(console: Any) -> Iterator[None]:
    """Print fedprune's log lines on a console, above what is drawn there in place."""
    logger = logging.getLogger("fedprune")
    former = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [_LinesAboveTable(console)], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = former


def make_display(stream: TextIO | None = None) -> Observer:
    """A live table on a terminal that can draw in place, lines elsewhere."""
    stream = stream or sys.stdout
    return LiveTable(stream) if stream.isatty() and os.environ.get("TERM") != "dumb" else RoundLines()


def job_title(snapshot: JobSnapshot) -> str:
    texts = [f"{snapshot.name}: round {round_text(snapshot.round, snapshot.rounds)}", snapshot.phase.value]
    if (score := primary_metric(snapshot.metrics)) is not None:
        texts.append(f"global {score[0].titled_value(score[1])}")
    if snapshot.phase is Phase.TRAINING and snapshot.closes_at:
        texts.append(f"deadline in {max(0, round(snapshot.closes_at - snapshot.now))} s")
    if not snapshot.fleet.broker_connected:
        texts.append("no connection to the broker")
    return ", ".join(texts)


def state_style(state: str) -> str:
    return ATTENTION if "two boards" in state else _STATE_STYLES.get(state.partition(" ")[0].rstrip(":"), BUSY)


def device_cells(row: DeviceSnapshot) -> tuple[str, ...]:
    """The texts of a device's row; `-` where nothing is known."""
    metric, value = primary_metric(row.metrics) or (None, 0.0)
    return (
        row.name,
        row.profile,
        "-" if row.density is None else f"{row.density:.3g}",
        f"{row.parameters:,}" if row.parameters else "-",
        _megabytes(row.bytes_down),
        _megabytes(row.bytes_up),
        "-" if row.seconds is None else f"{row.seconds:.1f}",
        "-" if metric is None else metric.value_text(value) if metric is ACCURACY else metric.titled_value(value),
        row.activity,
    )


def device_line(row: DeviceSnapshot) -> str:
    device, profile, density, parameters, down, up, seconds, _, state = device_cells(row)
    score = primary_metric(row.metrics)
    return (
        f"{device} ({profile}): density {density}, {parameters} parameters, {down} MB down, {up} MB up, "
        f"{seconds} s, {'accuracy -' if score is None else score[0].titled_value(score[1])}, {state}"
    )


def round_line(summary: Mapping[str, Any], snapshot: JobSnapshot) -> str:
    """A finished round as one line of a log, with the payload bytes of all devices so far."""
    devices = summary["devices"]
    counted_devices = sum(d["progress"] == "folded" for d in devices.values())
    texts = [f"{counted_devices} of {quantity(len(devices), 'device')} counted"]
    texts += [*metric_texts(summary["metrics"]), *board_texts(summary, snapshot.judged_by)]
    texts.append(f"{_megabytes(snapshot.bytes_down)} MB down and {_megabytes(snapshot.bytes_up)} MB up so far")
    return f"round {round_text(summary['round'], snapshot.rounds)}: {', '.join(texts)}, model {summary['model'][:12]}"


def metric_texts(metrics: Mapping[str, float]) -> list[str]:
    """Measurements of a global model, for people."""
    texts = [METRICS[k].titled_value(v) for k, v in sorted(metrics.items()) if k in METRICS]
    return texts + [f"{k} {v:.4g}" for k, v in sorted(metrics.items()) if k not in METRICS and k != "samples"]


def board_texts(summary: Mapping[str, Any], judge: str) -> list[str]:
    """The boards' mean scores in a finished round, as texts; empty if no board measured this metric."""
    scores = round_scores(summary, judge)
    if math.isnan(scores.received):
        return []
    metric = METRICS[judge]
    received, trained = metric.value_text(scores.received), metric.value_text(scores.trained)
    return [f"local {metric.title} {received} as received and {trained} as trained"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
