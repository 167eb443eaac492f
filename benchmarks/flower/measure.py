"""Ten undisturbed rounds of either side: seconds, bytes, memory, and the model that comes out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flower.material import Job, weight_bytes, write_material
from benchmarks.flower.meter import Meter, meter
from benchmarks.flower.sides import Model, Round, Side
from benchmarks.swarm.site import Site, site
from fedprune.core.errors import FedpruneError

LEFT = 2 << 30
"""Bytes of memory that must stay free: who takes more harms whatever else runs on the machine."""

AT_ONCE = 4
"""Clients that are started at a time: all at once they would wait for each other's imports."""

_START_S = 120.0
_ROUND_S = 300.0
_POLL_S = 0.2

Make = Callable[[Site, Job], Side]


@contextmanager
def running(folder: Path, job: Job, make: Make) -> Iterator[tuple[Side, Site, Meter]]:
    """A side with all its clients connected and its job begun; the first client is watched.

    Raises:
        FedpruneError: Something doesn't come up.
    """
    write_material(folder, job)
    with site(folder) as place:
        side = make(place, job)
        side.start_server()
        with meter(side.port) as counted:
            for at in range(0, job.clients, AT_ONCE):
                some = job.names[at : at + AT_ONCE]
                _swapped()
                for name in some:
                    side.start_client(name, counted.port, watch=name == job.names[0])
                wait(lambda some=some: all(map(side.ready, some)), _START_S, f"{some} of {side.title}")  # type: ignore[misc]
            side.submit()
            yield side, place, counted


def wait(until: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something.

    Raises:
        FedpruneError: It doesn't come in time.
    """
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise FedpruneError(f"{what} didn't come in {seconds:g} s")
        time.sleep(_POLL_S)


def measure(folder: Path, job: Job, make: Make, seconds: float) -> tuple[dict[str, Any], Model]:
    """Run a job to its end, or for so many seconds and whole rounds.

    Returns:
        The numbers, and the model that came out.

    Raises:
        FedpruneError: A round takes too long.
    """
    began = time.time()
    with running(folder, job, make) as (side, place, counted):
        last, end, passed, swapped = -1, time.monotonic() + _START_S, (0, 0), 0
        while True:
            done = side.rounds()
            if done and done[-1].number != last:
                last, end, passed = done[-1].number, time.monotonic() + _ROUND_S, (counted.down, counted.up)
            if last >= job.rounds or (last > 0 and time.time() - began > seconds):
                break
            if time.monotonic() > end:
                raise FedpruneError(
                    f"{side.title} is stuck after {done[-1:]}", hint=place.said(side.servers[0])[-2000:]
                )
            place.look()
            swapped = max(swapped, _swapped())
            time.sleep(_POLL_S)
        place.look()
        used = [place.watched[n] for n in side.servers]
        client = place.watched[job.names[0]]
        row = {
            "side": side.title,
            "clients": job.clients,
            "rounds": last,
            "start_s": done[0].at - began,
            "seconds": done[-1].at - done[0].at,
            "round_s": lasted(done),
            "median_round_s": statistics.median(lasted(done)),
            "weight_bytes": weight_bytes(folder),
            "down": passed[0],
            "up": passed[1],
            "connections": counted.connections,
            "server_bytes": sum(w.shared_peak for w in used),
            "server_cpu_s": sum(w.cpu_s for w in used),
            "client_bytes": client.shared_peak,
            "client_processes": 1 + client.children,
            "accuracy": [r.accuracy for r in done[1:]],
            "counted": [r.counted for r in done[1:]],
            "swapped": swapped,
        }
        return row, {n: np.array(v) for n, v in side.model().items()}


def _swapped() -> int:
    """Bytes of swap in use.

    Raises:
        FedpruneError: Memory and swap are nearly used up: better stop before the machine does.
    """
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
    free = sizes["MemAvailable"] + sizes["SwapFree"]
    if free < LEFT:
        raise FedpruneError(
            f"only {free / 1e9:.1f} GB of memory and swap are left", hint="Take fewer clients, or add swap."
        )
    return sizes["SwapTotal"] - sizes["SwapFree"]


def lasted(done: list[Round]) -> list[float]:
    """Seconds of each round, the first from when all clients were there."""
    return [b.at - a.at for a, b in pairwise(done)]


def apart(one: Model, other: Model) -> float:
    """The largest difference of two models' weights."""
    return max(float(np.abs(one[n].astype(np.float64) - other[n]).max()) for n in one)
