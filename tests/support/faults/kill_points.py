"""A job whose server, boards and broker are killed again and again, and what its ledger must say in the end.

Server and boards die at flushes of files to the disk, the first of a life, the second of the next and so on, before the
flush and after it: whatever a process believes to be safe, it learns at such a moment. The broker dies at any time.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune_server.storage.storage import Storage
from support.paths import TESTS
from support.processes.real_site import Site

BOARDS = ("north", "south")
SHIM = TESTS / "support/faults/death.c"
CONFIG = """
[job]
name = "kills"
rounds = {rounds}
devices = 2
density = 0.5
deadline_s = 600

[job.recipe]
epochs = 2
lr = 0.001
"""


class LedgerError(Exception):
    """An update was lost, counted twice or changed, or a model is another one than it should be."""


@dataclass
class Life:
    """One life of a process.

    Attributes:
        at: At which flush it is to die; 0 for never.
        after: Whether after the flush instead of before it.
        file: What kind of file was being flushed, once it is dead.
    """

    who: str
    at: int
    after: bool
    file: str = ""


@dataclass
class Kills:
    """What happened to a job: lives that ended as they should, kills of the broker, rounds that were finished."""

    lives: list[Life] = field(default_factory=list)
    brokers: int = 0
    rounds: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Processes killed."""
        return len(self.lives) + self.brokers


class Doomed(Site):
    """One server, one broker and two boards: the broker is killed at any time, the others when they are told to die.

    The material is what `write_material` wrote for `BOARDS`; a job may go `patience_s` without a finished round.
    """

    def __init__(self, material: Path, folder: Path, rounds: int, patience_s: float = 120) -> None:
        super().__init__(material, folder, CONFIG.format(rounds=rounds), BOARDS, patience_s, mosquitto=True)
        self.rounds = rounds
        self.shim = self.folder / "death.so"
        compiler = shutil.which("cc") or "cc"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", self.shim, SHIM, "-ldl"], check=True)
        self.doom: dict[str, Life] = {}

    def live_all(self, life: Callable[[str], Life]) -> None:
        """Start all processes, with what `life` gives for each."""
        self.start("broker")
        for who in ("server", *self.devices):
            self.run_life(life(who))

    def command(self, name: str) -> list[str]:
        command = super().command(name)
        if name in self.devices:
            at = command.index("fedprune_device.cli.main")
            command[at - 1 : at + 1] = [str(TESTS / "support/processes/noted_device.py"), str(self.notes(name))]
        return command

    def notes(self, name: str) -> Path:
        """Where a board's ledger is."""
        return self.folder / f"{name}.notes"

    def run_life(self, life: Life) -> None:
        """Start a process that dies when it is time to."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if life.at:
            environment |= {"LD_PRELOAD": str(self.shim), "DEATH_AT": str(life.at)}
            environment["DEATH_NOTE"] = str(self.folder / f"{life.who}.death")
            environment |= {"DEATH_AFTER": "1"} if life.after else {}
        self.doom[life.who] = life
        with (self.folder / f"{life.who}.log").open("ab") as log:
            self.processes[life.who] = subprocess.Popen(self.command(life.who), stdout=log, stderr=log, env=environment)

    def file(self, who: str) -> str:
        """What kind of file a process was flushing when it died."""
        note = self.folder / f"{who}.death"
        path = Path(note.read_text())
        note.unlink()
        if path.is_dir():
            return "folder"
        if path.name.startswith("server.db"):
            return "database"
        return "state" if path.parent.name in self.devices else path.parent.name.rstrip("0123456789abcdef") or "blob"


def run(site: Doomed, kills: int, seed: int = 0) -> Kills:
    """Run a job until so many processes have been killed, or it is over; then let it finish a round in peace.

    The seed chooses the order of victims.

    Raises:
        LedgerError: The job doesn't get on, or a process failed by itself.
    """
    chance, done, began = random.Random(seed), Kills(), time.monotonic()
    next_at = dict.fromkeys(("server", *site.devices), 0)

    def next_life(who: str) -> Life:
        if done.total >= kills:
            return Life(who, 0, after=False)
        # From the first flush to the fortieth, and again: early deaths alone would never let a round end.
        next_at[who] = next_at[who] % 80 + 1
        return Life(who, (next_at[who] + 1) // 2, after=next_at[who] % 2 == 0)

    site.live_all(next_life)
    progress_at, last, calm_from, broker_at = time.monotonic(), -1, None, time.monotonic() + 5
    while True:
        time.sleep(0.02)
        now = time.monotonic()
        for who, life in list(site.doom.items()):
            code = site.processes[who].poll()
            if code == -signal.SIGKILL and life.at:
                life.file = site.file(who)
                done.lives.append(life)
            elif code is not None and code != 0:
                raise LedgerError(f"{who} ended by itself with {code}: {site.logs()}")
            if code is not None and (code != 0 or who != "server"):
                site.run_life(next_life(who))
        if done.total < kills and now > broker_at:
            site.kill("broker")
            done.brokers += 1
            broker_at = now + chance.uniform(2.0, 20.0)
        if now - progress_at > 0.5 or site.processes["server"].poll() == 0:
            done.rounds = len(finished_rounds(site))
            progress_at, last, stuck = now, done.rounds, now - progress_at > site.patience_s and last == done.rounds
            if stuck:
                raise LedgerError(f"no round has ended for {site.patience_s} s: {site.logs()}")
            if done.total >= kills:
                calm_from = done.rounds if calm_from is None else calm_from
            if site.processes["server"].poll() == 0 or (calm_from is not None and done.rounds > calm_from + 1):
                break
    site.stop_all()
    done.seconds = time.monotonic() - began
    return done


def check(site: Doomed, calm: Doomed, rounds: int) -> dict[str, Any]:
    """Compare what the server counted with what its boards say that they sent, and with a job that nobody disturbed.

    Returns:
        How many updates were counted, sent in other attempts or again, and accepted.

    Raises:
        LedgerError: They contradict each other, or fewer than `rounds` are over.
    """
    finished, expected = finished_rounds(site), finished_rounds(calm)
    if len(finished) < rounds:
        raise LedgerError(f"{len(finished)} rounds were finished, not {rounds}")
    counted = _counted_updates(site)
    texts = {name: site.notes(name).read_text() for name in site.devices}
    # The last line of a board's ledger may be cut off.
    notes = {name: [json.loads(n) for n in t[: t.rfind("\n") + 1].splitlines()] for name, t in texts.items()}
    for summary, calm_summary in zip(finished, expected, strict=False):
        number = summary["round"]
        if summary["model"] != calm_summary["model"]:
            raise LedgerError(f"round {number}: model {summary['model']} instead of {calm_summary['model']}")
        for name in site.devices:
            if summary["devices"][name]["progress"] != "folded":
                raise LedgerError(f"round {number}: the update of {name} does not count")
            digest = counted[number, name]
            if digest not in {n[3] for n in notes[name] if n[:2] == ["sent", number]}:
                raise LedgerError(f"round {number}: {name} never sent {digest}")
            if strange := {n[3] for n in notes[name] if n[:2] == ["accepted", number]} - {digest}:
                raise LedgerError(f"round {number}: {name} was told that {strange} count, and {digest} does")
    note_counts = Counter(n[0] for lines in notes.values() for n in lines)
    return {"rounds": len(finished), "counted": len(finished) * len(site.devices), **note_counts}


def finished_rounds(site: Site) -> list[dict[str, Any]]:
    """Summaries of a job's rounds so far."""
    if not any((site.state / name).exists() for name in ("server.db", "database")):
        return []
    try:
        with Storage.open_existing(site.state) as storage:
            return storage.rounds()
    except Exception:  # noqa: BLE001 - it is being made, or written at this moment
        return []


