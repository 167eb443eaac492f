"""A process with a region's boards, which connect, take part and leave in turns.

The driver and its processes agree by files: `go-3` lets the third turn connect, `last-3` its last board, `end-3` lets
it leave; `NAME-ready-3` and `NAME-left-3` answer. A process with a caller asks the questions of
`benchmarks.swarm.probes` meanwhile, and its boards stay connected after their update is accepted, to ask, too.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.swarm.board import Board
from benchmarks.swarm.fleet import Fleet, fail_loudly, usage
from benchmarks.swarm.probes import EVERY_S, Caller, Repeater
from benchmarks.swarm.puts import Uploader
from benchmarks.swarm.signer import Signer, signing_key
from fedprune.wire.messages import Accepted
from fedprune.wire.topics import Topics

_POLL_S, _PING_S = 0.1, 5.0
_AT_ONCE, _LEAVING_PER_S = 50, 500.0
"""Boards that leave at once, and in a second: of more than a thousand wills at a time Mosquitto drops some, and those
boards count as connected until their silence is noticed."""


def reached(path: Path) -> Path:
    """Leave a mark for the other side."""
    path.touch()
    return path


async def seen(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(_POLL_S)


class Region:
    """The turns of one process.

    Args:
        spec: As of a `Fleet`, but with `turns` (first board, and behind the last, of each) instead of `indices`; the
            process's `name`; the `caller`'s number, or None; and whether the last board of a turn `waits`.
        folder: The folder of the marks.
    """

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self._spec, self._folder, self._name = spec, folder, spec["name"]
        self._uploader = Uploader()
        self._log: list[tuple[str, float, float]] = []
        self._result: dict[str, Any] = {"ledger": {}, "lost": 0, "traffic": {"sent": 0, "received": 0}, "connect_s": []}
        self._caller: Caller | None = None

    async def run(self) -> dict[str, Any]:
        if self._spec["caller"] is not None:
            key = signing_key(self._spec["caller"], self._spec["seed"])
            self._caller = Caller(Topics(self._spec["site"]), self._log, f"caller-{self._name}", Signer(key))
            loop, link = asyncio.get_running_loop(), self._caller.link
            await loop.create_connection(lambda: link, self._spec["host"], self._spec["port"])
            await link.up
        for number, indices in enumerate(self._spec["turns"], 1):
            await self._turn(number, indices)
        unanswered = [] if self._caller is None else self._caller.open
        uploads = {"bytes": self._uploader.sent, "failed": self._uploader.failed}
        return self._result | {"latency": self._log, "open": unanswered, "uploads": uploads, **usage()}

    async def _turn(self, number: int, indices: list[int]) -> None:
        fleet = Fleet(self._spec | {"indices": indices}, self._uploader)
        repeaters = []
        for board in fleet.boards:
            if self._caller is None:
                board.on_accepted = _leaving(board)
            else:
                repeaters.append(Repeater(board, self._log))
        await self._see(f"go-{number}")
        runs = asyncio.create_task(fleet.run((self._folder / f"end-{number}").exists))
        asks = asyncio.create_task(self._ask(repeaters))
        began = time.time()
        await fleet.connect(fleet.boards[:-1] if self._spec["waits"] else None)
        self._result["connect_s"].append(time.time() - began)
        if number in self._spec["quiet"] and self._spec["waits"]:
            fleet.boards[0].leave()  # so that there are never enough for a round, though each board connects
        reached(self._folder / f"{self._name}-ready-{number}")
        if self._spec["waits"]:
            await self._see(f"last-{number}")
            await fleet.connect(fleet.boards[-1:])
        await runs
        asks.cancel()
        for i, board in enumerate(fleet.boards):
            board.leave()
            if i % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(_AT_ONCE / _LEAVING_PER_S)
        self._keep(fleet)
        reached(self._folder / f"{self._name}-left-{number}")

    async def _ask(self, repeaters: list[Repeater]) -> None:
        turn = 0
        while self._caller is not None:
            self._caller.ask()
            if turn % 5 == 4:
                self._caller.link.ping()
            for repeater in repeaters[turn % 2 :: 2]:
                repeater.ask()
            turn += 1
            await asyncio.sleep(EVERY_S)

    async def _see(self, name: str) -> None:
        waiting = asyncio.create_task(seen(self._folder / name))
        while not (await asyncio.wait({waiting}, timeout=_PING_S))[0]:
            if self._caller is not None:
                self._caller.link.ping()  # else the broker ends its connection between two turns

    def _keep(self, fleet: Fleet) -> None:
        fleet.keep_offered(Path(self._spec["offered"]))
        result = self._result
        result["ledger"] |= fleet.ledger()
        result["lost"] += fleet.lost
        result["traffic"] = {k: n + result["traffic"][k] for k, n in fleet.traffic().items()}


def _leaving(board: Board) -> Callable[[Accepted], None]:
    def leave(_: Accepted) -> None:
        board.leave()

    return leave


async def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    fail_loudly()
    return await Region(spec, folder).run()


def main() -> None:
    """Read the spec's path and the result's from the command line."""
    path = Path(sys.argv[1])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(run(json.loads(path.read_text()), path.parent))))


if __name__ == "__main__":
    main()
