"""What the push ring weighs: how many tests a folder has, which are slow, and why some take long.

    python tests/support/push_ring.py check            compares tests/push_ring.json with the tests that there are, and
                                                       names rings of tests/rings.json that nobody has run for long
    FEDPRUNE_RECORD=build/ring.json make test-dev      notes what each test takes, on a machine with nothing else to do
    python tests/support/push_ring.py record build/ring.json    writes tests/push_ring.json anew from it

Of several files each test's least counts, which no neighbour has lengthened.

Tests that the record calls slow are marked so: `make test` leaves them out. Times are recorded and never compared; what
is compared are counts, and that each long test has its reason.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "push_ring.json"

# A test that keeps a processor busy for longer than the first, or takes longer than the second, is slow.
SLOW_CPU_S, SLOW_WALL_S = 0.12, 2.0

# A test that takes more of a processor says why in the record: it is paid for at every push.
LONG_S = 5.0

# After so many days without a whole run of a ring that no push runs, `check` says so. Its dates are written by hand.
RINGS, MAX_RING_AGE_DAYS = ROOT / "tests" / "rings.json", 14

# How far a folder may grow before its record has to be made anew, by somebody who looks at the sum.
GROWTH, SMALL_FOLDER = 1.05, 15


class RingRecorder:
    """A plugin of pytest that notes what each test takes, on each of pytest's processes, and writes it on the first.

    Seconds of processors are those of children that have ended, too.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path = path
        self._writes = writes
        self._seconds: dict[str, tuple[float, float]] = {}
        self._before = (0.0, 0.0)
        self._started = time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._before = cpu_s(), time.monotonic()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> Iterator[None]:
        report: Any = yield
        if call.when == "teardown":
            cpu, wall = self._before
            report.user_properties.append(("seconds", (round(cpu_s() - cpu, 3), round(time.monotonic() - wall, 3))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "seconds":
                self._seconds[report.nodeid] = value  # type: ignore[assignment]

    def pytest_sessionfinish(self) -> None:
        if self._writes:
            wall_s = round(time.monotonic() - self._started)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"wall_s": wall_s, "seconds": self._seconds}))


def cpu_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def folder_of(test: str) -> str:
    return str(Path(test.partition("::")[0]).parent)


def collected_tests() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the tests can't be collected:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def differences(record: dict[str, Any], tests: list[str]) -> list[str]:
    """What of the record isn't so any more, a line each."""
    lines = []
    for folder, count in sorted(Counter(map(folder_of, tests)).items()):
        recorded = record["folders"].get(folder, {"tests": 0})["tests"]
        if count > max(recorded * GROWTH, recorded + SMALL_FOLDER):
            lines.append(f"{folder}: {count} tests, {recorded} recorded")
    lines += [f"{name}: no reason why it takes long" for name, row in record["long"].items() if not row["why"]]
    present = set(tests)
    lines += [
        f"{name}: there is no such test at a push" for name in (*record["long"], *record["slow"]) if name not in present
    ]
    return lines


def outdated_rings(rings: dict[str, dict[str, str]], today: date) -> list[str]:
    """A line for each ring whose last whole run was long ago."""
    ages = {name: (today - date.fromisoformat(run["date"])).days for name, run in rings.items()}
    return [f"{name}: last run whole {age} days ago" for name, age in ages.items() if age > MAX_RING_AGE_DAYS]


def slow_tests() -> frozenset[str]:
    """Names of the tests that the record calls slow."""
    return frozenset(json.loads(RECORD.read_text())["slow"]) if RECORD.exists() else frozenset()


def new_record(measurements: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """The record of the tests of the last measurement."""
    seconds = {
        name: tuple(map(min, zip(*(m["seconds"][name] for m in measurements if name in m["seconds"]), strict=True)))
        for name in measurements[-1]["seconds"]
    }
    tests, folders = Counter(map(folder_of, seconds)), defaultdict[str, float](float)
    for name, (cpu, _) in seconds.items():
        folders[folder_of(name)] += cpu
    long = {name: cpu for name, (cpu, _) in seconds.items() if cpu > LONG_S}
    slow = [name for name, (cpu, wall) in seconds.items() if cpu > SLOW_CPU_S or wall > SLOW_WALL_S]
    reasons = {name: row["why"] for name, row in before.get("long", {}).items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "wall_s": measurements[-1]["wall_s"],
        "cpu_s": round(sum(folders.values())),
        "tests": sum(tests.values()),
        "folders": {f: {"tests": tests[f], "cpu_s": round(folders[f], 1)} for f in sorted(tests)},
        "long": {n: {"cpu_s": round(s, 1), "why": reasons.get(n, "")} for n, s in sorted(long.items())},
        "slow": sorted(slow),
    }


def main(arguments: list[str]) -> int:
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if arguments == ["check"]:
        for line in outdated_rings(json.loads(RINGS.read_text()), date.today()):
            print(f"warning: {line}")
        lines = differences(before, collected_tests())
        for line in lines:
            print(line)
        if lines:
            print(f"{RECORD.relative_to(ROOT)} doesn't fit the tests: shorten them, or record anew (see {__file__})")
        return int(bool(lines))
    if len(arguments) >= 2 and arguments[0] == "record":
        record = new_record([json.loads(Path(path).read_text()) for path in arguments[1:]], before)
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
