"""A device in a simulation: real data and real training, on a virtual clock and a virtual link.

Training and evaluation are the board's own code on the very files that an offer names, so a round gives the same bits
as on a board; only the time that it takes comes from the hardware profile.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune import tensorfile
from fedprune.architecture import Architecture
from fedprune.blobs import BlobStore
from fedprune.plan import predict
from fedprune.profile import HardwareProfile
from fedprune.recipe import Recipe
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.fields import ACCURACY_AFTER
from fedprune_device.data import LocalData, log_prior
from fedprune_device.predictor import GRAPH, WEIGHTS, Predictor
from fedprune_device.trainer import Trainer

BLOBS = ("weights", "training", "inference")
"""Entries of an offer that refer to blobs."""


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
    """Where virtual devices do their work: loaded training graphs, and a folder for models to be measured.

    Args:
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.
    """

    def __init__(self, store: BlobStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._trainers: dict[str, Trainer] = {}

    def carry_out(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> Outcome:
        """Do what an offer asks of a device, as a board does.

        Args:
            device: The device.
            offer: The offer.
            number: The round.

        Raises:
            FedpruneError: As on a board: the offer's parts don't fit each other or the data, or numbers are not finite.
        """
        recipe, classes = Recipe.from_dict(offer["recipe"]), int(offer["classes"])
        trainer = self._trainer(offer["training"]["sha256"])
        tensors = tensorfile.decode(self._store.read(offer["weights"]["sha256"]))
        received = self._predictor(offer, self._store.path(offer["weights"]["sha256"]).read_bytes())
        result = trainer.train(
            tensors, device.data, recipe, seed=offer["seed"], device=device.name, round=number, classes=classes
        )
        raw = tensorfile.encode(result.tensors)
        trained = self._predictor(offer, raw)
        metrics = {"loss_first": result.loss_first, "loss_last": result.loss_last}
        data = device.data
        if len(data.y_test):
            offset = log_prior(data.y_train, classes) if recipe.logit_adjustment else None
            metrics["accuracy_before"] = received.accuracy(data.x_test, data.y_test, offset)
            metrics[ACCURACY_AFTER] = trained.accuracy(data.x_test, data.y_test, offset)
        return Outcome(self._store.put(raw), result.samples, result.steps, metrics)

    def _trainer(self, sha256: str) -> Trainer:
        if sha256 not in self._trainers:
            self._trainers = {sha256: Trainer(self._store.read(sha256), threads=1)}
        return self._trainers[sha256]

    def _predictor(self, offer: dict[str, Any], weights: bytes) -> Predictor:
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._store.path(offer["inference"]["sha256"]), self._folder / GRAPH)
        (self._folder / WEIGHTS).write_bytes(weights)
        return Predictor(self._folder, threads=1)
