"""Carries out a sweep's runs, for several commands: the folder, the progress, and the report of failures."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune.core.cli import signals_as_interrupts
from fedprune.core.errors import UsageError
from fedprune.output.tables import progress

if TYPE_CHECKING:
    from fedprune_server.simulation.results.record import Record
    from fedprune_server.simulation.runs import RunEnd, RunSpec


def output_folder(out: Path) -> Path:
    """The folder of `--out`. Raises `UsageError` if it is a file."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", expected="a folder, which is made if missing")
    return out


def run_variants(
    runs: Sequence[RunSpec], out: Path, *, workers: int, ray: bool = False
) -> tuple[dict[str, list[Record]], list[RunEnd]]:
    """Carry out a sweep's runs, with a bar for each. Returns the records of each variant, and the runs that failed.
    Raises `PlanError` before the first run if one can't begin."""
    from fedprune_server.simulation.results.comparison import read_runs
    from fedprune_server.simulation.results.runs_progress import SweepDisplay
    from fedprune_server.simulation.runs import do_runs
    from fedprune_server.simulation.sweep import check_plans, simulate_run, variant_name

    with progress("planning the boards of all runs"):
        check_plans(runs)
    with continuation_hint(out), SweepDisplay() as display:
        ended = do_runs(simulate_run, runs, out, workers=workers, ray=ray, watch=display.show)
    finished = [run for run, end in zip(runs, ended, strict=True) if not end.error]
    variants: dict[str, list[Record]] = {}
    for run, record in zip(finished, read_runs([out / run.name for run in finished]) if finished else (), strict=True):
        variants.setdefault(variant_name(run), []).append(record)
    return variants, [end for end in ended if end.error]


def failure_rows(failed: Sequence[RunEnd]) -> list[dict[str, str]]:
    return [{"run": run.name, "error": run.error.splitlines()[-1]} for run in failed]


def print_remarks(records: Sequence[Record], failed: Sequence[RunEnd], out: Path) -> None:
    """Print caveats about runs, and why some failed, on stderr."""
    from fedprune_server.simulation.results.coverage import left_out_boards, left_out_note
    from fedprune_server.simulation.results.report import remarks
    from fedprune_server.simulation.runs import FAILURE_FILE

    if note := left_out_note(left_out_boards(records)):
        print(note, file=sys.stderr)
    for record in records:
        for line in remarks(record):
            print(f"{record.title}: {line}", file=sys.stderr)
    for run in failed:
        details = out / run.name / FAILURE_FILE
        suffix = f" (details: {details})" if details.exists() else ""
        print(f"{run.name} failed: {run.error.splitlines()[-1]}{suffix}", file=sys.stderr)


@contextmanager
def continuation_hint(folder: Path) -> Iterator[None]:
    """Say after Ctrl-C or SIGTERM how to continue."""
    with signals_as_interrupts():
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"the same command continues with what {folder} holds") from interrupt
