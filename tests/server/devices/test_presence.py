"""Devices that vanish without a word from the broker: silence tells, within a bounded time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.wire.messages import Alive, Hello
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune_server.devices.presence import HELLO_ANSWER_S, MAX_SILENCE_S, Presence
from fedprune_server.messaging.transport import DroppedMessage
from support.fakes.fleet import Fleet
from support.fakes.tiny_job import JOB, NAMES

EVENTS = st.lists(
    st.tuples(st.sampled_from(["note_message", "forget", "wait", "wait", "lost", "connected"]), st.sampled_from(NAMES)),
    max_size=60,
)


SESSION = 7


@given(EVENTS)
def test_who_speaks_is_never_gone_and_who_is_silent_is_asked_once_and_then_gone(events: list[tuple[str, str]]) -> None:
    presence, now, up = Presence(lambda name: SESSION), 0.0, True
    heard: dict[str, float] = {}
    gone: set[str] = set()
    presence.on_broker_connect(now, NAMES)
    heard.update(dict.fromkeys(NAMES, now))
    for kind, name in events:
        if kind == "wait":
            now += 200.0
        elif kind == "lost":
            presence.on_broker_loss()
            up = False
        elif kind == "connected":
            presence.on_broker_connect(now, NAMES)
            up = True
            gone.clear()
            heard.update(dict.fromkeys(NAMES, now))
        elif up:
            getattr(presence, kind)(*((name, now) if kind == "note_message" else (name,)))
            heard[name] = now
            gone.discard(name)
            if kind == "forget":
                gone.add(name)
        for asked in presence.take_silent(now):
            assert now - heard[asked] >= MAX_SILENCE_S
        for silent, session in presence.take_gone(now).items():
            assert session == SESSION
            assert silent not in gone
            assert now - heard[silent] > HELLO_ANSWER_S
            gone.add(silent)
    if up:  # whoever says no more is gone in the end
        for _ in range(20):
            now += 100.0
            presence.take_silent(now)
            gone |= presence.take_gone(now).keys()
        assert gone == set(NAMES)


def run_with_silent_board(fleet: Fleet, speaks_after: float | None = None) -> tuple[Any, dict[str, bool], float]:
    """A fleet that waits for a device more; `c` vanishes at once, without a will.

    Returns:
        The daemon, who was online as time went by, and when `c` was found to be gone.
    """
    daemon = fleet.daemon()
    ghost = fleet.air.devices["c"]
    hear, gone_at = ghost.hear, [0.0]

    def idle() -> None:
        if daemon.is_busy:
            return
        fleet.air.now += 5.0
        now = fleet.air.now
        if now > 100:
            ghost.hear = (lambda topic, payload: None) if not back(now) else hear  # type: ignore[method-assign]
        if now % 300 == 0:
            for device in fleet.air.devices.values():
                if device is not ghost or now <= 100 or back(now):
                    device.say(Alive(device.name, device.session))
        if "c" in daemon.main_runner.state.devices and not daemon.main_runner.state.devices["c"].online:
            gone_at[0] = gone_at[0] or now
        if now > 3000:
            daemon.stop()

    def back(now: float) -> bool:
        return speaks_after is not None and now > speaks_after

    fleet.air.on_idle = idle
    daemon.run()
    return daemon, {n: d.online for n, d in daemon.main_runner.state.devices.items()}, gone_at[0]


@pytest.fixture
def waiting(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, replace(JOB, devices=9))


def test_a_device_that_vanished_without_a_will_is_gone_within_a_quarter_of_an_hour_and_a_bit(waiting: Fleet) -> None:
    _, online, gone_at = run_with_silent_board(waiting)
    assert online == {"a": True, "b": True, "c": False}
    assert MAX_SILENCE_S < gone_at <= 100 + MAX_SILENCE_S + HELLO_ANSWER_S + 60
    hellos = [m for m in waiting.air.devices["a"].heard if isinstance(m, Hello)]
    assert len(hellos) == 1  # the one to everybody: who says that it is there is not asked


def test_a_board_whose_birth_got_lost_is_asked_for_it(waiting: Fleet) -> None:
    waiting.air.lost.append(waiting.air.devices["a"].topics.broadcast())
    _, online, _ = run_with_silent_board(waiting)
    assert online == {"a": True, "b": True}


def test_a_flood_that_is_dropped_makes_no_other_board_seem_silent(waiting: Fleet) -> None:
    """Their answers wait behind the flood, and haven't been read yet."""
    air, daemon = waiting.air, waiting.daemon()
    for device in air.devices.values():
        device.send_birth()
    flood = [DroppedMessage()] * int(2 * HELLO_ANSWER_S)
    air.inbox.extend([ConnectionDown(""), ConnectionUp(), *flood])  # type: ignore[list-item]
    get, online = air.get, list[int]()

    def slow_get(timeout: float | None = 0.0) -> Any:
        item = get(timeout)
        if isinstance(item, DroppedMessage):
            air.now += 1.0  # more than a turn takes messages in, so that each ends with one
            online.append(len(daemon.connected))
        return item

    air.get, air.on_idle = slow_get, daemon.stop  # type: ignore[method-assign]
    daemon.run()
    assert online == [len(NAMES)] * len(flood)
