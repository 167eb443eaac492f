"""A server, two aggregators and a board of each, of which everything is killed: also brokers, database and bucket."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import ExitCode
from support.faults.kill_neighbours import strike_down
from support.faults.kill_points import BOARDS, CONFIG, Life, Mortal
from support.processes.machine import embedded_broker, listens
from support.processes.postgres import Postgres
from support.processes.tiered_site import TieredSite

_LATE = 10**6
"""A flush that a process doesn't come to: it is killed at any time."""

REGIONS = {"hill": BOARDS[:1], "coast": BOARDS[1:]}


class DoomedTier(Mortal, TieredSite):
    """A site of aggregators whose processes die at flushes; their brokers, and the database, at any time.

    Args:
        material: What `write_material` wrote for `BOARDS`.
        folder: The processes' own.
        rounds: Rounds of the job.
        database: Of the server that decides; SQLite without.
        settings: Options of the aggregators.
        gateway: Kills the gateway of the aggregators' bucket, and starts it again.
        patience_s: How long the job may go without a finished round.
    """

    servers = ("server", *REGIONS)
    between_s = (0.3, 3.0)
    comes_back = (ExitCode.BROKER, ExitCode.STORAGE)
    """As it starts, a server finds its database away, or an aggregator its parent or bucket."""

    def __init__(
        self,
        material: Path,
        folder: Path,
        rounds: int,
        *,
        database: Postgres | None = None,
        settings: Sequence[str] = (),
        gateway: Callable[[], None] | None = None,
        patience_s: float = 180,
    ) -> None:
        TieredSite.__init__(
            self, material, folder, CONFIG.format(rounds=rounds), REGIONS, patience_s, settings=settings
        )
        self.rounds = rounds
        self._database, self._gateway = database, gateway
        self._database_url = None if database is None else database.database()
        self.make_shim()

    def command(self, name: str) -> list[str]:
        command = super().command(name)
        return [*command, "--database", self._database_url] if name == "server" and self._database_url else command

    def live_all(self, life: Callable[[str], Life]) -> None:
        self.live(Life("server", _LATE, after=False))
        self.wait_for(lambda: all(map(listens, self.ports["server"])), "the server listens")
        for who in (*REGIONS, *BOARDS):
            self.live(life(who))

    def kill_neighbour(self, chance: random.Random) -> str:
        kinds = ["broker", *self.servers]
        kinds += [] if self._database is None else ["database"]
        kinds += [] if self._gateway is None else ["bucket"]
        match chance.choice(kinds):
            case str(name) if name in self.servers:  # whose end is counted as that of a life
                if self.doom[name].at:
                    self.processes[name].kill()
                return ""
            case "database" if self._database is not None:
                strike_down(self._database)
                time.sleep(chance.uniform(0, 0.5))
                self._database.start()
                return "database"
            case "bucket" if self._gateway is not None:
                self._gateway()
                return "bucket's gateway"
        broker = embedded_broker(self.processes[chance.choice(self.servers)].pid)
        with suppress(OSError):
            if broker is not None:
                os.kill(broker, signal.SIGKILL)
                return "broker"
        return ""
