"""FedAvg as `fedprune-simulate` runs it: `python -m benchmarks.simulation.ours FOLDER ROUNDS OUT`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.simulation.stamps import Stamps
from fedprune.core import tensorfile
from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
from fedprune_server.simulation.results.run_folder import simulate_in_folder
from fedprune_server.simulation.simulation import Simulation


def main(folder: Path, rounds: int, out: Path) -> None:
    plan = read_fleet_plan(
        folder / "fleet.toml", rounds=rounds, changes={"simulation": {"workers": os.cpu_count() or 1}}
    )  # fmt: skip
    stamps = Stamps()

    def stamp(simulation: Simulation) -> None:
        if len(simulation.state.history) > len(stamps.at):
            if not stamps.at:
                state = tensorfile.decode(simulation.store.read(simulation.state.model))
                np.savez(out.with_suffix(".npz"), **state)  # type: ignore[arg-type]
            stamps.add()

    with TemporaryDirectory() as run:
        record, _ = simulate_in_folder(plan, Path(run), stamp)
    accuracies = [row.metrics["accuracy"] for row in record.rounds]
    out.write_text(json.dumps({**stamps.result(), "accuracies": accuracies, "threads": 1}))


if __name__ == "__main__":  # processes that train devices import this module, too
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
