"""A device in a simulation: real data and real training, on a virtual clock and a virtual link.

Training and evaluation are the board's own code on the very files that an offer names, so a round gives the same bits
as on a board; only the time that it takes comes from the hardware profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import predict
from fedprune.planning.profile import HardwareProfile
from fedprune.updates.privacy import GaussianNoise
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.stored_array import StoredArray
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.local_state import MemoryStateStore
from fedprune_device.training.round_runner import MEASURED, RoundRunner, TrainerCache
from fedprune_server.executor.offers import sent

_BLOBS = ("weights", "training", "inference")
"""Entries of an offer that refer to blobs."""

_JOB = "simulation"
"""The job's name in offers that nobody sees."""


def pulls(offer: Mapping[str, Any], held: Collection[str]) -> dict[str, int]:
    """What a board needs for an offer: bytes on its way to it, by the digest of what it has then.

    Args:
        offer: The offer's entries.
        held: What the board holds already; weights that it can decode with that are as short as they come.
    """
    refs = [offer[k] for k in (*_BLOBS, "mask", "moved") if offer.get(k)]
    pulled, coded = {r["sha256"]: int(r["size"]) for r in refs}, offer.get("coded")
    if coded and offer.get("held", coded["sha256"]) in (*held, coded["sha256"]):
        pulled[offer["weights"]["sha256"]] = int(coded["size"])
    return pulled


@dataclass(frozen=True)
class StoredData:
    """Samples that are read when they are needed, and forgotten afterwards: a thousand devices' don't fit in memory.

    Attributes:
        samples: Training samples.
        fingerprint: Digest of all samples and labels.
        load: Reads them; the same ones every time.
    """

    samples: int
    fingerprint: str
    load: Callable[[], LocalData]

    @classmethod
    def of(cls, load: Callable[[], LocalData]) -> StoredData:
        """Look once at what a function reads.

        Raises:
            DataError: It can't be read.
        """
        data = load()
        return cls(data.samples, fingerprint(data), load)


@dataclass(frozen=True)
class VirtualDevice:
    """A board that exists as a profile and data.

    Attributes:
        name: Its name.
        profile: What kind of board it is.
        data: Its own samples, or where they are read.
    """

    name: str
    profile: HardwareProfile
    data: LocalData | StoredData

    @property
    def samples(self) -> int:
        """Training samples."""
        return self.data.samples

    @cached_property
    def fingerprint(self) -> str:
        """Digest of its samples and labels."""
        return self.data.fingerprint if isinstance(self.data, StoredData) else fingerprint(self.data)

    def load(self) -> LocalData:
        """Its samples.

        Raises:
            DataError: They can't be read.
        """
        return self.data.load() if isinstance(self.data, StoredData) else self.data

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
        return predict(architecture, widths, self.profile, recipe, self.samples).train_s


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


Work = tuple[VirtualDevice, dict[str, Any], int]
"""A device, what it is offered, and the round."""


class BlobShelf:
    """What a board keeps between its rounds (`fedprune_device.storage.local_state`), in one blob.

    Args:
        store: Where the blob lies.
        digest: The blob; None where nothing was kept yet.

    Attributes:
        digest: The blob as it is now.
    """

    def __init__(self, store: BlobStore, digest: str | None) -> None:
        self._store = store
        self._staged = b""
        self.digest = digest

    def read(self) -> dict[str, bytes]:
        """See `fedprune_device.storage.local_state.StateStore`.

        Raises:
            StorageError: The blob isn't there or is damaged.
        """
        if self.digest is None:
            return {}
        return {name: record.tobytes() for name, record in tensorfile.decode(self._store.read(self.digest)).items()}

    def stage(self, record: bytes) -> None:
        """See `fedprune_device.storage.local_state.StateStore`."""
        self._staged = record

    def commit(self, neighbour: str | None) -> None:
        """See `fedprune_device.storage.local_state.StateStore`."""
        shelf = MemoryStateStore({} if neighbour is None else {neighbour: self.read()[neighbour]})
        shelf.stage(self._staged)
        shelf.commit(neighbour)
        self._staged = b""
        kept = {name: np.frombuffer(data, np.uint8) for name, data in sorted(shelf.records.items())}
        self.digest = self._store.put(tensorfile.encode(kept)).sha256


class Bench:
    """Where virtual devices do their work: the board's own workbench, over the simulation's blobs.

    Args:
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.
        cuda: Whether it trains on an NVIDIA GPU, if that works.

    Attributes:
        together: How many offers it likes to know of at once, see `prepare`.
        boards: Digest of what each board keeps between its rounds, a blob of the store; the simulation saves this.
    """

    together: int = 1

    def __init__(self, store: BlobStore, folder: Path, *, cuda: bool = False) -> None:
        self.boards: dict[str, str] = {}
        self._store = store
        self._slots = ModelSlots(folder, lasting=False)
        self._slots.prepare()
        self._trainer = TrainerCache(keep=True, cuda=cuda)

    def prepare(self, work: Sequence[Work]) -> None:
        """Hear of offers that will probably be carried out next; nothing that lasts may come of it.

        Args:
            work: At most `together` of them, of one round and of different devices, sorted by these.
        """

    def forget_but(self, under_way: Collection[tuple[str, int, str]]) -> None:
        """Hear what of that may still be carried out: a server cancels some.

        Args:
            under_way: Device, round and digest of the weights that it was sent.
        """

    def close(self) -> None:
        """Let go of whatever helps; the bench isn't used any more."""

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
        outcome, board = self.work(device, offer, number, self._trainer, self._slots)
        if board is not None:
            self.boards[device.name] = board
        return outcome

    def work(
        self, device: VirtualDevice, offer: dict[str, Any], number: int, trainer: TrainerCache, slots: ModelSlots
    ) -> tuple[Outcome, str | None]:
        """Do the work without keeping what the board keeps: the outcome, and the digest of that.

        Args:
            device: The device.
            offer: The offer.
            number: The round.
            trainer: Loads the training graph.
            slots: Where models are staged.

        Raises:
            FedpruneError: As `carry_out`.
        """
        shelf = BlobShelf(self._store, self.boards.get(device.name))

        def noise(offer: Offer) -> GaussianNoise:
            return GaussianNoise.keyed(offer.seed, offer.round, device.name, offer.weights.sha256)

        bench = RoundRunner(device.name, self._store, slots, device.load(), trainer, shelf, noise=noise)
        made = bench.make(Offer(_JOB, number, 0, **sent(offer)))
        made.keep()
        update = made.update
        # Times and memory of this machine would make every run another one.
        metrics = {name: value for name, value in update.metrics.items() if name not in MEASURED}
        return Outcome(update.weights, update.samples, update.steps, metrics), shelf.digest


def fingerprint(data: LocalData) -> str:
    """Digest of a device's samples and labels with their types and shapes."""
    digest = hashlib.sha256()
    for field in fields(data):
        array = getattr(data, field.name)
        if array is not None:  # a split that there is not
            digest.update(json.dumps([field.name, array.dtype.str, array.shape]).encode())
            for chunk in array.chunks() if isinstance(array, StoredArray) else (array,):
                digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
