"""Those who look on are called for what they want to hear of, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fedprune_server.monitoring.observer import Observer, Observers
from fedprune_server.monitoring.view import JobView
from support.fakes.static_job_view import StillJob

CALLS = ("event", "command", "noticed", "saved", "round_over", "turned", "ended")


def test_what_nobody_wants_to_hear_of_calls_nobody() -> None:
    observers = Observers([Observer()])
    assert not any(getattr(observers, name) for name in CALLS)
    assert observers.trace_id is None


def test_each_is_called_in_order_of_joining_for_what_it_has() -> None:
    heard: list[str] = []

    class Devices(Observer):
        trace_id = "t"

        def noticed(self, devices: Collection[str]) -> None:
            heard.extend(devices)

    class Turns(Devices):
        def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
            heard.append(f"{seen.job.name} {seconds()}")

    observers = Observers([Devices()])
    observers.join(Turns())
    observers.each_turn(lambda: heard.append("beat"))
    observers.noticed(["a"])
    observers.turned(lambda: 0.5, StillJob())
    assert heard == ["a", "a", f"{StillJob.job.name} 0.5", "beat"]
    assert [len(getattr(observers, name)) for name in CALLS] == [0, 0, 2, 0, 0, 2, 0]
    assert observers.trace_id == "t"
