"""Where many runs stand, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedprune_server.runs import Standing


class Watching:
    """Bars on standard error: one for all runs, and one for each that is under way."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._all = self._bars.add_task("runs", total=None, note="")
        self._own: dict[str, TaskID] = {}
        self._before: float | None = None

    def __enter__(self) -> Watching:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, standings: Sequence[Standing]) -> None:
        """Show where all runs stand."""
        over = sum(s.state in ("done", "failed") for s in standings)
        if self._before is None:  # what an earlier start has done tells nothing about what is left
            self._before = float(over)
            self._bars.reset(self._all, total=len(standings), completed=int(over))
        done = over + sum(s.share for s in standings if s.state == "running")
        failed = sum(s.state == "failed" for s in standings)
        note = f"{over} of {len(standings)}" + (f", {failed} failed" if failed else "")
        self._bars.update(self._all, completed=done, note=note)
        for standing in standings:
            task = self._own.get(standing.name)
            if standing.state == "running":
                if task is None:
                    task = self._own[standing.name] = self._bars.add_task(standing.name, total=1.0, note="")
                self._bars.update(task, completed=standing.share, note=standing.note)
            elif task is not None:
                self._bars.remove_task(self._own.pop(standing.name))
