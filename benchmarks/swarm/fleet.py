"""A process of the swarm: many devices on one event loop, until the job has ended for all of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.fleet_mixture import SAMPLES, SHARES
from benchmarks.swarm.board import Board, Works
from benchmarks.swarm.identities import signed_channel
from benchmarks.swarm.mqtt import KEEPALIVE
from benchmarks.swarm.shelf import Shelf
from benchmarks.swarm.updates import Remade, device_name
from benchmarks.swarm.uploading import Uploader
from fedprune.core.rng import keyed_generator
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.profile_store import find_profile
from fedprune.wire.topics import Topics
from fedprune_device.network.connection import MessageChannel

CONNECTING = 64
"""Connections that are being made at a time: a broker's queue of them is short."""

_BEAT_S = 0.5


def probe_of(profile: HardwareProfile, index: int, seed: int) -> ProbeReport:
    """What a board of this kind measures of itself: as promised, give or take a tenth."""
    chance = keyed_generator(seed, "probe", index)
    memory = round(profile.memory.total_bytes * 0.97)
    return ProbeReport(
        cores=profile.cpu.cores,
        memory_total=memory,
        memory_available=round(memory * chance.uniform(0.5, 0.9)),
        seconds=3.0,
        onnxruntime="1.22.1",
        train_rate=profile.train_rate * chance.lognormal(0, 0.1),
        infer_rate=profile.train_rate * 1.5 * chance.lognormal(0, 0.1),
    )


def channel_of(spec: dict[str, Any], device: str) -> MessageChannel:
    """What turns a device's messages into payloads; it signs them where the site does."""
    if spec["server_key"] is None:
        return MessageChannel(device, spec["site"])
    return signed_channel(spec["site"], device, spec["seed"], spec["server_key"])


class Fleet:
    """Devices of one process.

    Args:
        spec: `host` and `port` of the broker, `site`, `indices` (first, and behind the last), `seed`, `scale` of the
            training times, by profile the `seconds` that a sample takes, a folder for what was `offered`, whether
            updates are `puts` at addresses of the server's, and the `server_key` of a site that signs.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        loop = asyncio.get_running_loop()
        put = Uploader().put if spec["puts"] else None
        self.works = Works(Topics(spec["site"]), Shelf(), Remade(spec["seed"]), loop.call_later, put)
        kinds = [find_profile(name) for name in SHARES]
        shares = list(SHARES.values())
        self.lost = 0
        """Connections that broke."""
        self._gate, self._again = asyncio.Semaphore(CONNECTING), set[asyncio.Task[None]]()
        self.boards = []
        for index in range(*spec["indices"]):
            chance = keyed_generator(spec["seed"], "board", index)
            profile = kinds[int(chance.choice(len(kinds), p=shares))]
            probe = probe_of(profile, index, spec["seed"])
            samples = int(chance.integers(*SAMPLES, endpoint=True))
            slow = profile.train_rate / (probe.train_rate or profile.train_rate)
            train_s = spec["seconds"][profile.name] * samples * slow * spec["scale"]
            channel = channel_of(spec, device_name(index))
            self.boards.append(Board(self.works, channel, index, profile.name, probe.to_dict(), samples, train_s))

    async def connect(self) -> None:
        """Connect all devices, `arrivals` a second; each announces itself as soon as it listens."""

        async def one(board: Board) -> None:
            await asyncio.sleep((board.index - self.boards[0].index) / self._spec["arrivals"])
            await self._connect(board)

        await asyncio.gather(*(one(b) for b in self.boards))

    async def _connect(self, board: Board) -> None:
        loop = asyncio.get_running_loop()
        async with self._gate:
            _, session = await loop.create_connection(board.new_session, self._spec["host"], self._spec["port"])
            await session.up
        session.ended = lambda _: self._lost(board)
        board.announce_birth()

    def _lost(self, board: Board) -> None:
        """A connection has broken: the device comes back, as a real one does."""
        self.lost += 1
        if not board.finished:
            self._again.add(task := asyncio.ensure_future(self._return(board)))
            task.add_done_callback(self._again.discard)

    async def _return(self, board: Board) -> None:
        for attempt in count():
            await asyncio.sleep(random.uniform(0, min(60, 0.5 * 2.0**attempt)))
            with suppress(OSError):
                await self._connect(board)
                return

    async def run(self) -> None:
        """Keep the connections alive, and ask again for what is overdue, until the job has ended for every device."""
        turns, turn = round(KEEPALIVE * 0.5 / _BEAT_S), 0
        while not all(b.finished for b in self.boards):
            await asyncio.sleep(_BEAT_S)
            now, turn = time.monotonic(), (turn + 1) % turns
            for board in self.boards:
                board.tick(now)
                if board.index % turns == turn and board.link is not None:
                    board.link.ping()

    def result(self) -> dict[str, Any]:
        """What became of every device's parts, and what went through all connections."""
        links = [b.link for b in self.boards if b.link is not None]
        return {
            "ledger": {b.name: b.ledger() for b in self.boards},
            "lost": self.lost,
            "rejected": sum(b.rejected for b in self.boards),
            "traffic": {"sent": sum(x.sent for x in links), "received": sum(x.received for x in links)},
        }

    def keep_offered(self, folder: Path) -> None:
        """Write down the weights that devices were offered, each under its digest."""
        folder.mkdir(exist_ok=True)
        for digest in {p.base for b in self.boards for p in b.parts.values()}:
            if digest in self.works.shelf:
                (folder / digest).write_bytes(self.works.shelf[digest])


def fail_loudly() -> None:
    """Let the process end at an error in a connection's callback, which asyncio would only log."""

    def end(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        print(context["message"], file=sys.stderr)
        if isinstance(error := context.get("exception"), Exception) and not isinstance(error, OSError):
            traceback.print_exception(error)
            os._exit(1)

    asyncio.get_running_loop().set_exception_handler(end)


async def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a fleet to the end of the job, or for `limit_s` seconds."""
    began = time.time()
    fail_loudly()
    fleet = Fleet(spec)
    await fleet.connect()
    connected = time.time()
    try:
        await asyncio.wait_for(fleet.run(), spec["limit_s"])
    except asyncio.TimeoutError:
        print(f"{sum(b.finished for b in fleet.boards)} of {len(fleet.boards)} devices have finished", file=sys.stderr)
    fleet.keep_offered(Path(spec["offered"]))
    return {"began": began, "connected": connected, **fleet.result()}


def main(run: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]) -> None:
    """Read the spec's path and the result's from the command line."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(run(spec))))


if __name__ == "__main__":
    main(run)
