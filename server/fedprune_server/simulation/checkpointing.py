"""Saving a simulation: its state while it runs, and its global models as checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.coordination import State
from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import storage_errors
from fedprune_export.bundles.inference import WEIGHTS_FILE, inference_model
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.state import SimulationState, held

_FOLDER = "checkpoints"
_MODEL_FILE = "model.onnx"

_INTERVAL_S = 5.0
"""Seconds between two saves within a round."""

_SHARE = 20.0
"""Saving takes at most 1 / `_SHARE` of the time, except at the ends of short rounds."""

_EXPENSIVE_S = 0.25
"""Duration of a save above which the ends of rounds are skipped, too."""


class RunFolder:
    """Saves and loads a simulation's state, and holds the folder's lock meanwhile.

    Args:
        folder: The folder; None keeps nothing.
        fingerprint: Digest of all that decides the run.
        rounds: The round after which the run ends.
    """

    def __init__(self, folder: Path | None, fingerprint: str, rounds: int) -> None:
        self._folder, self._fingerprint, self._rounds = folder, fingerprint, rounds
        self._saved_at, self._save_s = time.monotonic(), 0.0
        self._stamp: tuple[int, ...] | None = None

    def load(self) -> tuple[SimulationState, State] | None:
        """The saved run with its coordinator's state, or None.

        Raises:
            StorageError: It is damaged, or belongs to another simulation.
        """
        if self._folder is None:
            return None
        self._stamp = SimulationState.stamp(self._folder)
        return SimulationState.load(self._folder, self._fingerprint, self._rounds)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the folder's lock.

        Yields:
            Whether any process has saved there since `load`.

        Raises:
            StorageError: Another process holds it, or the disk fails.
        """
        if self._folder is None:
            yield False
            return
        with held(self._folder):
            changed = SimulationState.stamp(self._folder) != self._stamp
            try:
                yield changed
            finally:
                self._stamp = ()  # what is in memory may be ahead of what was saved

    def due(self, *, round_ended: bool) -> bool:
        """Whether it is time to save and to delete superseded blobs."""
        if self._folder is None:
            return round_ended
        since = time.monotonic() - self._saved_at
        if round_ended:
            return self._save_s <= _EXPENSIVE_S or since >= _SHARE * self._save_s
        return since >= max(_INTERVAL_S, _SHARE * self._save_s)

    def save(self, run: SimulationState, state: State) -> None:
        """Save a run with its coordinator's state.

        Raises:
            StorageError: The disk fails or is full.
        """
        if self._folder is None:
            return
        began = time.monotonic()
        run.save(self._folder, state, self._fingerprint)
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - began

    def write_checkpoint(self, model: Model, number: int, weights: bytes) -> None:
        """Write a global model as `checkpoints/round-000010/model.onnx` and `weights.safetensors`.

        Raises:
            StorageFullError: There is no room.
            StorageError: The disk fails.
        """
        if self._folder is None:
            return
        folder = self._folder / _FOLDER / f"round-{number:06d}"
        with storage_errors(f"can't make {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS_FILE, weights)
        write_whole(folder / _MODEL_FILE, inference_model(model, model.architecture.sizes))
