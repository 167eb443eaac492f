"""Training of virtual devices by the board's own code on the files that an offer names.

So a round gives the same bits as on a board, in this process or in others.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import FedpruneError, TrainingError
from fedprune.updates.privacy import GaussianNoise
from fedprune.wire.messages import Offer
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.local_state import MemoryStateStore
from fedprune_device.training.round_runner import MEASURED, RoundRunner, TrainerCache
from fedprune_server.executor.offers import sent
from fedprune_server.process.pools import ProcessPool
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice

MOST_AHEAD = 64
"""Offers that are trained together, so that no process waits for another one's device."""

_SPARE = 2
"""Devices, in addition to those that train, whose samples are in memory, so that no process waits for the next."""


@dataclass(frozen=True)
class Outcome:
    """A device's announcement after its training."""

    weights: BlobRef
    samples: int
    steps: int
    metrics: dict[str, float]


Work = tuple[VirtualDevice, dict[str, Any], int]
"""A device, its offer, and the round."""

Key = tuple[str, int, str]
"""Identity of a training: device, round, and digest of the weights that were sent."""

Done = tuple[Outcome, str | None]
"""An outcome, and the digest of the board's state from then on."""


def key_of(device: str, offer: dict[str, Any], number: int) -> Key:
    return device, number, offer["weights"]["sha256"]


class DeviceRunner:
    """Trains virtual devices: one by one in this process or, with several workers, side by side in others.

    A training depends on its offer and the board's state alone. So all trainings that are under way can be computed
    ahead; the boards' states change when `carry_out` returns an outcome.

    Args:
        cuda: Whether to train on an NVIDIA GPU, if that works.

    Attributes:
        boards: Digest of each board's state between rounds, a blob of the store; the simulation saves this.
    """

    def __init__(self, store: BlobStore, folder: Path, *, workers: int = 1, cuda: bool = False) -> None:
        self.boards: dict[str, str] = {}
        self._workers = workers
        self._ready: dict[Key, Done | FedpruneError] = {}
        self._local: _LocalRunner | None = None
        self._pool: ProcessPool[_LocalRunner] | None = None
        if workers == 1:
            self._local = _LocalRunner(store, folder, cuda=cuda)
        else:
            self._pool = ProcessPool(workers, partial(_runner, store.root, folder, cuda=cuda))

    @property
    def blobs(self) -> set[str]:
        """Blobs of outcomes that were computed ahead."""
        done = [result for result in self._ready.values() if not isinstance(result, FedpruneError)]
        return {blob for outcome, board in done for blob in (outcome.weights.sha256, board) if blob}

    def prepare(self, work: Sequence[Work]) -> None:
        """Train devices ahead, where other processes do it.

        Args:
            work: Trainings of different devices that are under way, most urgent first; at most `MOST_AHEAD` are done.

        Raises:
            TrainingError: A process was killed.
        """
        if self._pool is None:
            return
        new = [item for item in work if key_of(item[0].name, *item[1:]) not in self._ready][:MOST_AHEAD]
        futures: list[Future[Done]] = []
        try:
            for device, offer, number in new:
                # Samples are read here, because their loader need not be picklable, and no sooner than they are needed:
                # a training takes much longer than reading them.
                if len(futures) >= self._workers + _SPARE:
                    futures[len(futures) - self._workers - _SPARE].exception()
                near = VirtualDevice(device.name, device.profile, device.load())
                futures.append(self._pool.submit(_LocalRunner.train, near, offer, number, self.boards.get(device.name)))
            for (device, offer, number), future in zip(new, futures, strict=True):
                self._ready[key_of(device.name, offer, number)] = _result(future)
        except BrokenExecutor as error:
            raise TrainingError(
                "a process that trains devices was killed",
                hint="Did memory run out? Start again with fewer workers: a run with a folder continues from there.",
            ) from error

    def is_ready(self, key: Key) -> bool:
        """Whether a training needs no more preparation."""
        return self._pool is None or key in self._ready

    def forget_but(self, under_way: Collection[Key]) -> None:
        """Drop the outcomes of trainings that were cancelled."""
        self._ready = {key: result for key, result in self._ready.items() if key in under_way}

    def carry_out(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> Outcome:
        """Carry out an offer as a board does. Raises `FedpruneError` as on a board: the offer's parts don't fit each
        other or the data, numbers are not finite, or the new model fails its check."""
        if self._local is not None:
            outcome, board = self._local.train(device, offer, number, self.boards.get(device.name))
        else:
            self.prepare([(device, offer, number)])
            result = self._ready.pop(key_of(device.name, offer, number))
            if isinstance(result, FedpruneError):
                raise result
            outcome, board = result
        if board is not None:
            self.boards[device.name] = board
        return outcome

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close(wait=True)  # they write into the folder


class _LocalRunner:
    def __init__(self, store: BlobStore, folder: Path, *, cuda: bool) -> None:
        self._store = store
        self._slots = ModelSlots(folder, lasting=False)
        self._slots.prepare()
        self._trainer = TrainerCache(keep=True, cuda=cuda)

    def train(self, device: VirtualDevice, offer: dict[str, Any], number: int, board: str | None) -> Done:
        state = _BlobState(self._store, board)

        def noise(offer: Offer) -> GaussianNoise:
            return GaussianNoise.keyed(offer.seed, offer.round, device.name, offer.weights.sha256)

        runner = RoundRunner(device.name, self._store, self._slots, device.load(), self._trainer, state, noise=noise)
        made = runner.make(Offer("simulation", number, 0, **sent(offer)))
        made.keep()
        update = made.update
        # Times and memory of this machine differ from run to run.
        metrics = {name: value for name, value in update.metrics.items() if name not in MEASURED}
        return Outcome(update.weights, update.samples, update.steps, metrics), state.digest


class _BlobState:
    """A board's state between its rounds (`fedprune_device.storage.local_state.StateStore`), in one blob.

    Args:
        digest: The blob; None if nothing was kept yet.
    """

    def __init__(self, store: BlobStore, digest: str | None) -> None:
        self._store = store
        self._staged = b""
        self.digest = digest

    def read(self) -> dict[str, bytes]:
        if self.digest is None:
            return {}
        return {name: record.tobytes() for name, record in tensorfile.decode(self._store.read(self.digest)).items()}

    def stage(self, record: bytes) -> None:
        self._staged = record

    def commit(self, neighbour: str | None) -> None:
        state = MemoryStateStore({} if neighbour is None else {neighbour: self.read()[neighbour]})
        state.stage(self._staged)
        state.commit(neighbour)
        self._staged = b""
        kept = {name: np.frombuffer(data, np.uint8) for name, data in sorted(state.records.items())}
        self.digest = self._store.put(tensorfile.encode(kept)).sha256


def _runner(blobs: Path, folder: Path, *, cuda: bool) -> _LocalRunner:
    """A helper process's runner, with a folder of its own."""
    return _LocalRunner(BlobStore(blobs, durable=False), folder / f"process-{os.getpid()}", cuda=cuda)


def _result(future: Future[Done]) -> Done | FedpruneError:
    """A training's result, or the error by which the board refuses it."""
    try:
        return future.result()
    except FedpruneError as error:
        return error
