"""The lending rule: no device in two jobs, no job starves, shares by weight, and the same again from the same."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedprune.coordination.fair_scheduler import FairScheduler, JobDemand

pytestmark = pytest.mark.board


def everybody(job: str, device: str) -> bool:
    return True


@dataclass
class Job:
    """A job that trains for so many seconds with whom it gets; `steady` ones never wait for a round to end. `waits`
    counts the seconds without a device in which it was the first in line."""

    name: str
    weight: float
    min_devices: int
    seconds: tuple[int, ...]
    steady: bool = False
    ends: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    time: int = 0
    waits: Counter[int] = field(default_factory=Counter)

    def borrower(self) -> JobDemand:
        max_devices = 2**31 if self.steady or not self.ends else 0
        return JobDemand(self.name, self.weight, 1 if self.steady else self.min_devices, max_devices, len(self.ends))


def play(jobs: list[Job], devices: list[str], seconds: int) -> list[tuple[int, str, tuple[str, ...]]]:
    """Let time pass; what was lent when."""
    lending, log = FairScheduler(), []
    for now in range(seconds):
        for job in jobs:
            job.ends = {d: at for d, at in job.ends.items() if at > now}
        while True:
            busy = [d for j in jobs for d in j.ends]
            assert len(busy) == len(set(busy))
            free = [d for d in devices if d not in busy]
            assignment = lending.assign([j.borrower() for j in jobs], free, devices, everybody)
            if not assignment:
                break
            for job in jobs:
                if job.name in assignment:
                    got = assignment[job.name]
                    assert set(got) <= set(devices) - set(busy)
                    assert job.steady or len(got) >= job.min_devices
                    busy += got
                    steps = [job.seconds[(job.rounds + i) % len(job.seconds)] for i in range(len(got))]
                    job.ends |= {d: now + s for d, s in zip(got, steps, strict=True)}
                    job.rounds += 1
                    log.append((now, job.name, tuple(got)))
        lending.charge({d: j.name for j in jobs for d in j.ends}, 1.0)
        for job in jobs:
            job.time += len(job.ends)
        first = min(jobs, key=lambda job: lending.charged_seconds(job.name) / job.weight)
        first.waits[first.rounds] += not first.ends
    return log


def jobs_of(specs: list[tuple[float, int, tuple[int, ...], bool]]) -> list[Job]:
    return [Job(f"job{i}", *spec) for i, spec in enumerate(specs)]


SPECS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 2.0]),
        st.integers(1, 5),
        st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
        st.booleans(),
    ),
    min_size=2,
    max_size=4,
)


@example([(2.0, 1, (2, 5), False), (2.0, 1, (2, 5), False), (0.5, 5, (5, 2, 6), False)], 7)
@settings(max_examples=60, deadline=None)
@given(SPECS, st.integers(5, 9))
def test_every_job_goes_on_and_the_same_happens_again(
    specs: list[tuple[float, int, tuple[int, ...], bool]], count: int
) -> None:
    devices = [f"d{i}" for i in range(count)]
    jobs = jobs_of(specs)
    log = play(jobs, devices, 300)
    # Whoever has had least for its weight waits for parts under way alone, which take 6 s at most, perhaps twice.
    assert max(max(job.waits.values(), default=0) for job in jobs) <= 12
    assert play(jobs_of(specs), devices, 300) == log


def test_jobs_that_need_all_devices_have_them_for_times_by_weight() -> None:
    jobs = [Job("slow", 3.0, 4, (10,)), Job("quick", 1.0, 4, (2,))]
    play(jobs, list("abcd"), 2000)
    assert jobs[0].time / jobs[1].time == pytest.approx(3, rel=0.05)


def test_a_job_that_comes_later_has_no_claim_on_the_time_before() -> None:
    lending = FairScheduler()
    old, new = JobDemand("old", 1.0, 2, 9), JobDemand("new", 1.0, 2, 9)
    assert lending.assign([old], "ab", "ab", everybody) == {"old": ["a", "b"]}
    lending.charge({"a": "old", "b": "old"}, 1000.0)
    assert list(lending.assign([old, new], "ab", "ab", everybody)) == ["old"]
    lending.charge({"a": "old", "b": "old"}, 1.0)
    assert list(lending.assign([old, new], "ab", "ab", everybody)) == ["new"]
    assert lending.charged_seconds("new") == 2000.0


def test_devices_wait_for_who_is_first_in_line_and_not_for_who_needs_too_many() -> None:
    lending = FairScheduler()
    large, small = JobDemand("large", 1.0, 3, 9), JobDemand("small", 1.0, 1, 9)
    assert lending.assign([large, small], "ab", "abc", everybody) == {}
    assert list(lending.assign([large, small], "ab", "ab", everybody)) == ["small"]