def _counted_updates(site: Site) -> dict[tuple[int, str], str]:
    """By round and device the digest of the update that was in the sums as the round was closed."""
    stored: dict[tuple[int, str], str] = {}
    closed: dict[tuple[int, str], str] = {}
    with Storage.open_existing(site.state) as storage:
        for _, _, kind, body in storage.log.events():
            if kind == "UpdateStored":
                stored[body["round"], body["device"]] = body["weights"]
            elif kind == "Closed":
                for (number, name), digest in stored.items():
                    if number == body["round"] and name not in body["rejected"]:
                        if (number, name) in closed:
                            raise LedgerError(f"round {number} was closed twice")
                        closed[number, name] = digest
    return closed


def run_without_kills(site: Doomed, rounds: int = 0) -> None:
    """Run the job without any kill, to its end or until this many of its rounds are over."""
    site.live_all(lambda who: Life(who, 0, after=False))
    try:
        if rounds:
            wait_for_rounds(site, rounds)
        else:
            site.finish(max(site.patience_s, 2.0 * site.rounds))  # a long job, on a machine that may be busy
    finally:
        site.stop_all()


def wait_for_rounds(site: Doomed, rounds: int) -> None:
    """Wait until this many rounds are over. Raises `LedgerError` if none has ended for the site's patience."""
    latest, progress_at = 0, time.monotonic()
    while (finished := len(finished_rounds(site))) < rounds:
        if finished > latest:
            latest, progress_at = finished, time.monotonic()
        if time.monotonic() > progress_at + site.patience_s:
            raise LedgerError(f"no round has ended for {site.patience_s} s: {site.logs()}")
        time.sleep(0.05)
