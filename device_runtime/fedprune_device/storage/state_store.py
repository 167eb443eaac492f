"""Stores of a board's own state between rounds: in its state directory, or in memory for simulations and trials.

A store has two records at most, at the places a and b: the newest, and the one that the newest was made from.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Protocol

from fedprune.core import atomic_file
from fedprune.core.disk import storage_errors

_LOG = logging.getLogger("fedprune.device")

_SLOTS = ("a", "b")
_STAGED_FILE = ".staged.partial"  # of a round whose result may still be dropped; a new process deletes it
_JOB_FILE, _OTHER_JOBS_FOLDER = "job", "others"
MAX_OTHER_JOBS = 3  # the latest jobs, in addition to the current one, whose personal state a board keeps


class StateStore(Protocol):
    """A store of two records: the newest one, and the one that it was made from."""

    def read(self) -> dict[str, bytes]:
        """The records, by place."""
        ...

    def stage(self, record: bytes) -> None: ...

    def commit(self, base_slot: str | None) -> None:
        """Make the staged record the newest; delete all others but the one that it was made from, at `base_slot`."""
        ...


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

    def commit(self, base_slot: str | None) -> None:
        """See `StateStore`."""
        kept_records = {} if base_slot is None else {base_slot: self.records[base_slot]}
        self.records, self._staged = {**kept_records, _free_slot(base_slot): self._staged}, b""


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

    def commit(self, base_slot: str | None) -> None:
        """See `StateStore`."""
        slot = _free_slot(base_slot)
        atomic_file.move_durably(self._root / _STAGED_FILE, self._root / slot)
        for name in _SLOTS:
            if name not in (slot, base_slot):
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


def _free_slot(base_slot: str | None) -> str:
    return next(n for n in _SLOTS if n != base_slot)


def _read_record(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("can't read %s: %s", path, error.strerror)
        return None
