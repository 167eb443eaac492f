"""Trains virtual devices by the board's own code, in this process or in others, so that a round gives the same bits."""

from __future__ import annotations

import copy
import mmap
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.disk import storage_errors
from fedprune.core.errors import FedpruneError, TrainingError
from fedprune.core.tensorfile import ALIGNMENT
from fedprune.updates.clipped_noise import GaussianNoise
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import SPLITS, LocalData
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.state_store import MemoryStateStore
from fedprune_device.training.evaluation import MACHINE_METRICS
from fedprune_device.training.round_runner import RoundRunner
from fedprune_device.training.trainer import TrainerCache
from fedprune_server.executor.offer_entries import device_offer
from fedprune_server.process.pools import ProcessPool
from fedprune_server.simulation.fleet.virtual_device import Outcome, StoredData, VirtualDevice

# Devices, in addition to those that train, whose samples and offers wait for a free process: the processes go on with
# them while this one adds updates up, evaluates and saves.
_SPARE_DEVICES = 8

_ARRAY_FIELDS = tuple(f"{kind}_{split}" for split in SPLITS for kind in ("x", "y"))

# A device, its offer, and the round.
TrainingWork = tuple[VirtualDevice, dict[str, Any], int]

# An outcome, and the digest of the board's state from then on.
FinishedTraining = tuple[Outcome, str | None]


class WorkerKilledError(TrainingError):
    """A process that trains devices was killed. That is no board's refusal, but the end of the simulation."""

    def __init__(self) -> None:
        super().__init__(
            "a process that trains devices was killed",
            hint="Did memory run out? Start again with fewer workers: a run with a folder continues from there.",
        )


@dataclass(frozen=True)
class _ArrayInFile:
    offset: int
    shape: tuple[int, ...]
    type: np.dtype[Any]
    is_fortran: bool

    @classmethod
    def append(cls, array: npt.NDArray[Any], file: IO[bytes]) -> _ArrayInFile:
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        offset = file.seek(file.tell() + -file.tell() % ALIGNMENT)
        file.write(np.ascontiguousarray(array.T if is_fortran else array).data)
        return cls(offset, array.shape, array.dtype, is_fortran)

    def map_array(self, pages: mmap.mmap) -> npt.NDArray[Any]:
        array: npt.NDArray[Any]
        array = np.ndarray(self.shape, self.type, pages, self.offset, order="F" if self.is_fortran else "C")
        return array


@dataclass(frozen=True)
class SampleFile:
    """A device's samples, whose arrays are in a file. It can be sent to another process, which maps the file: a pipe
    would copy them four times.

    Attributes:
        arrays: Where the arrays are, by their fields. An array that is two fields is there once.
        other: The samples without their arrays.
    """

    path: Path
    arrays: dict[str, _ArrayInFile]
    other: LocalData

    @classmethod
    def write(cls, path: Path, data: LocalData) -> SampleFile:
        """Write samples into a file. Raises `StorageError` if the disk fails."""
        arrays: dict[str, _ArrayInFile] = {}
        by_id: dict[int, _ArrayInFile] = {}
        other = copy.copy(data)
        with storage_errors(f"can't write {path}"), path.open("wb") as file:
            for name in _ARRAY_FIELDS:
                array = getattr(data, name)
                if isinstance(array, np.ndarray):  # others are on the disk already
                    if id(array) not in by_id:
                        by_id[id(array)] = _ArrayInFile.append(array, file)
                    arrays[name] = by_id[id(array)]
                    object.__setattr__(other, name, None)
            file.truncate(max(file.tell(), 1))  # an empty file can't be mapped
        return cls(path, arrays, other)

    def load(self) -> LocalData:
        """The samples, in pages of the file that are copied where they are written to. The file may be deleted then.
        Raises `StorageError` if it can't be read."""
        with storage_errors(f"can't read {self.path}"), self.path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = {place: place.map_array(pages) for place in self.arrays.values()}
        data = copy.copy(self.other)
        for name, place in self.arrays.items():
            object.__setattr__(data, name, mapped[place])
        return data


