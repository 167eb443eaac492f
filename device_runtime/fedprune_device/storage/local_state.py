"""A board's own state between rounds: the moving average of its weights, personal tensors, what its last update left
out, and the optimiser's state.

There are two records at most: the newest, and the one that the newest was made from. A round that is repeated (a power
cut, a lost update, another attempt) finds the same beginning both times and gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.core import atomic_file, tensorfile
from fedprune.core.disk import storage_errors
from fedprune.core.errors import BundleError, StorageError
from fedprune.model.element_mask import mask_from_bits, mask_to_bits
from fedprune.model.selection import ElementMask, Tensors
from fedprune.wire.messages import Offer

_LOG = logging.getLogger("fedprune.device")

_FORMAT = "fedprune.own/1"
_HEAD_TENSOR, _DIGEST_TENSOR = "record", "sha256"
_FIELDS = ("job", "seed", "architecture", "selection", "ranking", "widths", "round", "optimizer", "steps", "alone")
_TENSOR_KINDS = ("average", "personal", "residual", "moments")
_SLOTS = ("a", "b")
_STAGED_FILE = ".staged.partial"  # of a round whose result may still be dropped; a new process deletes it
_JOB_FILE, _OTHER_JOBS_FOLDER = "job", "others"
MAX_OTHER_JOBS = 3  # the latest jobs, in addition to the current one, whose personal state a board keeps


@dataclass(frozen=True, eq=False)
class LocalState:
    """The state after a round, in the coordinates of a selection.

    `ranking` is the digest of the order of channels that the selection begins, None where that is unknown; `widths` are
    kept channels per group. `average` is empty without one; `mask` tells which of its elements are active.
    `residual` is what the encoded update left out of its tensors. `moments` is the state of `optimizer`, by the
    names of `fedprune.model.step_contract`, after `steps` steps since it was zero. `alone`: the average
    serves without the received weights that the recipe blends in.
    """

    job: str
    seed: int
    architecture: str
    selection: str
    ranking: str | None
    widths: tuple[int, ...]
    round: int
    average: Tensors = field(default_factory=dict)
    personal: Tensors = field(default_factory=dict)
    mask: ElementMask = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    optimizer: str = ""
    steps: int = 0
    alone: bool = False

    @classmethod
    def of(cls, offer: Offer, average: Tensors, personal: Tensors, mask: ElementMask, **further: Any) -> LocalState:
        """The state after an offer's round; `further` are attributes by their names."""
        identity = (
            offer.job,
            offer.seed,
            offer.architecture,
            offer.selection,
            offer.ranking,
            offer.widths,
            offer.round,
        )
        return cls(*identity, average, personal, mask, **further)

    def precedes(self, offer: Offer) -> bool:
        """Whether it was left by an earlier round of the same run."""
        mine, theirs = ((o.job, o.seed, o.architecture) for o in (self, offer))
        return mine == theirs and self.round < offer.round

    def with_personal(self, offer: Offer, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Received tensors with the board's personal ones in the place of theirs, where they still fit."""
        if self.selection != offer.selection:
            return dict(tensors)
        return {n: self.personal[n] if self._fits(n, v) else v for n, v in tensors.items()}

    def _fits(self, name: str, tensor: npt.NDArray[np.float32]) -> bool:
        mine = self.personal.get(name)
        return mine is not None and mine.shape == tensor.shape

    def to_bytes(self) -> bytes:
        arrays: dict[str, npt.NDArray[Any]]
        arrays = {f"{p}/{n}": v for p in _TENSOR_KINDS for n, v in getattr(self, p).items()}
        arrays |= {f"mask/{n}": v for n, v in mask_to_bits(self.mask).items() if n in self.average}
        head = {n: getattr(self, n) for n in _FIELDS} | {"format": _FORMAT}
        text = json.dumps(head, sort_keys=True).encode()
        digest = np.frombuffer(_digest(text, arrays), np.uint8)
        return tensorfile.encode({_HEAD_TENSOR: np.frombuffer(text, np.uint8), _DIGEST_TENSOR: digest, **arrays})

    @classmethod
    def from_bytes(cls, data: bytes) -> LocalState:
        try:
            arrays = tensorfile.decode(data)
            text, digest = arrays.pop(_HEAD_TENSOR).tobytes(), arrays.pop(_DIGEST_TENSOR).tobytes()
            if _digest(text, arrays) != digest:
                raise ValueError("the digest is another")
            head = json.loads(text)
            if head.pop("format") != _FORMAT:
                raise ValueError("another format")
            tensors_by_part: dict[str, dict[str, npt.NDArray[Any]]] = {k: {} for k in (*_TENSOR_KINDS, "mask")}
            for name, value in arrays.items():
                kind, _, tensor = name.partition("/")
                tensors_by_part[kind][tensor] = value
            shapes = {n: v.shape for n, v in tensors_by_part["average"].items()}
            mask = mask_from_bits(tensors_by_part["mask"], shapes)
            head["widths"] = tuple(head["widths"])
            return cls(**{**head, **{p: tensors_by_part[p] for p in _TENSOR_KINDS}, "mask": mask})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BundleError) as error:
            raise StorageError(f"what the board keeps of its own is damaged ({error})") from error


