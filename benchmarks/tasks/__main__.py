"""Tasks on real data: `fedprune` beside FedAvg, one width for all, HeteroFL, training alone, and torch on all data.

`python -m benchmarks.tasks` runs what has no result yet: each task, method and seed, each in a process of its own.
Results are in `benchmarks/results/tasks.json`, and fill the tables of `docs/tasks/README.md`.

A look changes runs, prints each of their rounds, and writes nothing: fewer rounds, or other settings, such as
`python -m benchmarks.tasks --only detection --seeds 0 --methods fedprune --changes
'{"options": {"densities": [0.5], "dropout": [], "mixup": 0}, "job": {"compression": "int8"}, "recipe": {"lr": 0.01}}'`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tasks import adapters
from benchmarks.tasks.pages import docs_pages
from benchmarks.tasks.runs import BUDGET, DEFAULT, METHODS, REFERENCE, TORCH, Changes, affordable_rounds, run
from benchmarks.tasks.tasks import TASKS
from fedprune.core.atomic_file import write_atomically

RESULTS, DOCS = Path("benchmarks/results/tasks.json"), Path("docs/tasks")


class Case(NamedTuple):
    """A run that is wanted."""

    task: str
    method: str
    seed: int


class Results:
    """The runs that there are, in a file that is written whenever one is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}

    def get(self, task: str, method: str, seed: int) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.body["runs"].get(task, {}).get(method, {}).get(str(seed))
        return found

    def add(self, case: Case, numbers: dict[str, Any]) -> None:
        self.body["runs"].setdefault(case.task, {}).setdefault(case.method, {})[str(case.seed)] = numbers
        text = json.dumps(self.body, indent=1, sort_keys=True)
        lines = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list is a line
        write_atomically(self.path, (lines + "\n").encode())

    def rounds(self, case: Case) -> int | None:
        """How many rounds a run has, 0 for its task's; None where that depends on runs that there aren't yet."""
        if case.method != BUDGET:
            return 0
        costs = [self.get(case.task, method, case.seed) for method in (REFERENCE, DEFAULT)]
        return None if None in costs else affordable_rounds(TASKS[case.task], *costs)


def run_all(
    cases: Iterable[Case],
    begin: Callable[[Case], tuple[Any, ...] | None],
    end: Callable[[Case, dict[str, Any]], None],
    workers: int,
) -> bool:
    """Run cases beside each other, each in a process of its own: `begin` gives a case's arguments, None while it can't
    begin; `end` takes its numbers. Returns whether all have ended well."""
    waiting, failed = list(cases), False
    running: dict[Future[dict[str, Any]], Case] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        while True:
            for case in list(waiting):
                if len(running) < workers and (arguments := begin(case)) is not None:
                    running[pool.submit(run, *arguments)] = case
                    waiting.remove(case)
            if not running:
                return not (failed or waiting)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                case = running.pop(future)
                try:
                    end(case, future.result())
                except Exception as error:  # noqa: BLE001 - whatever it is, the other runs are worth their time
                    print(*case, f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    failed = True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    methods = (TORCH, *METHODS)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, help="tasks (by default all)")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="rows (by default all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="SEED")
    parser.add_argument("--workers", type=int, default=1, help="how many runs at a time")
    parser.add_argument("--rounds", type=int, default=0, help="fewer or more rounds, for a look")
    parser.add_argument("--changes", type=json.loads, default={}, metavar="JSON", help="other settings, for a look")
    parser.add_argument("--picture", action="store_true", help="draw how far methods end from FedAvg")
    options = parser.parse_args()
    results = Results(RESULTS)
    if options.picture:
        from benchmarks.tasks import pictures

        print(pictures.draw(results.body["runs"]))
        return 0
    changes, look = Changes(**options.changes), bool(options.rounds or options.changes)
    # All of a seed before the next one, so that a run that is cut short has compared something.
    wanted = [Case(t, m, s) for s in options.seeds for m in options.methods for t in options.only]
    cases = [case for case in wanted if look or results.get(*case) is None]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes of the runs
    if any(case.task == "adapters" for case in cases):
        adapters.trained_base()  # once, not in each process

    def begin(case: Case) -> tuple[Any, ...] | None:
        rounds = options.rounds or results.rounds(case)
        return None if rounds is None else (*case, rounds, changes)

    def end(case: Case, numbers: dict[str, Any]) -> None:
        scores = [f"{score:.4g}" for score in numbers["curve"]]
        costs = {k: numbers[k][-1] for k in ("at", "bytes", "macs") if k in numbers}
        shown = scores if look else scores[-1:]
        print(*case, f"{numbers['cpu_s']} s", costs, numbers.get("served"), *shown, flush=True)
        if not look:
            results.add(case, numbers)

    well = run_all(cases, begin, end, options.workers)
    if not look:
        for path, text in docs_pages(results.body, DOCS).items():
            path.write_text(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
