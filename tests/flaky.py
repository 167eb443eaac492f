"""Run tests several times, in another random order each time, beside a load, and list what failed how often.

    make flaky RUNS=6 LOAD=6                   the push ring; every second run has the load beside it
    make flaky RUNS=20 ARGS="-m 'system and not soak'"      tests of real processes alone

or, with any options of pytest behind two dashes:

    python tests/flaky.py --runs 4 --load 6 -- tests/server/engine -n 2

Each run's seed is printed, and `--seed` repeats it: `--runs 1 --seed N`. Runs that are done are in
build/flaky.json, and `--resume` goes on after the last of them. The exit code is 1 if any test failed in any run.
"""

import argparse
import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "flaky.json"
REPORT = ROOT / "build" / "flaky.xml"

# One process that computes without end: as many of them as the load's number compete with the tests for the cores.
BUSY = "while True: sum(range(100_000))"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of the tests came to."""

    seed: int
    load: int
    passed: int
    failed: list[str]
    exit_code: int
    wall_s: float


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_tests(options: Sequence[str], seed: int, load: int) -> Run:
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", f"--junitxml={REPORT}", "-o", "junit_family=xunit1",
        "--random-order", "--random-order-bucket=module", f"--random-order-seed={seed}", *options,
    ]  # fmt: skip
    started = time.monotonic()
    with busy_processes(load):
        exit_code = subprocess.run(command, cwd=ROOT, check=False).returncode
    passed, failed = read_report(REPORT) if REPORT.exists() else (0, [])
    return Run(
        seed=seed,
        load=load,
        passed=passed,
        failed=failed,
        exit_code=exit_code,
        wall_s=round(time.monotonic() - started),
    )


def read_report(path: Path) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that didn't."""
    passed, failed = 0, list[str]()
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest has just written it
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('file')}::{case.get('name')}")
        elif case.find("skipped") is None:
            passed += 1
    return passed, sorted(set(failed))


def print_summary(runs: Sequence[Run], console: Console) -> None:
    overview = Table("run", "seed", "load", "passed", "failed", "minutes")
    for number, run in enumerate(runs, 1):
        minutes = f"{run.wall_s / 60:.1f}"
        overview.add_row(str(number), str(run.seed), str(run.load), str(run.passed), str(len(run.failed)), minutes)
    console.print(overview)
    times_failed = Counter(name for run in runs for name in run.failed)
    for name, times in times_failed.most_common():
        seeds = ", ".join(str(run.seed) for run in runs if name in run.failed)
        console.print(f"{times} of {len(runs)}  {name}  (seeds {seeds})", soft_wrap=True)
    broken = [run.seed for run in runs if run.exit_code and not run.failed]
    if broken:
        console.print(f"pytest itself ended with an error, with the seeds {broken}")
    if not times_failed and not broken:
        console.print(f"nothing failed in {len(runs)} runs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flaky", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=6, help="how often all tests run (default: 6)")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside every second run (default: none)")
    parser.add_argument("--seed", type=int, help="the first run's order; later runs count on from it")
    parser.add_argument("--resume", action="store_true", help="go on after the runs that build/flaky.json has")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="options of pytest")
    chosen = parser.parse_args(arguments)

    runs = [Run(**run) for run in json.loads(RESULTS.read_text())] if chosen.resume and RESULTS.exists() else []
    first_seed = secrets.randbelow(1_000_000) if chosen.seed is None else chosen.seed
    console = Console()
    for number in range(len(runs), chosen.runs):
        load = chosen.load if number % 2 else 0
        console.rule(f"run {number + 1} of {chosen.runs}, seed {first_seed + number}, load {load}")
        runs.append(run_tests(chosen.options, first_seed + number, load))
        RESULTS.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    print_summary(runs, console)
    return int(any(run.exit_code for run in runs))


if __name__ == "__main__":
    sys.exit(main())
