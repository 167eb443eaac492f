"""One size of fleet behind two aggregators: all processes of it, from the first connection to the last turn's end."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fleet_mixture import SHARES
from benchmarks.regions.one_server import OneServer
from benchmarks.regions.turns import reached
from benchmarks.swarm.audit import audit
from benchmarks.swarm.job import seconds_per_sample, write_job
from benchmarks.swarm.run import phases
from benchmarks.swarm.signer import signing_key
from benchmarks.swarm.site import Site, find_mosquitto, free_port, site
from benchmarks.swarm.updates import device_name
from fedprune.core.errors import ConfigError, FedpruneError
from fedprune.core.toml_file import read_toml
from fedprune_server.config.tables import parse_config
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import APPROVED
from fedprune_server.messaging.broker.broker_files import CONFIG, Broker, write_broker
from fedprune_server.storage.state_folder import FILE
from fedprune_server.storage.storage import Storage
from support.processes.s3 import S3, Ceph, Moto

REGIONS = ("north", "south")
SITE = "default"
CALLERS = 16
"""Boards of each region, in each turn, that live in the process which measures latencies."""

_SETTLED_S, _SETTLED_CPU_S = 2.0, 0.2
_PLAIN = "\nlistener {port} 127.0.0.1\nallow_anonymous true\nmax_connections -1\n"

AGGREGATOR = """\
[server]
site = "default"
state = "{state}"
parent = "wss://127.0.0.1:{parent}"
region = "{region}"
broker = "mqtts://127.0.0.1:{port}"
uploads = "s3"
blobs = "s3://{bucket}/{region}"
max_devices = {most}
"""


@dataclass(frozen=True)
class Size:
    """Size of a run.

    Attributes:
        devices: Boards in all.
        turns: Number of turns; each has an equal part of the boards.
        rounds: Number of rounds; turns between them have none.
        participation: Share of a turn's boards that a round asks.
        scale: Factor of the predicted training times.
        arrivals: Boards that connect in a second.
        moto: Use the mock of S3.
        limit_s: Seconds after which a step is given up.
        seed: Keys the fleet and its noise.
        profile: A folder for cProfile's files of the servers, or None.
    """

    devices: int
    turns: int = 5
    rounds: int = 3
    participation: float = 0.25
    scale: float = 1.0
    arrivals: float = 250.0
    moto: bool = False
    limit_s: float = 1800.0
    seed: int = 0
    profile: Path | None = None

    @property
    def connected(self) -> int:
        return self.devices // self.turns

    @property
    def asked(self) -> int:
        return round(self.participation * self.connected)

    @property
    def active(self) -> list[int]:
        """The turns that have a round, spread over all."""
        last = max(1, self.rounds - 1)
        return [1 + round(i * (self.turns - 1) / last) for i in range(self.rounds)]

    def indices(self, region: int) -> list[tuple[int, int]]:
        """First board of a region, and the one behind its last, in each turn."""
        each = self.connected // len(REGIONS)
        starts = [(turn * len(REGIONS) + region) * each for turn in range(self.turns)]
        return [(start, start + each) for start in starts]


class Meter:
    """CPU seconds of the servers, by phase."""

    def __init__(self, place: Site, names: Sequence[str]) -> None:
        self._place, self._names = place, names
        self.phases: list[dict[str, Any]] = []
        self._before = self._now()
        self.start = dict(self._before)

    def _now(self) -> dict[str, float]:
        self._place.look()
        return {n: self._place.watched[n].cpu_s for n in self._names}

    def settle(self) -> None:
        """Wait until all servers are idle."""
        before = self._now()
        while True:
            time.sleep(_SETTLED_S)
            now = self._now()
            if all(now[n] - before[n] <= _SETTLED_CPU_S for n in self._names):
                return
            before = now

    @contextmanager
    def phase(self, kind: str, turn: int) -> Iterator[None]:
        """Measure the CPU time of the servers for a phase, until all of them are idle."""
        began = time.time()
        yield
        took = time.time() - began
        self.settle()
        now, before = self._now(), self._before
        used = {n: now[n] - before[n] for n in self._names}
        self.phases.append({"phase": kind, "turn": turn, "wall_s": took, "cpu_s": used})
        self._before = now


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Run a fleet in an empty folder.

    Raises:
        FedpruneError: A broker or server doesn't come up, or a step takes too long.
    """
    bucket_server = Moto() if size.moto or shutil.which("radosgw") is None else Ceph()
    try:
        os.environ.update(bucket_server.environment)
        with site(folder) as place:
            return _measure(size, folder, place, bucket_server)
    finally:
        bucket_server.close()


