"""What a parent sends its aggregators, without a connection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.jobs.state import Phase
from fedprune_server.aggregators.channel import Channel
from fedprune_server.aggregators.connections import Region, RegionConnections
from fedprune_server.aggregators.dispatcher import ParentJob, RegionDispatcher
from fedprune_server.aggregators.messages import read_steered

JOB = "job"


def test_an_aggregator_that_comes_after_the_end_of_a_job_gets_its_reason() -> None:
    state, messages = State("a" * 64, round=3), list[dict[str, Any]]()
    connections = SimpleNamespace(up=lambda *_: True, repeat=lambda *_: None)
    dispatcher = RegionDispatcher(cast("RegionConnections", connections), {JOB: ParentJob({}, state)})
    late = Region("north", cast("Channel", SimpleNamespace(send=messages.append)))
    end = do.Finish("a" * 64, "ended after round 3 of 9: the strategy ended the job")
    state.phase = Phase.FINISHED

    dispatcher.route(JOB, set(), set(), [end])
    assert dispatcher.up(late)

    assert read_steered(messages[-1]).commands == (end,)
