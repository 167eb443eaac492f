"""Whether every update counts once: what devices say, what the server says, and what the model says, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.swarm.updates import mean
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune_server.storage.storage import Storage

Ledger = Mapping[str, Mapping[str, Any]]

_UNIT = 2.0**-34
"""The server adds up whole multiples of about so much, which shows where a mean is almost 0."""


def audit(folder: Path, ledger: Ledger, rounds: int, seed: int, database: str | None = None) -> dict[str, Any]:
    """Compare a finished job with the devices' ledger. `folder` is the run's: `state` is the server's (in PostgreSQL,
    if there is a `database`), `offered` has the weights that devices were offered, by digest. The ledger has by device
    its samples and, by round, its part; `seed` is that of the devices' noise. Returns by round what was found, and
    `faults`: all that is not as it should be, in words."""
    faults: list[str] = []
    state, offered = folder / "state", folder / "offered"
    with Storage.open_in(state, database) as storage:
        summaries, known = storage.rounds(), {row["name"] for row in storage.devices()}
        events = [(number, kind, body) for number, _, kind, body in storage.log.events()]
    if known != set(ledger):
        faults.append(f"the server knows {len(known)} devices, {len(known & set(ledger))} of the fleet's {len(ledger)}")
    if len(summaries) != rounds:
        faults.append(f"{len(summaries)} rounds were finished, not {rounds}")
    store = BlobStore(state / "blobs", durable=False)
    found = [_round(s, ledger, store, offered, seed, faults) for s in summaries]
    whole = bool(events) and events[0][0] == 1  # a long log's beginning is deleted
    logged = _logged([(kind, body) for _, kind, body in events], whole, ledger, faults)
    return {"rounds": found, "events": logged, "whole_log": whole, "faults": faults}


def _round(
    summary: Mapping[str, Any], ledger: Ledger, store: BlobStore, offered: Path, seed: int, faults: list[str]
) -> dict[str, Any]:
    number = summary["round"]
    counted = {n for n, d in summary["devices"].items() if d["progress"] == "folded"}
    parts = {n: row["parts"].get(str(number)) for n, row in ledger.items()}
    told = {n for n, p in parts.items() if p is not None and p["weights"] in p["accepted"]}
    where = f"round {number}"
    if counted != set(ledger):
        faults.append(f"{where}: {len(counted)} of {len(ledger)} devices' updates count")
    if told != counted:
        faults.append(
            f"{where}: {len(told - counted)} accepted updates don't count, {len(counted - told)} count unaccepted"
        )
    strange = [n for n, p in parts.items() if p is not None and set(p["accepted"]) - {p["weights"]}]
    if strange:
        faults.append(f"{where}: {len(strange)} devices were told of updates that are not theirs, such as {strange[0]}")
    bases = {p["base"] for p in parts.values() if p is not None}
    if len(bases) != 1:
        faults.append(f"{where}: devices began with {len(bases)} different weights")
        return {"round": number, "counted": len(counted)}
    indices = [(_index(n), ledger[n]["samples"]) for n in sorted(counted) if n in ledger]
    return {
        "round": number,
        "counted": len(counted),
        **_model(summary, store, offered / bases.pop(), indices, seed, faults),
    }


def _model(
    summary: Mapping[str, Any], store: BlobStore, base: Path, parts: list[tuple[int, int]], seed: int, faults: list[str]
) -> dict[str, Any]:
    """The global model beside the mean that numpy makes of all updates anew."""
    number = summary["round"]
    if not parts:
        return {}
    offered = base.read_bytes()
    expected, samples = mean(offered, parts, number, seed)
    now = tensorfile.decode(store.read(summary["model"]))  # in the order of the model, which is not that of offers
    model = np.concatenate([now[name].ravel() for name in tensorfile.decode(offered)]).astype(np.float64)
    wrong = model - expected
    # What one device's mark alone adds at its own coordinate; so each mark tells how often it is in there.
    shares = np.array([count / samples for _, count in parts])
    times = 1 + wrong[[index for index, _ in parts]] / shares
    last_place = np.spacing(np.abs(expected).astype(np.float32))
    error, ulps = float(np.abs(wrong).max()), float((np.abs(wrong) / last_place).max())
    if np.abs(times - 1).max() > 0.1:
        worst = int(np.argmax(np.abs(times - 1)))
        faults.append(f"round {number}: update of device {parts[worst][0]} counts {times[worst]:.2f} times")
    if (np.abs(wrong) > last_place + _UNIT).any():
        faults.append(f"round {number}: the model is {error:.2g} away from the mean of all updates")
    return {
        "samples": samples,
        "error": error,
        "ulps": ulps,
        "least_mark": float(shares.min()),
        "least_times": float(times.min()),
        "most_times": float(times.max()),
    }


def _logged(events: list[tuple[str, dict[str, Any]]], whole: bool, ledger: Ledger, faults: list[str]) -> dict[str, int]:
    """The log of events, as far back as it reaches: each update stored once, and folded once."""
    for kind in ("UpdateStored", "Folded"):
        times = Counter((body["device"], body["round"]) for name, body in events if name == kind)
        often = [key for key, n in times.items() if n > 1]
        if often:
            faults.append(f"{len(often)} parts have several events {kind}, such as {often[0]}")
    stored = {(b["device"], str(b["round"])): b["weights"] for name, b in events if name == "UpdateStored"}
    handed = {(n, r): p["weights"] for n, row in ledger.items() for r, p in row["parts"].items() if p["weights"]}
    strange, missing = stored.items() - handed.items(), handed.items() - stored.items()
    if strange or (whole and missing):
        faults.append(f"{len(strange or missing)} updates handed in are not those of the log")
    return dict(Counter(kind for kind, _ in events))


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])