class DeviceRunner:
    """Trains virtual devices: one by one in this process or, with several workers, side by side in others.

    A training depends on its offer and the board's state only. So other processes can compute all trainings that are
    under way while this one goes on; the boards' states change when `train` returns an outcome. With `cuda` it trains
    on an NVIDIA GPU, if that works. `state_digests` names, by device, the blob of its board's state between rounds; the
    simulation saves them.
    """

    def __init__(self, store: BlobStore, folder: Path, *, workers: int = 1, cuda: bool = False) -> None:
        self.state_digests: dict[str, str] = {}
        self._store, self._folder = store, folder
        self._workers = workers
        self._sample_files: dict[str, tuple[LocalData, SampleFile]] = {}  # of samples in memory
        self._file_numbers = count()
        self._waiting: dict[str, TrainingWork] = {}  # trainings that no process has begun yet
        self._started: dict[str, tuple[int, Future[FinishedTraining]]] = {}  # those that `train` hasn't returned yet
        self._running: list[Future[FinishedTraining]] = []  # those that occupy a process, also if they were cancelled
        self._local = _LocalRunner(store, folder, cuda=cuda) if workers == 1 else None
        folder.mkdir(parents=True, exist_ok=True)
        make_runner = partial(_helper_runner, store, folder, cuda=cuda)
        self._pool = None if workers == 1 else ProcessPool(workers, make_runner)

    def begin_ahead(self, device: VirtualDevice, offer: dict[str, Any], round_number: int) -> None:
        """Begin a device's training ahead, where other processes train. It replaces any earlier training of the device.

        Raises `WorkerKilledError` if a process was killed.
        """
        if self._pool is not None:
            # A newer offer replaces an older one, as on a board.
            self.cancel(device.name)
            self._waiting[device.name] = device, offer, round_number
            self._begin_next()

    def cancel(self, device: str, round_number: int | None = None) -> None:
        """Drop a device's training, of one round or of any. If a process has begun it, its outcome is dropped."""
        if device in self._waiting and round_number in (None, self._waiting[device][2]):
            del self._waiting[device]
        if device in self._started and round_number in (None, self._started[device][0]):
            self._started.pop(device)[1].cancel()

    def trained_ahead(self) -> set[str]:
        """The blobs of trainings that processes have finished and `train` hasn't returned yet."""
        futures = [future for _, future in self._started.values() if future.done()]
        results = [future.result() for future in futures if future.exception() is None]
        return set().union(*map(_blobs_of, results))

    def train(self, device: VirtualDevice, offer: dict[str, Any], round_number: int) -> Outcome:
        """Carry out an offer as a board does.

        Raises:
            FedpruneError: As on a board: the offer's parts don't fit each other or the data, numbers are not finite, or
                the new model fails its check.
            WorkerKilledError: A process was killed.
        """
        if self._local is not None:
            state_digest = self.state_digests.get(device.name)
            outcome, state_digest = self._local.train(device.name, device.load, offer, round_number, state_digest)
        else:
            outcome, state_digest = self._await_training(device, offer, round_number)
        if state_digest is not None:
            self.state_digests[device.name] = state_digest
        return outcome if device.tamper is None else device.tamper(outcome, offer, self._store)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close(wait=True)  # they write into the folder

    def _await_training(self, device: VirtualDevice, offer: dict[str, Any], round_number: int) -> FinishedTraining:
        """A training's outcome, from a process that may have begun it already."""
        self._waiting.pop(device.name, None)
        if device.name not in self._started:
            self._begin((device, offer, round_number))
        _, future = self._started[device.name]
        self._begin_next()
        while not future.done():
            # Whichever ends first makes room for the next: this training may be the longest of all.
            wait(self._running, return_when=FIRST_COMPLETED)
            self._begin_next()
        del self._started[device.name]
        try:
            finished = future.result()
        except BrokenExecutor as error:
            raise WorkerKilledError from error
        if all(map(self._store.has, _blobs_of(finished))):
            return finished
        # It came to blobs that were superseded, and have been deleted since then: it comes to the same ones again. Once
        # is enough, because this process deletes nothing while it waits here.
        return self._await_training(device, offer, round_number)

    def _begin_next(self) -> None:
        """Begin trainings that wait, as long as processes are free for them."""
        self._running = [future for future in self._running if not future.done()]
        free = self._workers + _SPARE_DEVICES - len(self._running)
        for device in list(islice(self._waiting, max(0, free))):
            self._begin(self._waiting.pop(device))

    def _begin(self, work: TrainingWork) -> None:
        device, offer, round_number = work
        future = Future[FinishedTraining]()
        try:
            samples, state = self._sample_file(device), self.state_digests.get(device.name)
            if self._pool is not None:
                future = self._pool.submit(_LocalRunner.train, device.name, samples.load, offer, round_number, state)
            if isinstance(device.data, StoredData):
                # What doesn't fit in memory may not fit twice on the disk either.
                future.add_done_callback(lambda _: samples.path.unlink(missing_ok=True))
        except BrokenExecutor as error:
            raise WorkerKilledError from error
        except FedpruneError as error:  # of the samples: the board's answer
            future.set_exception(error)
        self._started[device.name] = round_number, future
        self._running.append(future)

    def _sample_file(self, device: VirtualDevice) -> SampleFile:
        """A device's samples for another process."""
        data, file = self._sample_files.get(device.name, (None, None))
        if file is not None and data is device.data:
            return file
        # Samples are read here, because their loader need not be picklable, and no sooner than they are needed.
        file = SampleFile.write(self._folder / f"samples-{next(self._file_numbers)}", device.load())
        if isinstance(device.data, LocalData):
            self._sample_files[device.name] = device.data, file
        return file


