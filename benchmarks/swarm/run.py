"""One size of swarm, from the first connection to the last round's end, and what it took."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet_mixture import SHARES
from benchmarks.harness import ROOT
from benchmarks.swarm.audit import audit
from benchmarks.swarm.identities import make_site
from benchmarks.swarm.job import ENGINES, seconds_per_sample, write_job
from benchmarks.swarm.probes import CALLER
from benchmarks.swarm.site import Site, site
from benchmarks.swarm.updates import device_name
from fedprune_server.storage.storage import Storage
from support.processes.postgres import Postgres
from support.processes.s3 import Moto

CALLERS = 2
"""Devices that live in the process which measures latencies."""

PROCESSES = ("probes", "fleet")
"""Those in which devices live, by their modules' names."""

_END_S = 150.0


@dataclass(frozen=True)
class Size:
    """What is to be run: `scale` is a factor of the predicted training times, `arrivals` are devices that connect in a
    second; with `engines` PostgreSQL has the state, and boards put updates into a bucket; if it is `signed`, boards and
    server sign their messages, and the server is at the broker over TLS."""

    devices: int
    rounds: int = 1
    scale: float = 1.0
    arrivals: float = 500.0
    pulls: int = 4
    limit_s: float = 3600.0
    seed: int = 0
    engines: bool = False
    signed: bool = False


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Run a swarm in an empty folder.

    Raises:
        FedpruneError: Broker or server don't come up.
    """
    with ExitStack() as stack:
        place = stack.enter_context(site(folder))
        more, database = _engines(place, stack) if size.engines else ("", None)
        broker = f"mqtts://127.0.0.1:{place.tls_port}" if size.signed else f"mqtt://127.0.0.1:{place.port}"
        config = write_job(folder, size.devices, size.rounds, broker, "swarm", size.pulls, more)
        server_key = None
        if size.signed:
            names = [CALLER, *map(device_name, range(size.devices))]
            server_key = make_site(folder / "state", "swarm", names, size.seed, database)
        began = time.time()
        place.broker(signed=size.signed)
        place.server(config, signed=size.signed)
        place.look()
        before = place.watched["server"].cpu_s
        results = _swarm(place, size, server_key)
        place.look()
        place.stop("server")
        watched = {n: {k: v for k, v in vars(w).items() if k[0] != "_"} for n, w in place.watched.items()}
        ledger = ledger_of(folder)
        asked = results["probes"]["latency"]
        checked = audit(folder, ledger, size.rounds, size.seed, database)
        with Storage.open_in(folder / "state", database) as storage:
            closed = {body["round"]: at for _, at, kind, body in storage.log.events() if kind == "Closed"}
            summaries = storage.rounds()
        return {
            "devices": size.devices,
            "signed": size.signed,
            "rounds": [
                _phases(r + 1, ledger, summaries, closed, asked, results["probes"]["open"]) for r in range(size.rounds)
            ],
            "connect_s": results["fleet"]["connected"] - results["fleet"]["began"],
            "wall_s": time.time() - began,
            "watched": watched,
            "server_start_cpu_s": before,
            "traffic": {k: sum(r["traffic"][k] for r in results.values()) for k in ("sent", "received")},
            "lost_connections": sum(r["lost"] for r in results.values()),
            "rejected_messages": sum(r["rejected"] for r in results.values()),
            "audit": checked,
        }


def _engines(place: Site, stack: ExitStack) -> tuple[str, str]:
    """Start PostgreSQL and a bucket's server; returns the settings for them, and the database's address."""
    postgres, bucket = Postgres(), Moto()
    stack.callback(postgres.close)
    stack.callback(bucket.close)
    postgres.start()
    os.environ.update(bucket.environment)
    place.watch("postgres", postgres.pid)
    place.watch("bucket", bucket.pid)
    database = postgres.database()
    return ENGINES.format(database=database, bucket=bucket.bucket()), database


def ledger_of(folder: Path) -> dict[str, Any]:
    """What the devices of both processes wrote down in a run's folder."""
    return {n: row for name in PROCESSES for n, row in _result(folder, name)["ledger"].items()}


def _result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}-result.json").read_text())
    return found


def _swarm(place: Site, size: Size, server_key: str | None) -> dict[str, Any]:
    """Start both processes of the swarm and wait for them."""
    spec = {
        "host": "127.0.0.1",
        "port": place.port,
        "site": "swarm",
        "seed": size.seed,
        "scale": size.scale,
        "arrivals": size.arrivals,
        "seconds": seconds_per_sample(list(SHARES)),
        "limit_s": size.limit_s,
        "offered": str(place.folder / "offered"),
        "puts": size.engines,
        "server_key": server_key,
    }
    processes = {}
    for name, part in zip(PROCESSES, ((0, CALLERS), (CALLERS, size.devices)), strict=True):
        path = place.folder / f"{name}.json"
        path.write_text(json.dumps(spec | {"indices": part}))
        result = place.folder / f"{name}-result.json"
        processes[name] = place.start(name, [sys.executable, "-m", f"benchmarks.swarm.{name}", path, result], cwd=ROOT)
    for name, process in processes.items():
        process.wait(size.limit_s + _END_S)
        if process.returncode:
            raise RuntimeError(f"{name} has failed:\n{place.log_text(name)}")
    return {name: _result(place.folder, name) for name in PROCESSES}


def _phases(
    number: int,
    ledger: dict[str, Any],
    summaries: list[dict[str, Any]],
    closed: dict[int, float],
    asked: list[tuple[str, float, float]],
    unanswered: list[float],
) -> dict[str, Any]:
    """How long the parts of a round took, and what control messages waited meanwhile."""
    parts = [p for row in ledger.values() if (p := row["parts"].get(str(number))) is not None]
    if not parts:
        return {"round": number}
    first, last = min(p["offered"] for p in parts), max(p["offered"] for p in parts)
    accepted = [p["accepted_at"] for p in parts if p["accepted"]]
    end = max(accepted, default=time.time())
    row: dict[str, Any] = {
        "round": number,
        "offered": len(parts),
        "accepted": len(accepted),
        "offers_s": last - first,
        "updates_s": end - first,
        "latency": {
            kind: _quantiles([s for k, at, s in asked if k == kind and first <= at <= end])
            for kind in ("call off", "say again")
        },
        "unanswered": sum(first <= at <= end for at in unanswered),
    }
    ended = next((s["at"] for s in summaries if s["round"] == number), None)
    if ended is not None and number in closed:
        at = closed[number]
        row |= {"close_s": at - end, "evaluate_s": ended - at, "round_s": ended - first}
    return row


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"count": 0}
    p50, p95, p99 = np.quantile(seconds, (0.5, 0.95, 0.99))
    return {"count": len(seconds), "p50": p50, "p95": p95, "p99": p99, "max": max(seconds)}