def _digest(text: bytes, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    digest = hashlib.sha256(text)
    for name, value in arrays.items():
        digest.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.digest()


class StateStore(Protocol):
    """A store of two records: the newest one, and the one that it was made from."""

    def read(self) -> dict[str, bytes]:
        """The records, by place."""
        ...

    def stage(self, record: bytes) -> None: ...

    def commit(self, neighbour: str | None) -> None:
        """Make the staged record the newest; delete all others except the one at `neighbour`."""
        ...


class RoundState:
    """The local state that an offer's round begins with (`base`), and the store of the state that the round leaves."""

    def __init__(self, states: StateStore, offer: Offer) -> None:
        self._states = states
        self._slot: str | None = None
        self.base: LocalState | None = None
        for slot, data in sorted(states.read().items()):
            try:
                state = LocalState.from_bytes(data)
            except StorageError as error:
                _LOG.warning("%s: going on without it", error)
                continue
            if state.precedes(offer) and (self.base is None or state.round > self.base.round):
                self._slot, self.base = slot, state

    def release(self) -> None:
        """Forget what the round began with; it stays in the store."""
        self.base = None

    def stage(self, state: LocalState) -> None:
        self._states.stage(state.to_bytes())

    def commit(self) -> None:
        """Make the staged state current, and keep the state that the round began with."""
        self._states.commit(self._slot)


class MemoryStateStore:
    """A store that lasts as long as the process."""

    def __init__(self, records: dict[str, bytes] | None = None) -> None:
        self.records = dict(records or {})
        self._staged = b""

    def read(self) -> dict[str, bytes]:
        """See `StateStore`."""
        return dict(self.records)

    def stage(self, record: bytes) -> None:
        self._staged = record

    def commit(self, neighbour: str | None) -> None:
        """See `StateStore`."""
        neighbours = {} if neighbour is None else {neighbour: self.records[neighbour]}
        self.records, self._staged = {**neighbours, _free_slot(neighbour): self._staged}, b""


class FolderStateStore:
    """Records in the state directory. Those of other jobs, to which the board may return, are set aside."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def prepare(self) -> None:
        with storage_errors(f"can't write {self._root}"):
            self._root.mkdir(parents=True, exist_ok=True)
        atomic_file.remove_partial_files(self._root)

    def read(self) -> dict[str, bytes]:
        """See `StateStore`; a file that can't be read is left out."""
        contents = {name: _read_record(self._root / name) for name in _SLOTS}
        return {name: data for name, data in contents.items() if data is not None}

    def stage(self, record: bytes) -> None:
        atomic_file.write_atomically(self._root / _STAGED_FILE, record, private=True)

    def commit(self, neighbour: str | None) -> None:
        """See `StateStore`."""
        slot = _free_slot(neighbour)
        atomic_file.move_durably(self._root / _STAGED_FILE, self._root / slot)
        for name in _SLOTS:
            if name not in (slot, neighbour):
                atomic_file.remove_durably(self._root / name)

    def switch_to_job(self, job: str, previous_job: str = "") -> None:
        """Set another job's state aside and restore this one's; repeating it after a crash loses nothing."""
        marker = self._root / _JOB_FILE
        # A folder that never held two jobs' state has no marker: the caller knows which job it is of.
        previous_job = (_read_record(marker) or b"").decode(errors="replace") or previous_job or job
        if previous_job != job:
            self._move_records(self._root, self._job_folder(previous_job))
            atomic_file.write_atomically(marker, job.encode(), private=True)
        if self._job_folder(job).is_dir():
            self._move_records(self._job_folder(job), self._root)
        self._delete_oldest_jobs()

    def delete_job(self, job: str) -> None:
        """Delete the state that was set aside for a job that has ended."""
        with storage_errors(f"can't delete {self._job_folder(job)}"):
            if self._job_folder(job).is_dir():
                shutil.rmtree(self._job_folder(job))

    def _job_folder(self, job: str) -> Path:
        return self._root / _OTHER_JOBS_FOLDER / job

    def _move_records(self, source: Path, target: Path) -> None:
        with storage_errors(f"can't write {target}"):
            names = [n for n in _SLOTS if (source / n).exists()]
            if names:
                target.mkdir(parents=True, exist_ok=True)
                target.touch()  # the folder's time tells which jobs are the latest
            for name in names:
                atomic_file.move_durably(source / name, target / name)

    def _delete_oldest_jobs(self) -> None:
        """Delete the state of the jobs that the board hasn't worked for longest."""
        others_folder = self._root / _OTHER_JOBS_FOLDER
        with storage_errors(f"can't write {others_folder}"):
            job_folders = list(others_folder.iterdir()) if others_folder.is_dir() else []
            for path in [p for p in job_folders if not any(p.iterdir())]:
                path.rmdir()
                job_folders.remove(path)
            for path in sorted(job_folders, key=lambda p: p.stat().st_mtime)[:-MAX_OTHER_JOBS]:
                shutil.rmtree(path)

    def paths(self) -> list[Path]:
        return [self._root / name for name in _SLOTS]

    def clear(self) -> None:
        for path in self.paths():
            if path.exists():
                atomic_file.remove_durably(path)


def _free_slot(neighbour: str | None) -> str:
    return next(n for n in _SLOTS if n != neighbour)


def _read_record(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("can't read %s: %s", path, error.strerror)
        return None
