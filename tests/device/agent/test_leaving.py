"""A board without work disconnects when the server sends it away; one with work says so and stays."""

from pathlib import Path
from typing import Any

import pytest

from fedprune.wire.fleet_messages import Reconnect
from fedprune.wire.messages import Birth, RoundProgress, UpdateAnnouncement
from support.fakes.agent_fleet import TOPICS
from support.fakes.agent_harness import LONG, Bench
from support.fakes.release_site import ReleaseServer
from support.fakes.runtime_releases import make_release, set_up

pytestmark = pytest.mark.board


def test_a_board_without_work_leaves_and_is_born_again_when_it_is_back(bench: Bench) -> None:
    server, birth_counts = bench.server, list[int]()

    def react(message: Any) -> None:
        if not isinstance(message, Birth):
            return
        if not server.link.left:
            server.say(Reconnect(30.0, 3600.0))
        else:
            bench.agent.stop()

    def watch() -> None:
        if server.link.left and not server.link.up and not bench.agent.status.connected:
            birth_counts.append(len(server.of(Birth)))
            server.link.restore()

    server.react, server.watch, server.ends = react, watch, False
    bench.run(until_finished=False)
    assert server.link.left == [3600.0]
    assert server.link.spread_s == 30.0
    assert birth_counts == [1]
    assert len(server.of(Birth)) == 2


def test_a_board_that_trains_stays_and_delivers(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, LONG.to_dict() | {"epochs": 50})]
    birth_counts = list[int]()

    def react(message: Any) -> None:
        if isinstance(message, RoundProgress) and message.phase == "train" and not birth_counts:
            birth_counts.append(len(server.of(Birth)))
            server.say(Reconnect(0.0, 3600.0))

    server.react = react
    bench.run()
    assert server.link.left == []
    assert len(server.of(Birth)) == birth_counts[0] + 1
    assert server.of(UpdateAnnouncement)


def test_a_board_whose_release_is_under_way_stays(bench: Bench, tmp_path: Path) -> None:
    first, second = (make_release(tmp_path / f"release-{n}", n) for n in (1, 2))
    offer = ReleaseServer(tmp_path / "releases", second).offer(second)  # its files never come
    server = bench.server

    def react(message: Any) -> None:
        if isinstance(message, Birth) and len(server.of(Birth)) == 1:
            server.say(offer)
            server.say(Reconnect(0.0, 3600.0))
        elif isinstance(message, Birth):
            bench.agent.stop()

    server.react, server.ends = react, False
    server.watch = lambda: bench.agent.stop() if server.link.left else None
    bench.run(until_finished=False, installer=set_up(tmp_path / "slots", first))
    assert server.link.left == []


def test_only_a_message_to_this_board_counts(bench: Bench) -> None:
    server = bench.server

    def react(message: Any) -> None:
        if isinstance(message, Birth):
            for topic in (TOPICS.broadcast(), TOPICS.down("d", "job")):
                server.link.deliver(topic, Reconnect(30.0, 3600.0).to_bytes())
            server.say(Reconnect(20.0))

    server.react, server.ends = react, False
    server.watch = lambda: bench.agent.stop() if server.link.spread_s else None
    bench.run(until_finished=False)
    assert server.link.left == []
    assert server.link.spread_s == 20.0
