"""What all benchmarks share: cases are run one by one, and each leaves a record of what was measured, where and when.

A benchmark is run as `python -m benchmarks.NAME` in the repository's root. Its records are in
`benchmarks/results/NAME.json`; people write its page, and `benchmarks.tables` fills the page's tables.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from fedprune import __version__

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]
Case = Mapping[str, Any]


def run_cases(
    name: str,
    title: str | None,
    cases: Iterable[Case],
    run: Callable[..., Record],
    *packages: str,
    options: argparse.Namespace | None = None,
    **derived: Callable[[list[Record]], Any],
) -> None:
    """Run all cases that have no record yet, and write each record at once: an interrupted benchmark continues.

    A case has the arguments of `run`, which returns the rest of its record, and what else its `made` is to say. `title`
    is the benchmark's docstring, whose first line `--help` shows; `packages` are distributions whose versions matter;
    `options` are those of a benchmark with more than `parser`'s; `derived` are functions that make more for the page of
    all records, in the order of the cases."""
    options, cases = options or parser(title).parse_args(), list(cases)
    wanted = [case for case in cases if all(str(case.get(k)) == v for k, v in options.only)]
    out = options.out or RESULTS / f"{name}.json"
    body: Record = json.loads(out.read_text()) if out.exists() else {}
    records, began = body.get("rows", []), time.monotonic()
    if options.anew:
        records = [record for record in records if all(record_of(case, [record]) is None for case in wanted)]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=len(wanted))
        for case in wanted:
            if record_of(case, records) is None:
                if time.monotonic() - began > 60 * options.minutes:
                    progress.console.print("not all cases are done; the same command continues")
                    break
                progress.update(bar, description=", ".join(f"{k} {v}" for k, v in case.items()))
                measured = run(**case)
                made = setting(*packages)
                records.append({**case, **measured, "made": made | measured.get("made", {})})
                body |= {"setting": made, "rows": records}
                write_results(out, body)
            progress.advance(bar)
    found = [record for case in cases if (record := record_of(case, records)) is not None]
    further = {name: make(found) for name, make in derived.items() if len(found) == len(cases)}
    save(out, {**body, "rows": found, **further})


def record_of(case: Case, records: Sequence[Record]) -> Record | None:
    """The record of a case; None where it was not run yet."""
    plain = json.loads(json.dumps(dict(case))).items()
    return next((record for record in records if plain <= {k: record.get(k) for k in case}.items()), None)


def parser(title: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=(title or "").partition("\n")[0])
    made.add_argument("--anew", action="store_true", help="forget earlier records of these cases")
    made.add_argument("--minutes", type=float, default=60.0, help="start no case after so many minutes (default: 60)")
    made.add_argument("--only", type=_pair, action="append", default=[], metavar="NAME=VALUE", help="only these cases")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the records there, and leave the results alone")
    return made


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def in_fresh_process(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of a module in a process that has run nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run, *args, **kwargs).result()


def setting(*packages: str) -> Record:
    """Machine, versions, date and code of a run; versions of further packages where they are installed."""
    return {
        "date": dt.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fedprune": __version__,
        "code": code_version(),
        **{name: package_version(name) for name in packages},
    }


@cache
def code_version() -> str:
    """The commit of this process's code."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def processor() -> str:
    """The processor's name, as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def package_version(name: str) -> str:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def write_results(out: Path, body: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(body, indent=1) + "\n")


def save(path: Path | str, body: Mapping[str, Any]) -> None:
    """Write results to a file, or to that of a benchmark's name, and fill the tables of their page."""
    from benchmarks import tables

    out = path if isinstance(path, Path) else RESULTS / f"{path}.json"
    write_results(out, body)
    if out.parent == RESULTS:
        tables.write(ROOT)
    print(json.dumps(body if len(json.dumps(body)) < 4000 else {"written": str(out)}), flush=True)


def peak_bytes(pid: int | str = "self", field: str = "VmHWM", file: str = "status") -> int:
    """Largest resident memory of a process so far, or what else a file of /proc says in KiB; 0 where it has ended."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    turns: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of several functions that run in turn, so that neighbours on the machine disturb all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + turns):
        for name, run in runs.items():
            began = clock()
            run()
            if turn >= warm_up:
                seconds[name].append(clock() - began)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