def _measure(size: Size, folder: Path, place: Site, s3: S3) -> dict[str, Any]:
    began = time.time()
    ports = {name: (free_port(), free_port()) for name in ("server", *REGIONS)}
    config = write_job(folder, size.connected, size.rounds, 0, SITE, 4, size.devices)
    keys = _identities(folder / "state", size)
    _brokers(place, folder, ports)
    tier = free_port()
    _server(place, size, "server", [
        "run", "--config", str(config), "--aggregators", f"127.0.0.1:{tier}",
        "--participation", str(size.participation), "--broker", f"mqtts://127.0.0.1:{ports['server'][0]}",
    ])  # fmt: skip
    bucket = s3.bucket()
    for region in REGIONS:
        state = folder / region
        shutil.copytree(folder / "state" / "identity", state / "identity")
        path = folder / f"{region}.toml"
        port = ports[region][0]
        path.write_text(
            AGGREGATOR.format(
                state=state, parent=tier, region=region, port=port, bucket=bucket, most=size.devices + len(REGIONS)
            )
        )
        _server(place, size, region, ["aggregate", "--config", str(path)])
    servers = ("server", *REGIONS)
    meter = Meter(place, servers)
    meter.settle()
    processes = _swarm(place, size, ports, keys)
    meter = Meter(place, servers)
    for turn in range(1, size.turns + 1):
        _turn(place, size, meter, turn)
    _wait(lambda: not any(map(place.alive, processes)), place, size, "the swarm ends", processes)
    place.look()
    for name in reversed(servers):
        place.stop(name)
    took = time.time() - began
    results = {n: json.loads((folder / f"{n}-result.json").read_text()) for n in processes}
    return _found(size, folder, place, meter, results) | {"wall_s": took, "bucket": type(s3).__name__}


def _identities(state: Path, size: Size) -> dict[str, Any]:
    """Give the server an identity, and make all boards members; returns what boards need to verify it."""
    names = {device_name(i): i for i in range(size.devices)}
    names |= {f"caller-{region}-probes": size.devices + i for i, region in enumerate(REGIONS)}
    keys = {n: signing_key(i, size.seed).verifying.hex for n, i in names.items()}
    with IdentityFolder.make(state, SITE) as identity:
        identity.store.mirror(keys, (), whole=True, now=identity.authority.now())
        return {"signing": identity.key.verifying.id.hex(), "authorities": [identity.authority.pin.hex()]}


def _brokers(place: Site, folder: Path, ports: dict[str, tuple[int, int]]) -> None:
    """Start a Mosquitto for each server. Boards of the swarm use a listener without TLS of this machine alone."""
    for name, (port, plain) in ports.items():
        at = folder / f"{name}-broker"
        with IdentityFolder(folder / "state") as identity:
            write_broker(identity, "mosquitto", Broker(("127.0.0.1",), port, free_port(), at, bind="127.0.0.1"), at)
        with (at / CONFIG).open("a") as file:
            file.write("\nuser root\n" + _PLAIN.format(port=plain))
        place.broker_of(f"{name}-broker", find_mosquitto(), at / CONFIG, port)


def _server(place: Site, size: Size, name: str, arguments: list[str]) -> None:
    profile = None if size.profile is None else size.profile / f"{name}.profile"
    place.server_of(name, arguments, profile)


