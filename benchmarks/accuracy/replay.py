"""First rounds of stored runs, run again by today's code and compared digit by digit.

Differences are compressed before they are sent, so a weight that differs in its last bit changes the number of bytes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.accuracy.figures import Run
from benchmarks.accuracy.protocol import Method, Protocol
from benchmarks.accuracy.run import commit, experiment_of, result_path, rounds_of
from fedprune.core.atomic_file import write_whole
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.run_folder import simulate
from fedprune_server.simulation.simulation import Simulation

VERSIONS = ("0.1.0", "0.2.0")
"""Versions of fedprune that have made runs of tables."""

_COMPARED = ("round", "at", "down", "up", "macs", "density", "active_macs")


def replay(protocol: Protocol, method: Method, seed: int, folder: Path, rounds: int, *, cuda: bool = False) -> str:
    """Run the first rounds of a stored run again; if no number differs, the stored run counts as one of this code.

    Args:
        protocol: The table.
        method: The row.
        seed: The seed.
        folder: The table's folder of results.
        rounds: How many rounds.
        cuda: Whether the run was trained on an NVIDIA GPU.

    Returns:
        What differs; empty if nothing does.
    """
    path = result_path(method, seed, folder, cuda=cuda)
    stored: Run = json.loads(path.read_text())
    experiment = experiment_of(protocol, method, seed, cuda=cuda)
    if stored["fingerprint"] not in fingerprints(experiment):
        return "other settings, data or model"
    running: list[Simulation] = []

    def progress(simulation: Simulation) -> None:
        running[:] = [simulation]
        if len(simulation.state.history) >= rounds:
            raise _EnoughError

    try:
        with TemporaryDirectory(prefix="fedprune-replay-") as scratch:
            simulate(experiment, Path(scratch), progress)
    except _EnoughError:
        pass
    again = [row for row in rounds_of(running[0].record()) if row["measured"]]
    if difference := first_difference(stored["rounds"], again):
        return difference
    stored |= {"key": protocol.key(method, seed, cuda=cuda), "replayed": {"rounds": rounds, "code": commit()}}
    write_whole(path, json.dumps(stored).encode())
    return ""


def fingerprints(experiment: Experiment) -> set[str]:
    """Of this run by each version, whose number is part of a fingerprint."""
    found = set()
    for version in VERSIONS:
        with patch("fedprune_server.simulation.experiment.__version__", version):
            found.add(replace(experiment).fingerprint)
    return found


def first_difference(stored: list[dict[str, Any]], again: list[dict[str, Any]]) -> str:
    """The first number that differs between a stored run and its repeated rounds; empty if all are equal.

    Args:
        stored: The rounds of a run, as they are written.
        again: The repeated rounds.
    """
    before = {row["round"]: row for row in stored}
    if not again:
        return "nothing was measured in these rounds"
    for row in again:
        found = before.get(row["round"], {})
        numbers = {n: (row[n], found.get(n)) for n in _COMPARED}
        numbers |= {n: (v, found.get("measured", {}).get(n)) for n, v in row["measured"].items() if "_loss" not in n}
        for name, (now, then) in numbers.items():
            if now != then:
                return f"round {row['round']}: {name} was {then}, is {now}"
    return ""


class _EnoughError(Exception):
    """The rounds that are compared are over."""
