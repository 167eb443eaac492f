"""A server whose job is done waits for those that were away, for a while."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.wire.messages import Finished
from fedprune_server.devices.shutdown import MAX_WAIT_S, MIN_WAIT_S, GracefulShutdown
from support.fakes.fleet import NAMES, Fleet, ToyDevice
from support.fakes.several_jobs import SeveralJobs, rename_job
from support.fakes.tiny_job import JOB


def shutdown_of(online: dict[str, bool], now: float) -> GracefulShutdown:
    there = [name for name, here in online.items() if here]
    return GracefulShutdown(there, online.keys() - set(there), online.__getitem__, now)


def test_who_is_there_was_told_and_is_not_waited_for() -> None:
    shutdown = shutdown_of({"a": True, "b": True}, 10.0)
    assert not shutdown.is_over(10.0)
    assert not shutdown.is_over(10.0 + MIN_WAIT_S - 0.1)
    assert shutdown.is_over(10.0 + MIN_WAIT_S)


def test_who_was_away_is_waited_for_until_it_comes_or_for_good() -> None:
    online = {"a": True, "b": False}
    shutdown = shutdown_of(online, 0.0)
    assert not shutdown.is_over(MAX_WAIT_S - 0.1)
    assert shutdown.is_over(MAX_WAIT_S)
    online["b"] = True
    assert shutdown_of(online, 0.0).is_over(MIN_WAIT_S)


def test_who_has_just_gone_may_come_back_in_a_moment() -> None:
    online = {"a": True}
    shutdown = shutdown_of(online, 0.0)
    online["a"] = False
    assert not shutdown.is_over(1.0)
    assert not shutdown.is_over(1.0 + MIN_WAIT_S - 0.1)
    assert shutdown.is_over(1.0 + MIN_WAIT_S)


def returning(air: Any, late: ToyDevice, server: Any, goes: Callable[[str, bytes], bool]) -> list[float]:
    """Let a device go with the message that `goes` names, and return 8 s after the end of the first job.

    Returns:
        When the end was, once the first device is told of it.
    """
    publish, ended = air.publish, list[float]()

    def watch_publish(topic: str, payload: bytes, qos: int = 1) -> bool:
        if b'"finished"' in payload and not ended:
            ended.append(air.now)
        if goes(topic, payload):
            leave(air, late)
        return bool(publish(topic, payload, qos))

    def idle() -> None:
        if not server.is_busy:
            air.now += 0.25
        if ended and late.name not in air.devices and air.now >= ended[0] + 8:
            air.devices[late.name] = late
            late.session += 1
            late.send_birth()

    air.publish, air.on_idle, air.now = watch_publish, idle, 100.0
    return ended


def leave(air: Any, late: ToyDevice) -> None:
    if air.devices.pop(late.name, None) is not None:
        late.die()


def jobs_told(air: Any, late: ToyDevice, server: Any, job: str) -> set[str]:
    """The jobs of whose end a device is told that is away from the last update of one of them on, for 8 s."""

    def is_last_update(topic: str, payload: bytes) -> bool:
        parts = (b'"accepted"', f'"job":"{job}"'.encode(), b'"round":3')
        return all(part in payload for part in parts) and topic.split("/")[3] == late.name

    late.heard.clear()
    ended = returning(air, late, server, is_last_update)
    server.run(until_finished=True)
    assert ended[0] + 8 <= air.now < ended[0] + MAX_WAIT_S
    return {message.job for message in late.heard if isinstance(message, Finished)}


@pytest.mark.parametrize("killed", [False, True], ids=["the server runs", "it was killed at the end"])
def test_a_device_that_is_away_as_the_job_ends_is_told_when_it_returns(tmp_path: Path, killed: bool) -> None:
    fleet = Fleet(tmp_path)
    late = fleet.air.devices[NAMES[0]]
    if killed:
        assert fleet.run().phase is Phase.FINISHED
        fleet.restart()
        fleet.air.devices.pop(late.name)
    assert jobs_told(fleet.air, late, fleet.daemon(), JOB.name) == {JOB.name}


@pytest.mark.parametrize("killed", [False, True], ids=["the server runs", "it was killed at the end"])
def test_a_device_that_is_away_as_the_last_of_several_jobs_ends_is_told_of_all(tmp_path: Path, killed: bool) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one", rounds=1), rename_job(JOB, "two")], "abc")
    late = several.air.devices["a"]
    if killed:
        several.run()
        several.restart()
        several.air.devices.pop(late.name)
    assert jobs_told(several.air, late, several.host(), "two") == {"one", "two"}
