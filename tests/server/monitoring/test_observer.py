"""Those who look on are called for what they want to hear of, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fedprune_server.monitoring.observer import Onlooker, Onlookers
from fedprune_server.monitoring.view import JobView
from support.fakes.static_job_view import StillJob

CALLS = ("event", "command", "noticed", "saved", "round_over", "turned", "ended")


def test_what_nobody_wants_to_hear_of_calls_nobody() -> None:
    onlookers = Onlookers([Onlooker()])
    assert not any(getattr(onlookers, name) for name in CALLS)
    assert onlookers.trace_id is None


def test_each_is_called_in_order_of_joining_for_what_it_has() -> None:
    heard: list[str] = []

    class Devices(Onlooker):
        trace_id = "t"

        def noticed(self, devices: Collection[str]) -> None:
            heard.extend(devices)

    class Turns(Devices):
        def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
            heard.append(f"{seen.job.name} {seconds()}")

    onlookers = Onlookers([Devices()])
    onlookers.join(Turns())
    onlookers.each_turn(lambda: heard.append("beat"))
    onlookers.noticed(["a"])
    onlookers.turned(lambda: 0.5, StillJob())
    assert heard == ["a", "a", f"{StillJob.job.name} 0.5", "beat"]
    assert [len(getattr(onlookers, name)) for name in CALLS] == [0, 0, 2, 0, 0, 2, 0]
    assert onlookers.trace_id == "t"
