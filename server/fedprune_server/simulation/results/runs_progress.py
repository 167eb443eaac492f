"""Progress of runs: bars on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedprune.coordination import Phase
from fedprune.core.text import first_few
from fedprune_server.monitoring.display import log_above
from fedprune_server.simulation.runs import RunStatus
from fedprune_server.simulation.simulation import Simulation

LINE_INTERVAL_S = 10.0  # seconds between two lines


def is_watched() -> bool:
    """Whether a person sees stderr: on a terminal, or below a notebook's cell."""
    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


class _Lines:
    """Periodic progress lines for pipes, files and simple terminals."""

    def __init__(self, console: Console) -> None:
        self._console, self._at = console, time.monotonic()

    def show(self, text: str) -> None:
        """Print a line, unless the last one is less than `LINE_INTERVAL_S` ago."""
        if not self._console.is_interactive and time.monotonic() - self._at >= LINE_INTERVAL_S:
            self._at = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Rounds per minute."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{60 * task.speed:.3g}/min")


class RunDisplay:
    """A progress bar for one run, with a spinner while it is prepared; log lines scroll above."""

    def __init__(self, title: str) -> None:
        # A bar in a notebook takes ipywidgets; lines don't.
        console = Console(stderr=True, force_jupyter=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._console, self._lines = console, _Lines(console)
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._rounds = self._bar.add_task(title, total=None, note="")
        self._title = title
        self._open = ExitStack()
        self._preparing = ExitStack()

    def __enter__(self) -> RunDisplay:
        self._open.enter_context(log_above(self._console))
        if self._console.is_terminal:
            self._preparing.enter_context(self._console.status(Text(f"preparing {self._title}")))
        return self

    def __exit__(self, *_: object) -> None:
        self._preparing.close()
        self._open.close()

    def begin(self, simulation: Simulation) -> None:
        """Start the bar. Rounds of an earlier start are excluded from the time estimate."""
        self._preparing.close()
        rounds, finished_rounds = simulation.job.rounds, len(simulation.state.history)
        if simulation.state.phase is Phase.FINISHED:
            rounds_text = f"all {finished_rounds}" if finished_rounds >= rounds else f"{finished_rounds} of {rounds}"
            early_end = "" if finished_rounds >= rounds else ", and the job ended there"
            self._say(f"{rounds_text} rounds were done before{early_end}; nothing is trained again")
            return
        if finished_rounds:
            self._say(f"continues after round {finished_rounds} of {rounds}")
        self._open.enter_context(self._bar)
        # `reset` starts the clock again: what an earlier start has done took no time of this start.
        self._bar.reset(self._rounds, total=rounds, completed=finished_rounds)

    def show(self, simulation: Simulation) -> None:
        state, rounds = simulation.state, simulation.job.rounds
        trained_share = sum(t.progress.is_over for t in state.tasks.values()) / max(1, len(state.tasks))
        note = simulation.score_note
        shown_rounds = min(rounds, len(state.history) + (trained_share if state.round > len(state.history) else 0))
        self._bar.update(self._rounds, completed=round(shown_rounds, 2), note=note)
        self._lines.show(f"{self._title}: {len(state.history)} of {rounds} rounds are done{note and ', '}{note}")

    def _say(self, text: str) -> None:
        self._console.print(f"{self._title}: {text}", markup=False, highlight=False, soft_wrap=True)


class SweepDisplay:
    """A progress bar for all runs, and one for each running one."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._lines = _Lines(console)
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._all = self._bars.add_task("runs", total=None, note="")
        self._bars_by_run: dict[str, TaskID] = {}
        self._finished_before: float | None = None

    def __enter__(self) -> SweepDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, statuses: Sequence[RunStatus]) -> None:
        finished_runs = sum(s.state in ("done", "failed") for s in statuses)
        if self._finished_before is None:  # runs of an earlier start are excluded from the time estimate
            self._finished_before = float(finished_runs)
            self._bars.reset(self._all, total=len(statuses), completed=int(finished_runs))
        finished_share = finished_runs + sum(s.share for s in statuses if s.state == "running")
        failed = sum(s.state == "failed" for s in statuses)
        note = f"{finished_runs} of {len(statuses)}" + (f", {failed} failed" if failed else "")
        self._bars.update(self._all, completed=finished_share, note=note)
        running = first_few([f"{s.name} {s.share:.0%}" for s in statuses if s.state == "running"])
        self._lines.show(f"{note} runs are over" + (f"; at work: {running}" if running else ""))
        for status in statuses:
            task = self._bars_by_run.get(status.name)
            if status.state == "running":
                if task is None:
                    task = self._bars_by_run[status.name] = self._bars.add_task(status.name, total=1.0, note="")
                self._bars.update(task, completed=status.share, note=status.note)
            elif task is not None:
                self._bars.remove_task(self._bars_by_run.pop(status.name))