def _blobs_of(finished: FinishedTraining) -> set[str]:
    outcome, state_digest = finished
    return {outcome.weights.sha256} | ({state_digest} if state_digest else set())


class _LocalRunner:
    """Trains devices in its process, as a board's agent does."""

    def __init__(self, store: BlobStore, folder: Path, *, cuda: bool) -> None:
        self._store = store
        self._slots = ModelSlots(folder, durable=False)
        self._slots.prepare()
        self._trainer = TrainerCache(keep=True, cuda=cuda)
        self._checked_graphs: set[tuple[str, str]] = set()

    def train(
        self, device: str, load: Callable[[], LocalData], offer: dict[str, Any], round_: int, digest: str | None
    ) -> FinishedTraining:
        state = _BlobState(self._store, digest)

        def noise(offer: Offer) -> GaussianNoise:
            # Keyed noise, which a board never has: a simulation must give the same bits again.
            return GaussianNoise.from_key(offer.seed, offer.round, device, offer.weights.sha256)

        runner = RoundRunner(
            device,
            self._store,
            self._slots,
            load(),
            self._trainer,
            state,
            noise=noise,
            checked_graphs=self._checked_graphs,
        )
        header = {"job": "simulation", "round": round_, "attempt": 0}
        result = runner.carry_out(Offer.from_dict({**header, **device_offer(offer)}))
        result.commit_state()
        update = result.update
        # Times and memory of this machine differ from run to run.
        metrics = {name: value for name, value in update.metrics.items() if name not in MACHINE_METRICS}
        return Outcome(update.weights, update.samples, update.steps, metrics), state.digest


class _BlobState:
    """A board's state between its rounds, a `StateStore` in one blob: `digest`, or None if nothing was kept yet."""

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

    def commit(self, base_slot: str | None) -> None:
        state = MemoryStateStore({} if base_slot is None else {base_slot: self.read()[base_slot]})
        state.stage(self._staged)
        state.commit(base_slot)
        self._staged = b""
        # Sorted, so that equal states have equal digests.
        records = {name: np.frombuffer(data, np.uint8) for name, data in sorted(state.records.items())}
        self.digest = self._store.put(tensorfile.encode(records)).sha256


def _helper_runner(store: BlobStore, folder: Path, *, cuda: bool) -> _LocalRunner:
    """A helper process's runner, with a folder of its own."""
    return _LocalRunner(store, folder / f"process-{os.getpid()}", cuda=cuda)
