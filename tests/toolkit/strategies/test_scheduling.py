"""Another schedule than a strategy's own: which strategies take it, what it is by default, and what it must not mix."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.strategies import PRESETS, compose
from fedprune.strategies.aggregators import DeltaMean, Mean
from support.fakes.asynchronous_shell import Shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


def job_of(kind: str, strategy: str = "plain", **schedule_options: Any) -> Job:
    settings = {"density": 0.5} if strategy == "plain" else {}
    return Job(strategy=strategy, devices=6, deadline_s=100, schedule={"kind": kind, **schedule_options}, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", ["semi-async", "async", "sync"])
def test_every_preset_takes_it_or_says_why_not(name: str, kind: str) -> None:
    strategy = compose(Job(strategy=name))
    moves = type(strategy.aggregator) is DeltaMean or (type(strategy.aggregator) is Mean and strategy.schedule is None)
    moves = moves and strategy.has_plain_close  # another schedule's arithmetic would take its place
    still = kind == "sync" and strategy.schedule is None
    with (
        nullcontext()
        if still or (moves and not strategy.exploration_rounds)
        else pytest.raises(ConfigError, match="keeps its own")
    ):
        assert (compose(job_of(kind, name)).schedule is None) == (kind == "sync")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "often"}, "kind"),
        ({"window_s": 3}, r"schedule\.kind"),
        ({"knid": "async"}, r"schedule\.knid.*'kind'"),
        ({"kind": "sync", "window_s": 3}, "window_s"),
        ({"kind": "semi-async", "arrivals": 3}, "arrivals"),
        ({"kind": "semi-async", "window_s": -3}, "window_s"),
        ({"kind": "async", "staleness": {"decay": "slowly"}}, "decay"),
        ({"kind": "async", "participation": 0.5}, "participation"),
        ("async", "schedule"),
    ],
)
def test_a_wrong_schedule_is_named(schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(Job(density=0.5, schedule=schedule))


@pytest.mark.parametrize("setting", [{"over_selection": 0.2}, {"in_flight": 3}])
@pytest.mark.parametrize("base", [Job(strategy="fedbuff"), job_of("semi-async")])
def test_settings_of_rounds_in_step_are_refused_elsewhere(setting: dict[str, Any], base: Job) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        compose(replace(base, participation=0.5, **setting))
    compose(Job(density=0.5, participation=0.5, **setting))


@pytest.mark.parametrize("to", ["sync", "async"])
@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_a_job_may_change_its_schedule_between_two_starts(to: str, steps: int) -> None:
    """Wherever it stands: what was under way is dropped, and every round is there once."""
    moves = {"kind": "async", "arrivals": 2}
    shell = Shell(replace(JOB, rounds=4, schedule={} if to == "async" else moves))
    shell.come()
    for _ in range(steps):
        if shell.inbox:
            shell.feed(shell.inbox.pop(0))
    shell.job = replace(shell.job, schedule=moves if to == "async" else {})
    shell.crash()
    shell.run()
    assert shell.state.phase is Phase.FINISHED
    assert [h["round"] for h in shell.state.history] == [1, 2, 3, 4]
    last = {close.round: close for close in shell.closes}
    counted = [(c.part.device, c.basis.round) for close in last.values() for c in close.contributions]
    assert len(counted) == len(set(counted))
    assert all(close.contributions for close in last.values())