def _swarm(place: Site, size: Size, ports: dict[str, tuple[int, int]], keys: dict[str, Any]) -> list[str]:
    """Start two processes of boards for each region; returns their names."""
    common = {
        "host": "127.0.0.1",
        "site": SITE,
        "seed": size.seed,
        "scale": size.scale,
        "seconds": seconds_per_sample(list(SHARES)),
        "offered": str(place.folder / "offered"),
        "keys": keys,
        "quiet": [turn for turn in range(1, size.turns + 1) if turn not in size.active],
    }
    names = []
    for i, region in enumerate(REGIONS):
        callers = min(CALLERS, size.connected // 8)
        parts = {
            "probes": [(first, first + callers) for first, _ in size.indices(i)],
            "fleet": [(first + callers, last) for first, last in size.indices(i)],
        }
        for kind, turns in parts.items():
            name = f"{region}-{kind}"
            probes = kind == "probes"
            spec = common | {
                "name": name,
                "port": ports[region][1],
                "turns": turns,
                "caller": size.devices + i if probes else None,
                "waits": not probes and i == 0,
                "arrivals": size.arrivals / len(REGIONS),
            }
            path, result = place.folder / f"{name}.json", place.folder / f"{name}-result.json"
            path.write_text(json.dumps(spec))
            place.start(name, [sys.executable, "-m", "benchmarks.regions.turns", path, result])
            names.append(name)
    return names


def _turn(place: Site, size: Size, meter: Meter, turn: int) -> None:
    """Let a turn's boards connect; with the last of them a round begins, if the turn has one; then let them leave."""
    folder = place.folder
    swarm = [f"{region}-{kind}" for region in REGIONS for kind in ("probes", "fleet")]

    def wait(mark: str) -> None:
        _wait(lambda: all((folder / f"{n}-{mark}-{turn}").exists() for n in swarm), place, size, mark, swarm)

    with meter.phase("connect", turn):
        reached(folder / f"go-{turn}")
        wait("ready")
    with meter.phase("round" if turn in size.active else "no round", turn):
        reached(folder / f"last-{turn}")
        if turn in size.active:
            rounds = 1 + size.active.index(turn)
            _wait(lambda: _rounds(folder / "state") >= rounds, place, size, f"round {rounds} ends", swarm)
    with meter.phase("leave", turn):
        reached(folder / f"end-{turn}")
        wait("left")


def _wait(done: Callable[[], bool], place: Site, size: Size, what: str, swarm: Sequence[str]) -> None:
    until = time.monotonic() + size.limit_s
    while not done():
        ended = [n for n in ("server", *REGIONS) if not place.alive(n)]
        ended += [n for n in swarm if not place.alive(n) and not (place.folder / f"{n}-result.json").exists()]
        if ended or time.monotonic() > until:
            logs = "\n".join(f"--- {n}\n{place.said(n)[-3000:]}" for n in (*ended, "server", *REGIONS))
            raise FedpruneError(f"it hasn't happened in time: {what}", hint=logs)
        time.sleep(0.2)


def _rounds(state: Path) -> int:
    """Rounds that have ended, read without a lock."""
    with closing(sqlite3.connect(f"file:{state / FILE}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM rounds").fetchone()[0])


def _found(size: Size, folder: Path, place: Site, meter: Meter, results: dict[str, Any]) -> dict[str, Any]:
    ledger = {name: row for result in results.values() for name, row in result["ledger"].items()}
    state = folder / "state"
    checked = audit(state, folder / "offered", ledger, size.rounds, size.seed, size.asked)
    with Storage.existing(state) as storage:
        closed = {body["round"]: at for _, at, kind, body in storage.log.events() if kind == "Closed"}
        summaries = storage.rounds()
    asked = [q for result in results.values() for q in result["latency"]]
    unanswered = [at for result in results.values() for at in result["open"]]
    models = [s["model"] for s in summaries]
    expected = _one_server(size, folder, summaries, ledger)
    if models != expected:
        checked["faults"].append(f"models are not those of one server: {models}, not {expected}")
    members = dict.fromkeys(REGIONS, 0)
    for region in REGIONS:
        with closing(sqlite3.connect(f"file:{folder / region / FILE}?mode=ro", uri=True)) as database:
            query = "SELECT count(*) FROM members WHERE status = ?"
            members[region] = int(database.execute(query, (APPROVED,)).fetchone()[0])
    return {
        "devices": size.devices,
        "connected": size.connected,
        "asked": size.asked,
        "active": size.active,
        "members": members,
        "rounds": [phases(r + 1, ledger, summaries, closed, asked, unanswered) for r in range(size.rounds)],
        "models": models,
        "one_server": expected,
        "phases": meter.phases,
        "start_cpu_s": meter.start,
        "watched": {n: {k: v for k, v in vars(w).items() if k[0] != "_"} for n, w in place.watched.items()},
        "traffic": {k: sum(r["traffic"][k] for r in results.values()) for k in ("sent", "received")},
        "uploads": {k: sum(r["uploads"][k] for r in results.values()) for k in ("bytes", "failed")},
        "lost_connections": sum(r["lost"] for r in results.values()),
        "audit": checked,
    }


def _one_server(size: Size, folder: Path, summaries: list[dict[str, Any]], ledger: dict[str, Any]) -> list[str]:
    """Digests of the models that one server makes of the updates that boards were asked for."""
    rounds = []
    for summary in summaries:
        took_part = {n: row for n, row in ledger.items() if str(summary["round"]) in row["parts"]}
        rounds.append({int(n.rpartition("-")[2]): (n, row["samples"]) for n, row in sorted(took_part.items())})
    config = parse_config(read_toml(folder / "fleet.toml", ConfigError), "fleet.toml", folder)
    return OneServer(config, folder / "one-server", next(iter(SHARES)), size.seed).models(rounds)
