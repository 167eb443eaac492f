"""Kills of a server's neighbours at any time: its database's processes, and the helpers that make submodels for it.

The job must end as an undisturbed job with SQLite in one process does.
"""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.faults.kill_points import BOARDS, Doomed, LedgerError, Life, finished_rounds, wait_for_rounds
from support.processes.postgres import Postgres

POSTMASTER, BACKEND, HELPER = "PostgreSQL's first process", "a process of PostgreSQL's for a connection", "helper"
SLOW = ("epochs = 2\n", "epochs = 150\n")  # rounds last long enough to be hit


@dataclass
class Struck:
    """Kills during a job, by what was killed, and the rounds that it finished."""

    killed: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    seconds: float = 0.0


class DoomedNeighbours(Doomed):
    """A site whose server has a database of its own (SQLite without), or workers that make submodels.

    Material, folder and rounds are as for `Doomed`.
    """

    def __init__(
        self, material: Path, folder: Path, rounds: int, database: str | None = None, workers: int = 1
    ) -> None:
        super().__init__(material, folder, rounds)
        self._options = ["--workers", str(workers)] + ([] if database is None else ["--database", database])
        path = folder / "fleet.toml"
        path.write_text(path.read_text().replace(*SLOW))

    def command(self, name: str) -> list[str]:
        return super().command(name) + (self._options if name == "server" else [])


def strike(site: DoomedNeighbours, kills: int, seed: int, *, database: Postgres | None = None) -> Struck:
    """Run a job while its server's neighbours are killed again and again; then let it finish two undisturbed rounds.

    The seed chooses moments and victims: processes of the database, or without one the server's helpers.

    Raises:
        LedgerError: The job doesn't get on, ends too early, or a process failed by itself.
    """
    chance, done, began = random.Random(seed), Struck(), time.monotonic()
    site.live_all(lambda who: Life(who, 0, after=False))
    wait_for_rounds(site, 1)
    while done.killed.total() < kills:
        time.sleep(chance.uniform(0.05, 0.8))
        helpers = _helpers(site) if database is None else []
        if database is not None and chance.random() < 0.5:
            strike_down(database)
            done.killed[POSTMASTER] += 1
            time.sleep(chance.uniform(0, 0.5))
            database.start()
        elif database is not None:
            done.killed[BACKEND] += _kill(chance, database.backends())
        else:
            done.killed[HELPER] += _kill(chance, helpers)
        for who in ("server", *BOARDS):
            if (code := site.processes[who].poll()) is not None:
                raise LedgerError(f"{who} ended with {code} after {done.killed.total()} kills: {site.logs()}")
    wait_for_rounds(site, len(finished_rounds(site)) + 2)
    site.stop_all()
    done.rounds, done.seconds = len(finished_rounds(site)), time.monotonic() - began
    return done


def strike_down(database: Postgres) -> None:
    """kill -9 of the first process; one that is started while others of the old ones live would spoil the data."""
    children = database.children()
    database.kill()
    until = time.monotonic() + 30
    while any(Path("/proc", str(pid)).exists() for pid in children):
        if time.monotonic() > until:
            raise LedgerError("processes of a database whose first one was killed don't end")
        time.sleep(0.01)


def _kill(chance: random.Random, pids: list[int]) -> int:
    """Kill one of some processes; returns how many were."""
    if pids:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
            return 1
    return 0


def _helpers(site: DoomedNeighbours) -> list[int]:
    """The processes of a server that make submodels."""
    server, helpers = site.processes["server"].pid, []
    for path in Path(f"/proc/{server}/task").glob("*/children"):
        with suppress(OSError):
            for pid in path.read_text().split():
                helpers += [int(pid)] if b"spawn_main" in Path("/proc", pid, "cmdline").read_bytes() else []
    return sorted(helpers)
