"""A simulation's input: a job with its fleet, data and network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import __version__
from fedprune.jobs.job import Job
from fedprune.strategies import compose
from fedprune.strategies.user_strategies import own_code
from fedprune_export.pruning.model import Model
from fedprune_server.executor.evaluator import Evaluation
from fedprune_server.simulation.datasets.federation import Partition
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import Hook, described
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather

REFERENCE = "FedAvg"
"""Title of the reference run, see `fedavg`."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A simulation's input.

    Attributes:
        evaluation: The server's test samples, or None.
        calibration: The server's samples for batch-norm statistics, or None.
        dropouts: Devices that disconnect during a round.
        weather: Variation of links and boards.
        availability: Windows of time in which devices are connected.
        measure: Additional measurements of the global model.
        checkpoints: Rounds between two saved global models; 0 for none.
        cuda: Whether devices train on an NVIDIA GPU where that works; results differ from a CPU's by rounding.
        partition: The fleet's data as reports show it.
    """

    title: str
    job: Job
    model: Model
    devices: Sequence[VirtualDevice]
    evaluation: Evaluation | None = None
    calibration: npt.NDArray[np.float32] | None = None
    dropouts: DropOuts = field(default_factory=DropOuts)
    weather: Weather = field(default_factory=Weather)
    availability: Availability = field(default_factory=Availability)
    measure: Hook | None = None
    checkpoints: int = 0
    workers: int = 1
    cuda: bool = False
    partition: Partition = field(default_factory=Partition)

    @property
    def extends(self) -> bool:
        """Whether a finished run can be continued with more rounds as if it had had them from the start.

        An asynchronous job drops unfinished trainings at its end, and a user's strategy may depend on the number of
        rounds.
        """
        schedule = compose(self.job).schedule
        return ":" not in self.job.strategy and not (schedule is not None and schedule.asynchronous)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides the run, except the number of rounds where it `extends`.

        The model counts with its graph, fedprune's code by its version, a user's strategy by its files.
        """
        code = [__version__, own_code(self.job)]
        job = self.job.to_dict()
        if self.extends:
            del job["rounds"]
        settings = [job, asdict(self.dropouts), self._circumstances(), code]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.model.architecture.digest.encode())
        digest.update(hashlib.sha256(self.model.graph.to_bytes()).digest())
        for device in sorted(self.devices, key=lambda d: d.name):
            data = [device.samples, device.fingerprint, *(["tampers"] if device.tamper else [])]
            digest.update(json.dumps([device.name, device.profile.to_dict(), *data], sort_keys=True).encode())
        _add(digest, self.evaluation or ())
        _add(digest, () if self.calibration is None else (self.calibration,))
        return digest.hexdigest()

    def settings(self) -> dict[str, Any]:
        """Everything that decides the run, as JSON; model and data by their digests."""
        return {
            "fedprune": __version__,
            "title": self.title,
            "fingerprint": self.fingerprint,
            "job": asdict(self.job),
            "model": {"name": self.model.architecture.name, "architecture": self.model.architecture.digest},
            "dropouts": asdict(self.dropouts),
            **self._circumstances(),
            "checkpoints": self.checkpoints,
            "data": self.partition.settings,
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

    def _circumstances(self) -> dict[str, Any]:
        return {
            "weather": asdict(self.weather),
            "availability": asdict(self.availability),
            "measure": described(self.measure),
            "cuda": self.cuda,
        }


def _add(digest: hashlib._Hash, arrays: Iterable[npt.NDArray[Any]]) -> None:
    """Add arrays with types and shapes, so that different lists never add the same bytes."""
    arrays = list(arrays)
    digest.update(json.dumps([[a.dtype.str, a.shape] for a in arrays]).encode())
    for array in arrays:
        digest.update(array.tobytes())


def fedavg(job: Job) -> Job:
    """The reference run: the whole model on every device, plain local training and the plain mean (arXiv:1602.05629).

    It keeps the job's seed, rounds, totals, devices, participation and deadline, and of its recipe the steps, batch,
    loss, optimiser, augmentation, frozen parts and measurement interval.
    """
    plain = replace(
        job.recipe,
        proximal=0.0,
        logit_adjustment=False,
        mask_absent_classes=False,
        balance_classes=False,
        ordered_dropout=(),
        average=0.0,
        blend=0.0,
        mixup=0.0,
        calibrate=False,
        personal=(),
        scale=1.0,
        mask="none",
        mask_threshold=0.0,
        patience=0,
        report_squares=False,
    )
    return replace(
        job,
        name="fedavg",
        strategy="plain",
        options={},
        density=1.0,
        byte_budget=0,
        energy_budget=0.0,
        scorer="ordered",
        rule="coverage",
        server_momentum=0.0,
        warmup_rounds=0,
        recipe=plain,
    )
