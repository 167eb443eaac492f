"""A simulation with all that belongs to it, from settings to the folder that it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import __version__
from fedprune.blobs import BlobStore
from fedprune.disk import storage_errors, write_whole
from fedprune.job import Job
from fedprune_export.imported import Model
from fedprune_server.evaluator import Evaluation
from fedprune_server.measure import Hook, described
from fedprune_server.metrics_table import write_metrics
from fedprune_server.record import Record
from fedprune_server.simulation import Simulation
from fedprune_server.simulation_state import fingerprint
from fedprune_server.trainers import ONNXRUNTIME
from fedprune_server.virtual_device import VirtualDevice
from fedprune_server.weather import Availability, DropOuts, Weather

CONFIG = "config{}.json"
RECORD = "metrics{}.json"
"""Files of a run's folder; a reference's are marked."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """What is to be simulated.

    Attributes:
        title: For people.
        job: The job.
        model: The model.
        devices: The fleet.
        evaluation: The server's own samples, or None.
        calibration: Samples on which it measures batch-norm statistics, or None.
        dropouts: How devices vanish.
        weather: How links and boards vary.
        availability: When devices are there.
        measure: What is measured of the global model, in the simulation alone.
        checkpoints: After every so many rounds the global model is kept; 0 for never.
        trainer: What trains: `onnxruntime` as on boards, or another that `fedprune_server.trainers` knows.
        workers: In how many processes.
    """

    title: str
    job: Job
    model: Model
    devices: tuple[VirtualDevice, ...]
    evaluation: Evaluation | None = None
    calibration: npt.NDArray[np.float32] | None = None
    dropouts: DropOuts = field(default_factory=DropOuts)
    weather: Weather = field(default_factory=Weather)
    availability: Availability = field(default_factory=Availability)
    measure: Hook | None = None
    checkpoints: int = 0
    trainer: str = ONNXRUNTIME
    workers: int = 1

    def simulation(self, folder: Path | None, store: BlobStore) -> Simulation:
        """The simulation, from where the folder's state stands.

        Args:
            folder: Where its state is kept; without it nothing is.
            store: A blob store of its own.

        Raises:
            FedpruneError: As `Simulation`.
        """
        return Simulation(
            self.job,
            self.model,
            self.devices,
            self.evaluation,
            store,
            folder=folder,
            dropouts=self.dropouts,
            calibration=self.calibration,
            weather=self.weather,
            availability=self.availability,
            measure=self.measure,
            checkpoints=self.checkpoints,
            trainer=self.trainer,
            workers=self.workers,
        )

    def settings(self) -> dict[str, Any]:
        """All that decides the run, as JSON: what is large (model, data) by its digest."""
        more: dict[str, Any] = {
            "weather": asdict(self.weather),
            "availability": asdict(self.availability),
            "trainer": self.trainer,
        }
        more["measure"] = described(self.measure)
        digest = fingerprint(
            self.job, self.model, self.devices, asdict(self.dropouts), self.evaluation, self.calibration, more
        )
        return {
            "fedprune": __version__,
            "title": self.title,
            "fingerprint": digest,
            "job": self.job.to_dict(),
            "model": {"name": self.model.architecture.name, "architecture": self.model.architecture.digest},
            "dropouts": asdict(self.dropouts),
            **more,
            "checkpoints": self.checkpoints,
            "evaluation": 0 if self.evaluation is None else len(self.evaluation[1]),
            "calibration": 0 if self.calibration is None else len(self.calibration),
            "devices": [
                {
                    "name": d.name,
                    "profile": d.profile.name,
                    "link": asdict(d.profile.link),
                    "samples": d.samples,
                    "data": d.fingerprint,
                }
                for d in self.devices
            ],
        }


def simulate(
    experiment: Experiment,
    folder: Path | None = None,
    progress: Callable[[Simulation], None] | None = None,
    *,
    suffix: str = "",
    state: str = "run",
) -> Record:
    """Run an experiment to its end, from wherever it stands, and leave its numbers in a folder.

    Args:
        experiment: The experiment.
        folder: Where `config.json`, `metrics.json`, `metrics.parquet` and `rounds.parquet` are written, and where the
            state lies that a killed run goes on from. Without it nothing stays.
        progress: Called after every training and every round.
        suffix: Put before the ending of those files' names, where one folder has several runs.
        state: The folder's folder of the run's state.

    Returns:
        The run's record.

    Raises:
        StorageError: The folder holds another run, or the disk fails.
        FedpruneError: As `Simulation.run`.
    """
    with nullcontext(None) if folder is not None else TemporaryDirectory(prefix="fedprune-blobs-") as scratch:
        place = None if folder is None else folder / state
        if folder is not None and place is not None:
            with storage_errors(f"can't make {place}"):
                place.mkdir(parents=True, exist_ok=True)
        blobs = BlobStore((place or Path(str(scratch))) / "blobs", durable=False)
        simulation = experiment.simulation(place, blobs)
        if folder is not None:
            text = json.dumps(experiment.settings(), indent=1) + "\n"
            write_whole(folder / CONFIG.format(suffix), text.encode())
        simulation.run(progress)
        record = simulation.record(experiment.title)
    if folder is not None:
        record.save(folder / RECORD.format(suffix))
        write_metrics(folder, record, suffix)
    return record
