"""The work of an asynchronous round grows with the devices at work, not with the fleet or its square."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fedprune import coordination
from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs import schedule
from fedprune.jobs.job import Job
from support.fakes.asynchronous_shell import Shell, job_of

STALE = {"decay": "polynomial", "a": 0.5}
JOBS = {
    "arrivals": lambda n: job_of(arrivals=n // 2, rounds=2, devices=n, mixing="damped", staleness=STALE),
    "window": lambda n: job_of(window_s=10, least=2, rounds=2, devices=n, keep=True, staleness=STALE),
    "unbiased": lambda n: job_of(window_s=10, rounds=2, devices=n, mixing="unbiased"),
    "few at a time": lambda n: job_of(arrivals=n // 8, concurrent=n // 4, rounds=6, devices=n, staleness=STALE),
}


COUNTED = (str(Path(coordination.__file__).parent), str(schedule.__file__))


class Counted(Shell):
    """Counts the bytecode instructions that the coordinator executes; loops within C functions are not seen."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.instructions = 0

    def feed(self, event: on.Event) -> list[do.Command]:
        sys.settrace(self._trace)
        try:
            commands = self.coordinator.handle(event, self.now)
        finally:
            sys.settrace(None)
        self.carry_out(commands)
        return commands

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(COUNTED):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._count

    def _count(self, frame: FrameType, event: str, argument: object) -> Any:
        self.instructions += event == "opcode"
        return self._count


def instructions(job: Job, devices: int, after: int = 0) -> int:
    """Instructions of a job, or of what follows after a number of rounds."""
    shell, before = Counted(replace(job, devices=devices)), 0
    names = [f"d{i:04}" for i in range(devices)]
    shell.sessions = dict.fromkeys(names, 0)
    shell.come(*names)
    while shell.inbox:
        shell.now += 0.01  # every device has a deadline and an arrival of its own
        shell.feed(shell.inbox.pop(0))
        if not shell.inbox and shell.wakes and shell.state.phase is not Phase.FINISHED:
            shell.tick()
        if len(shell.state.history) < after:
            before = shell.instructions
    assert shell.state.phase is Phase.FINISHED
    return shell.instructions - before


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces")
@pytest.mark.parametrize("kind", JOBS)
def test_four_times_the_devices_take_about_four_times_the_work(kind: str) -> None:
    small, large = (instructions(JOBS[kind](n), n) for n in (24, 96))
    assert large < 4.5 * small, f"{large / small:.1f} times the work"


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces")
def test_devices_that_wait_for_an_offer_are_no_work() -> None:
    job = job_of(arrivals=4, concurrent=8, rounds=12, score_every=12, staleness=STALE)
    small, large = (instructions(job, n, after=2) for n in (48, 768))
    assert large < 1.1 * small, f"{large / small:.1f} times the work for 16 times the devices"
