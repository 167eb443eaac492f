"""What a message waits for its answer while a round continues, measured in a process that does nothing else.

Two questions are asked, ten times a second each, which the server answers at once whatever it is at:

- *call off*: an update of a job that the server doesn't run; it answers `cancelled` without looking at its own job.
- *say again*: an update that is accepted; it goes through the coordinator like every event, and is answered with the
  same `accepted`. Two devices of the fleet live in this process for that.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.swarm.board import Board
from benchmarks.swarm.fleet import Fleet, channel_of, fail_loudly, main
from benchmarks.swarm.mqtt import Session
from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire.messages import Accepted, Cancelled, UpdateAnnouncement
from fedprune_device.network.connection import MessageChannel

CALLER = "caller"
"""Name of the device that asks for the end of jobs that nobody runs."""

EVERY_S = 0.1
_NOBODYS = BlobRef("0" * 64, 1, "0" * 64)


class Caller:
    """Asks for the end of jobs that nobody runs.

    Args:
        channel: The site's, for a device of the name `CALLER`.
        log: Gets kind, time of asking and seconds until the answer of each question.

    Attributes:
        asked: When the questions were asked that are not answered, by both clocks.
    """

    def __init__(self, channel: MessageChannel, log: list[tuple[str, float, float]]) -> None:
        self._channel, self._log = channel, log
        self.asked: dict[int, tuple[float, float]] = {}
        self._round = 0
        self.link = Session(CALLER, channel.topics.device_subscriptions(CALLER), self._on_message)

    def ask(self) -> None:
        """Ask once more."""
        self._round += 1
        update = UpdateAnnouncement(CALLER, "yesterday", self._round, 1, "0" * 64, _NOBODYS, 1, 1)
        self.asked[self._round] = time.time(), time.perf_counter()
        topic = self._channel.topics.up(CALLER, "yesterday")
        self.link.publish(topic, self._channel.seal(topic, update))

    def _on_message(self, topic: str, payload: bytes) -> None:
        message = self._channel.open(topic, payload)
        if isinstance(message, Cancelled) and message.round in self.asked:
            at, began = self.asked.pop(message.round)
            self._log.append(("call off", at, time.perf_counter() - began))


class Repeater:
    """Says a device's accepted update again, and waits for the same answer; `log` is as the caller's."""

    def __init__(self, board: Board, log: list[tuple[str, float, float]]) -> None:
        self._board, self._log = board, log
        self._asked: tuple[float, float] | None = None
        board.on_accepted = self._on_accepted

    def ask(self) -> None:
        """Ask once more, if the last question was answered and there is something to ask for."""
        if self._asked is None and self._board.say_again():
            self._asked = time.time(), time.perf_counter()

    def _on_accepted(self, message: Accepted) -> None:
        if self._asked is not None:
            at, began = self._asked
            self._asked = None
            self._log.append(("say again", at, time.perf_counter() - began))


async def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask until the job has ended for the two devices."""
    fail_loudly()
    log: list[tuple[str, float, float]] = []
    fleet = Fleet(spec)
    await fleet.connect()
    caller = Caller(channel_of(spec, CALLER), log)
    await asyncio.get_running_loop().create_connection(lambda: caller.link, spec["host"], spec["port"])
    await caller.link.up
    repeaters = [Repeater(b, log) for b in fleet.boards]
    ends = asyncio.create_task(asyncio.wait_for(fleet.run(), spec["limit_s"]))
    turn = 0
    while not ends.done():
        caller.ask()
        repeaters[turn % len(repeaters)].ask()
        turn += 1
        await asyncio.sleep(EVERY_S)
    return {"latency": log, "open": [at for at, _ in caller.asked.values()], **fleet.result()}


if __name__ == "__main__":
    main(run)
