"""The folder of a simulated run: its numbers, and the state from which it resumes after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import storage_errors
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.simulation import Simulation

# Numbers, saved state and the run of the reference in a run's folder.
RECORD_FILE, RUN_STATE_FOLDER, REFERENCE_FOLDER = "metrics.json", "run", "reference"


class ScratchStore(BlobStore):
    """The blobs of a simulation, which only its own processes write and read: a store that trusts what it wrote.

    Blobs of an earlier run are verified when read; those of this run aren't, nor in its helper processes, and files
    aren't flushed to disk. `put` hashes a blob once, and not its leaves of 32 KiB, too: nothing is sent in leaves, so
    the reference may be that of a blob of one leaf.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root.resolve(), durable=False)  # a helper may be started in another folder
        self._earlier = frozenset(self.names())

    def put(self, data: bytes | memoryview) -> BlobRef:
        digest = hashlib.sha256(data)
        ref = BlobRef(digest.hexdigest(), len(data), hashlib.sha256(digest.digest()).hexdigest())
        if not self._is_complete(ref):
            self.check_room(ref.size)
            self.write_file(self.path(ref.sha256), data)
        return ref

    def _check_digest(self, sha256: str, data: bytes | memoryview) -> None:
        if sha256 in self._earlier:
            super()._check_digest(sha256, data)


def simulate_in_folder(
    experiment: Experiment,
    folder: Path | None = None,
    progress: Callable[[Simulation], None] | None = None,
    *,
    on_begin: Callable[[Simulation], None] | None = None,
) -> tuple[Record, Model]:
    """Run an experiment to its end, from its last saved state; returns its record and the last global model.

    Args:
        folder: Where the record is written as `metrics.json`, and the state is saved. None saves nothing.
        progress: Called after every training and every round.
        on_begin: Called once, before the first training.

    Raises:
        StorageError: The folder holds another run, or the disk fails.
        FedpruneError: As `Simulation.run`.
    """
    with nullcontext(None) if folder is not None else TemporaryDirectory(prefix="fedprune-blobs-") as scratch:
        state_folder = None if folder is None else folder / RUN_STATE_FOLDER
        if folder is not None and state_folder is not None:
            with storage_errors(f"can't make {state_folder}"):
                state_folder.mkdir(parents=True, exist_ok=True)
        blobs = ScratchStore((state_folder or Path(str(scratch))) / "blobs")
        simulation = Simulation(experiment, blobs, folder=state_folder)
        simulation.run(progress, on_begin)
        record = simulation.record()
        if folder is not None:
            record.save(folder / RECORD_FILE)
        return record, simulation.trained_model()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, also after its state was deleted to start again."""
    return (folder / RUN_STATE_FOLDER).is_dir() or (folder / RECORD_FILE).is_file()
