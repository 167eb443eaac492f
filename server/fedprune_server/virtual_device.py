"""A device in a simulation: real data and real training, on a virtual clock and a virtual link.

Training and evaluation are the board's own code on the very files that an offer names, so a round gives the same bits
as on a board; only the time that it takes comes from the hardware profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.architecture import Architecture
from fedprune.blobs import BlobStore
from fedprune.prediction import predict
from fedprune.profile import HardwareProfile
from fedprune.recipe import Recipe
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.messages import Offer
from fedprune_device.assignment import MEASURED, LoadedTrainer, Workbench
from fedprune_device.data import LocalData
from fedprune_device.slots import Slots
from fedprune_server.uploads import sent

BLOBS = ("weights", "training", "inference")
"""Entries of an offer that refer to blobs."""

_JOB = "simulation"
"""The job's name in offers that nobody sees."""


@dataclass(frozen=True)
class VirtualDevice:
    """A board that exists as a profile and data.

    Attributes:
        name: Its name.
        profile: What kind of board it is.
        data: Its own samples.
    """

    name: str
    profile: HardwareProfile
    data: LocalData

    def download_s(self, size: int) -> float:
        """Seconds until `size` bytes from the server are here."""
        link = self.profile.link
        return link.latency_s + size / link.down_bytes_s

    def upload_s(self, size: int) -> float:
        """Seconds until `size` bytes from here are at the server."""
        link = self.profile.link
        return link.latency_s + size / link.up_bytes_s

    def train_s(self, architecture: Architecture, widths: tuple[int, ...], recipe: Recipe) -> float:
        """Seconds that the planner expects the training of a round to take."""
        return predict(architecture, widths, self.profile, recipe, self.data.samples).train_s


@dataclass(frozen=True)
class Outcome:
    """What a device announces after its training.

    Attributes:
        weights: The trained weights.
        samples: Samples behind them.
        steps: Optimiser steps taken.
        metrics: What it measured.
    """

    weights: BlobRef
    samples: int
    steps: int
    metrics: dict[str, float]


class Bench:
    """Where virtual devices do their work: the board's own workbench, over the simulation's blobs.

    Args:
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.
    """

    def __init__(self, store: BlobStore, folder: Path) -> None:
        self._store = store
        self._slots = Slots(folder)
        self._slots.prepare()
        self._trainer = LoadedTrainer(keep=True)

    def carry_out(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> Outcome:
        """Do what an offer asks of a device, as a board does.

        Args:
            device: The device.
            offer: The offer.
            number: The round.

        Raises:
            FedpruneError: As on a board: the offer's parts don't fit each other or the data, numbers are not finite, or
                the new model fails its check.
        """
        bench = Workbench(device.name, self._store, self._slots, device.data, self._trainer)
        update = bench.make(Offer(_JOB, number, 0, **sent(offer))).update
        # Times and memory of this machine would make every run another one.
        metrics = {name: value for name, value in update.metrics.items() if name not in MEASURED}
        return Outcome(update.weights, update.samples, update.steps, metrics)
