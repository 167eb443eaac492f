"""What the push ring weighs: how many tests a folder has, and why a test takes long.

    python tests/support/push_ring.py check            compares tests/push_ring.json with the tests that there are
    FEDPRUNE_RECORD=build/ring.json make test-dev      notes what each test takes
    python tests/support/push_ring.py record build/ring.json    writes tests/push_ring.json anew from it

Times are those of processors, children that have ended included, so that other processes change little. They are
recorded and never compared: what is compared are counts, and that each long test has its reason.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "push_ring.json"

# A test that takes longer says why in the record: it is paid for at every push.
LONG_S = 5.0

# How far a folder may grow before its record has to be made anew, by somebody who looks at the sum.
GROWTH, SMALL_FOLDER = 1.05, 15


class RingRecorder:
    """A plugin of pytest that notes what each test takes, on each of pytest's processes, and writes it on the first."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path = path
        self._writes = writes
        self._cpu_s: dict[str, float] = {}
        self._taken_s = 0.0
        self._started = time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._taken_s = -cpu_s()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> Iterator[None]:
        report: Any = yield
        if call.when == "teardown":
            report.user_properties.append(("cpu_s", self._taken_s + cpu_s()))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "cpu_s":
                self._cpu_s[report.nodeid] = float(str(value))

    def pytest_sessionfinish(self) -> None:
        if self._writes:
            wall_s = round(time.monotonic() - self._started)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"wall_s": wall_s, "cpu_s": self._cpu_s}))


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
    found = Counter(map(folder_of, tests))
    lines = []
    for folder, count in sorted(found.items()):
        recorded = record["folders"].get(folder, {"tests": 0})["tests"]
        if count > max(recorded * GROWTH, recorded + SMALL_FOLDER):
            lines.append(f"{folder}: {count} tests, {recorded} recorded")
    lines += [f"{name}: no reason why it takes long" for name, row in record["long"].items() if not row["why"]]
    present = set(tests)
    lines += [f"{name}: there is no such test at a push" for name in record["long"] if name not in present]
    return lines


def new_record(measured: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    tests, cpu = Counter(map(folder_of, measured["cpu_s"])), Counter[str]()
    for name, seconds in measured["cpu_s"].items():
        cpu[folder_of(name)] += seconds
    long = {n: s for n, s in measured["cpu_s"].items() if s > LONG_S}
    reasons = {name: row["why"] for name, row in before.get("long", {}).items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "wall_s": measured["wall_s"],
        "cpu_s": round(sum(cpu.values())),
        "tests": sum(tests.values()),
        "folders": {f: {"tests": tests[f], "cpu_s": round(cpu[f], 1)} for f in sorted(tests)},
        "long": {n: {"cpu_s": round(s, 1), "why": reasons.get(n, "")} for n, s in sorted(long.items())},
    }


def main(arguments: list[str]) -> int:
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if arguments == ["check"]:
        lines = differences(before, collected_tests())
        for line in lines:
            print(line)
        if lines:
            print(f"{RECORD.relative_to(ROOT)} doesn't fit the tests: shorten them, or record anew (see {__file__})")
        return int(bool(lines))
    if len(arguments) == 2 and arguments[0] == "record":
        record = new_record(json.loads(Path(arguments[1]).read_text()), before)
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
