"""Stores the serving model on disk: two slots and a pointer, so that one complete model always exists.

A new model is put together in a folder of its own, checked there, moved into the slot that doesn't serve, and then the
pointer is replaced. Readers check digests: after a power cut, or when a card has lost bits, the slot that was good
before serves again.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedprune.core import atomic_file, tensorfile
from fedprune.core.disk import file_digest, storage_errors
from fedprune.core.errors import ConfigError, ModelError, StorageError
from fedprune.core.records import convert_record
from fedprune.model.features import labels_of
from fedprune.runtime.bundle import BASE
from fedprune.runtime.precision_files import FLOAT32, PRECISIONS, served_files
from fedprune_device.data.labels import LogitAdjustment
from fedprune_device.data.scaling import Scaling
from fedprune_device.serving.predictor import GRAPH, WEIGHTS, Predictor
from fedprune_device.serving.reduced_precision import clear_precision

_LOG = logging.getLogger("fedprune.device")
_SLOTS = ("a", "b")
_POINTER_FILE = "serving.json"
_STAGE_FOLDER = "next"
_FILES = {BASE, *(name for precision in (FLOAT32, *PRECISIONS) for name in served_files(precision))}


@dataclass(frozen=True)
class ServingRecord:
    """The model that serves predictions.

    Attributes:
        files: The digests of its files by name: float32's graph and weights, those of the precision that serves, and
            the frozen base, if there is one.
        offset: See `LogitAdjustment`, as for `present`.
        slot: The folder of the model, one of `_SLOTS`.
        scaling: The scale of its inputs and of what it predicts.
    """

    job: str
    round: int
    classes: int
    files: dict[str, str]
    offset: tuple[float, ...] | None = None
    slot: str = ""
    loss: str = "cross_entropy"
    present: tuple[float, ...] | None = None
    precision: str = FLOAT32
    scaling: Scaling = field(default_factory=Scaling)

    @property
    def weights(self) -> str:
        """The digest of its float32 weights."""
        return self.files[WEIGHTS]

    @property
    def adjustment(self) -> LogitAdjustment:
        """The map from its logits to those of the board's own predictions."""
        return LogitAdjustment(self.offset, self.present)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> ServingRecord:
        try:
            record = convert_record(cls, body, "serving model", StorageError)
            labels_of(record.loss)
            lengths = {len(values) for values in (record.offset, record.present) if values is not None}
            if (
                not {GRAPH, WEIGHTS, *served_files(record.precision)} <= record.files.keys() <= _FILES
                or record.slot not in _SLOTS
                or not lengths <= {record.classes}
            ):
                raise ValueError("a value is out of range")
            return record
        except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
            raise StorageError(f"the record of the serving model is not one ({error!r})") from error


class ModelSlots:
    """The serving folder of a device. Reading needs no lock, so predictions work next to a running agent.

    Staged models survive a power cut if `durable`. If `allowed_job` isn't empty, only models of that job are installed.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self._root = root
        self._is_durable = durable
        self.allowed_job = ""

    def prepare(self) -> None:
        for folder in (self._root, *(self._root / n for n in (*_SLOTS, _STAGE_FOLDER))):
            with storage_errors(f"can't write {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
            atomic_file.remove_partial_files(folder)

    @property
    def staging(self) -> Path:
        return self._root / _STAGE_FOLDER

    def stage(self, inference: Path, weights: Path | bytes, base: Path | None = None) -> Path:
        """Put a candidate together, without touching what serves, in a folder that is valid until the next call."""
        folder = self.staging
        _clear_precisions(folder)
        atomic_file.link_or_copy(inference, folder / GRAPH, sync=self._is_durable)
        if base is not None:
            atomic_file.link_or_copy(base, folder / BASE, sync=self._is_durable)
        if isinstance(weights, Path):
            atomic_file.link_or_copy(weights, folder / WEIGHTS, sync=self._is_durable)
        else:
            atomic_file.write_atomically(folder / WEIGHTS, weights, sync=self._is_durable, private=True)
        return folder

    def install(self, record: ServingRecord) -> ServingRecord:
        """Let the staged model serve if its job may; returns its record. On errors the old model stays active."""
        stage = self.staging
        if self.allowed_job not in ("", record.job):
            return record
        if not _is_intact(stage, record):
            raise StorageError("the staged model is not the one to install", hint="The disk may be failing.")
        current = self.current()
        slot = _SLOTS[1] if current is not None and current.slot == _SLOTS[0] else _SLOTS[0]
        record = replace(record, slot=slot)
        _clear_precisions(self._root / slot)
        for name in record.files:
            atomic_file.move_durably(stage / name, self._root / slot / name)
        rows = [record] + ([current] if current is not None else [])
        atomic_file.write_document(self._root / _POINTER_FILE, {"models": [asdict(r) for r in rows]})
        return record

    def current(self) -> ServingRecord | None:
        """The active record: the newest whose files are intact; None without any."""
        try:
            body = atomic_file.read_document(self._root / _POINTER_FILE) or {"models": []}
            rows = [ServingRecord.from_dict(row) for row in body["models"]]
        except StorageError as error:
            _LOG.warning("%s", error)
            return None
        for row in rows:
            if _is_intact(self._root / row.slot, row):
                return row
            _LOG.warning("model of job %s, round %d in slot %s is damaged", row.job, row.round, row.slot)
        return None

    def folder(self, record: ServingRecord) -> Path:
        return self._root / record.slot

    def open(self, threads: int = 1, *, cuda: bool = False) -> tuple[Predictor, ServingRecord]:
        for _ in range(5):  # enough even if several rounds end while a large model is loaded
            record = self.current()
            if record is None:
                raise ModelError(
                    f"no model serves in {self._root.parent} yet",
                    hint="Is it the board's own state folder (`fedprune-device run --state`)? The board must finish a "
                    "round first.",
                )
            folder = self._root / record.slot
            predictor = Predictor(folder / served_files(record.precision)[0], threads=threads, cuda=cuda)
            # An agent may have replaced the files while they were being loaded.
            if _is_intact(folder, record):
                return predictor, record
        raise StorageError("the serving model changes faster than it can be loaded")

    def weights(self, record: ServingRecord) -> bytes:
        path = self._root / record.slot / WEIGHTS
        with storage_errors(f"can't read {path}"):
            raw = path.read_bytes()
        if tensorfile.sha256_hex(raw) != record.weights:
            raise StorageError(f"{path} is damaged")
        return raw

    def installed_at(self) -> float:
        """When the serving model was installed, in seconds since 1970; 0 if none is."""
        try:
            return (self._root / _POINTER_FILE).stat().st_mtime
        except OSError:
            return 0.0


def _is_intact(folder: Path, record: ServingRecord) -> bool:
    try:
        return all(file_digest(folder / name) == digest for name, digest in record.files.items())
    except OSError:
        return False


def _clear_precisions(folder: Path) -> None:
    """Delete what another model left at lower precision."""
    for precision in PRECISIONS:
        clear_precision(folder, precision)
