"""The cost to a server of its whole fleet reconnecting: `OMP_NUM_THREADS=1 python -m benchmarks.reconnects`.

A server that was restarted reads the signed births of all boards, one after the other, as they would wait in its inbox.
It stores their epochs, its coordinator's events and its state on the disk, and answers. What boards, broker and network
do is not measured: the births are signed beforehand, and what the server sends is dropped.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sql

from benchmarks.harness import parser, save, setting
from benchmarks.swarm.fleet import probe_of
from fedprune.coordination import State
from fedprune.planning.profile_store import find
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import seal
from fedprune.wire.fleet_messages import RECONNECT
from fedprune.wire.messages import PUT, Birth
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.topics import Topics
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import DeviceServices, JobRunner, RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.engine.state_directory import StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import APPROVED
from fedprune_server.messaging.authentication import AuthenticatedLink
from fedprune_server.messaging.rate_limit import RateLimitedLink
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.storage.tables import MEMBERS
from support.fakes.fleet import ToyWorker
from support.fakes.inbox import Inbox
from support.fakes.tiny_job import ARCHITECTURE, JOB

TOPICS = Topics("default")
PROFILE = find("raspberry-pi-5")


class Fleet:
    """Boards that are members, and sign their births."""

    def __init__(self, state: Path, boards: int) -> None:
        self.state = state
        self.keys = {f"board-{i:05d}": SigningKey.make() for i in range(boards)}
        self._epoch = 0
        IdentityFolder.make(state, "default").close()
        rows = [
            {"device": name, "key": key.verifying.hex, "status": APPROVED, "asked": 1, "decided": 1}
            for name, key in self.keys.items()
        ]
        with StateFolder(state) as folder, folder.storage.database.transaction() as connection:
            connection.execute(MEMBERS.insert(), rows)

    def births(self) -> list[tuple[str, bytes]]:
        """A birth of each board, signed in a new epoch."""
        self._epoch += 1
        found = []
        for i, (name, key) in enumerate(self.keys.items()):
            probe = probe_of(PROFILE, i, 0).to_dict()
            birth = Birth(name, 7, PROFILE.name, 600, "fedprune 0.1.0", probe, abilities=(PUT, RECONNECT))
            found.append((TOPICS.up(name), seal(key, TOPICS.up(name), self._epoch, 0, birth.to_bytes())))
        return found


def measure(fleet: Fleet, births: list[tuple[str, bytes]]) -> dict[str, float]:
    """Start a server, and let it read the births."""
    inbox, quarantine, count = Inbox([ConnectionUp(), *births]), Quarantine(), Counter[str]()
    with IdentityFolder(fleet.state) as identity, StateFolder(fleet.state) as folder:
        storage = folder.storage
        sql.event.listen(storage.database.engine, "commit", lambda _connection: count.update(["commits"]))
        identity.serve(storage.database)
        worker = ToyWorker(folder.store)
        state = storage.load() or State(model=worker.initial())
        job = RunnableJob(WAITING_JOB, ARCHITECTURE, state, storage, folder.store, worker)
        link = AuthenticatedLink(RateLimitedLink(inbox, quarantine), identity, quarantine=quarantine)
        site = SiteLink(link, TOPICS, quarantine)
        services = DeviceServices(members=identity.store.members)
        runner = JobRunner(job, site, services, max_devices=len(births))
        server = Server([runner], site)
        runner.open()
        began, used = time.perf_counter(), time.process_time()
        turns = 0
        while len(server.connected) < len(births):
            server._turn()
            turns += 1
        took = {"cpu_s": time.process_time() - used, "wall_s": time.perf_counter() - began}
        runner.close()
    return {**took, "turns": turns, "commits": count["commits"], "sent": len(inbox.sent)}


WAITING_JOB = replace(JOB, devices=1_000_000)
"""It waits for more boards than there are: no round begins."""


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--boards", type=int, default=10_000, metavar="N")
    options = command.parse_args()
    with tempfile.TemporaryDirectory() as name:
        fleet = Fleet(Path(name) / "state", options.boards)
        rows = [{"births": what, **measure(fleet, fleet.births())} for what in ("first", "after a restart")]
    save(options.out or "reconnects", {"setting": setting("SQLAlchemy"), "boards": options.boards, "rows": rows})


if __name__ == "__main__":
    main()
