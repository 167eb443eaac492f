"""Virtual devices that train side by side, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import FedpruneError, TrainingError
from fedprune_server.process.children import begin_helper
from fedprune_server.simulation.fleet.prepared_runner import Done, PreparedBench
from fedprune_server.simulation.fleet.virtual_device import Bench, Outcome, VirtualDevice, Work

TOGETHER = 64
"""How many offers are known ahead, so that no process waits for another one's device."""

_SPARE = 2
"""So many devices' samples wait beside those that train, so that no process waits for the next."""

Failure = tuple[type[FedpruneError], str, Any, Any, str]
"""What an error said."""

_bench: Bench | None = None
"""In a helper's process: its bench."""


class PooledBench(PreparedBench):
    """A bench whose devices train in other processes; each is worked out as it would be alone, to the same bits.

    Args:
        workers: How many processes.
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.
        cuda: Whether they train on an NVIDIA GPU, if that works.
    """

    def __init__(self, workers: int, store: BlobStore, folder: Path, *, cuda: bool = False) -> None:
        super().__init__(store, folder, TOGETHER)
        self._processes = workers
        self._pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),  # a thread may hold any lock at the moment of a fork
            _begin,
            (os.getpid(), store.root, folder, cuda),
        )

    def ahead(self, work: Sequence[Work]) -> list[Done | Exception]:
        """See `PreparedBench.ahead`.

        Raises:
            TrainingError: A process was killed.
        """
        futures: list[Future[Done | Failure]] = []
        results: list[Done | Exception] = []
        try:
            for device, offer, number in work:
                # Samples are read here, since how they are read need not be known in other processes, and no sooner
                # than they are needed: a training takes much longer than to read them.
                if len(futures) - len(results) >= self._processes + _SPARE:
                    results.append(_result(futures[len(results)]))
                near = VirtualDevice(device.name, device.profile, device.load())
                futures.append(self._pool.submit(_carry_out, near, offer, number, self.boards.get(device.name)))
            results += [_result(f) for f in futures[len(results) :]]
        except BrokenExecutor as error:
            raise TrainingError(
                "a process that trains devices was killed",
                hint="Did memory run out? Start again with fewer workers: a run with a folder goes on where it stood.",
            ) from error
        return results

    def carry_out(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> Outcome:
        """See `PreparedBench.carry_out`; what wasn't prepared is done in another process, too."""
        if not self.holds(device, offer, number):
            self.prepare([(device, offer, number)])
        return super().carry_out(device, offer, number)

    def close(self) -> None:
        """Let the processes go."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int, blobs: Path, folder: Path, cuda: bool) -> None:
    global _bench
    begin_helper(parent)
    place = folder / f"process-{multiprocessing.current_process().pid}"
    _bench = Bench(BlobStore(blobs, durable=False), place, cuda=cuda)


def _carry_out(device: VirtualDevice, offer: dict[str, Any], number: int, board: str | None) -> Done | Failure:
    if _bench is None:
        raise RuntimeError("this is no helper's process")
    _bench.boards = {} if board is None else {device.name: board}
    try:
        outcome = _bench.carry_out(device, offer, number)
    except FedpruneError as error:
        return type(error), error.what, _plain(error.expected), _plain(error.got), error.hint
    return outcome, _bench.boards.get(device.name)


def _result(future: Future[Done | Failure]) -> Done | Exception:
    found = future.result()
    if not isinstance(found[0], type):
        return found
    kind, what, expected, got, hint = found
    return kind(what, expected=expected, got=got, hint=hint)


def _plain(value: object) -> object:
    """What can be sent to another process, whatever it was."""
    return None if value is None else str(value)
