"""Keeps engines on the board's own disk, each with its key and digest.

No engine ever comes over a network. No file is trusted to be complete: its digest is checked when it is read.

lock           held by the process that builds an engine
engine.plan    the engine for what serves, with engine.json: what it is for and its digest
base.plan      an engine that takes new weights, with base.json
timing.cache   the layer times that the builder measured, with timing.json: the platform
record.json    the durations of refits and builds, and the failures
loading.json   exists while an engine is being loaded: left over, it shows that loading ended a process
loading.lock   held by the process that loads one
work/          where a child process makes the next one
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedprune.core import atomic_file
from fedprune.core.disk import file_digest, file_lock, storage_errors
from fedprune.core.errors import BusyError, EngineError, FedpruneError, StorageError
from fedprune.core.records import WholeNumber, convert_record

_LOG = logging.getLogger("fedprune.device")

ENGINE, BASE, TIMINGS = "engine", "base", "timing"
_FILES = {ENGINE: "engine.plan", BASE: "base.plan", TIMINGS: "timing.cache"}
RECORD = "record.json"


@dataclass(frozen=True)
class EnginePlatform:
    """The platform that an engine is valid for: kind of board, L4T release, power mode and TensorRT version."""

    board: str
    l4t: str
    sm: str
    tensorrt: str
    power: int | None = None

    def key(self, graph: str, plan: str) -> str:
        """The digest that identifies an engine of a graph and a plan. The power mode changes speed, not validity."""
        return _digest({**asdict(replace(self, power=None)), "graph": graph, "plan": plan})

    @property
    def timings_key(self) -> str:
        return _digest(asdict(self))


@dataclass(frozen=True)
class CachedEngine:
    """The record of engine builds for one key; `failures` in a row. `refits` is False once a refit went wrong."""

    key: str
    refit_s: float | None = None
    rebuild_s: float | None = None
    refits: bool = True
    failures: WholeNumber = 0
    reason: str = ""


class EngineCache:
    """The folder of engines of one board."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def work(self) -> Path:
        return self.root / "work"

    def path(self, kind: str) -> Path:
        return self.root / _FILES[kind]

    @contextmanager
    def lock_for_build(self) -> Iterator[None]:
        """Hold the lock of building, with an empty work folder; raises `StorageError` if another process has it."""
        with storage_errors(f"can't write {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
        busy = f"another process makes an engine in {self.root}"
        with file_lock(self.root / "lock", busy, "Wait until it is done, or stop the agent."):
            with storage_errors(f"can't write {self.work}"):
                shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir(mode=0o700)
            for name in (*_FILES.values(), *(f"{kind}.json" for kind in _FILES), RECORD):
                # Not the marker, which a process that loads an engine may write.
                atomic_file.remove_partial_files(self.root, name)
            try:
                yield
            finally:
                shutil.rmtree(self.work, ignore_errors=True)

    def put(self, kind: str, file: Path, key: str, facts: dict[str, Any]) -> None:
        """Move a finished file into the cache. A power cut leaves the old one, the new one or none."""
        with storage_errors(f"can't read {file}"):
            sha256 = file_digest(file)
        # The note is written last: a file without a matching note is damaged to `read`, and built again.
        atomic_file.link_or_copy(file, self.path(kind))
        if kind == ENGINE:  # what ended a process was another, or has been rebuilt and tried since
            atomic_file.remove_durably(self._marker_path)
        atomic_file.write_document(self._note_path(kind), {**facts, "key": key, "sha256": sha256})

    def read(self, kind: str, key: str) -> tuple[bytes, dict[str, Any]]:
        """A file for a key and its facts; raises `EngineError` if it is missing, has another key, or is damaged."""
        try:
            note = atomic_file.read_document(self._note_path(kind))
        except StorageError as error:
            raise EngineError(str(error)) from error
        path = self.path(kind)
        if note is None or not path.is_file():
            raise EngineError(f"there is no {path.name} yet")
        if note.get("key") != key:
            raise EngineError(f"{path.name} is of another board, system, TensorRT, graph or plan")
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise EngineError(f"can't read {path}: {error.strerror}") from error
        if hashlib.sha256(raw).hexdigest() != note.get("sha256"):
            raise EngineError(f"{path.name} is damaged")
        return raw, note

    def read_record(self, key: str) -> CachedEngine:
        """The record of engine builds for a key; a new one if it can't be read."""
        try:
            body = atomic_file.read_document(self.root / RECORD)
            record = CachedEngine(key) if body is None else convert_record(CachedEngine, body, "record", EngineError)
        except FedpruneError as error:
            _LOG.warning("what is known of making engines can't be read, going on without it: %s", error)
            record = CachedEngine(key)
        return record if record.key == key else CachedEngine(key)

    def write_record(self, record: CachedEngine) -> None:
        atomic_file.write_document(self.root / RECORD, asdict(record))

    @contextmanager
    def mark_loading(self, sha256: str) -> Iterator[None]:
        """Load an engine in this process; raises `EngineError` if loading it has ended a process before.

        If another process is loading an engine, this one loads without a marker: if it ends, that is not noticed, and
        the engine is loaded again at the next start.
        """
        marker = self._marker_path
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self.root / "loading.lock", "another process loads an engine", ""))
                alone = True
            except BusyError:
                alone = False
            if not alone:  # outside of the handler, or what fails while it loads would seem to come from the lock
                yield
                return
            try:
                previous_load = atomic_file.read_document(marker)
            except StorageError:
                previous_load = None
            if previous_load is not None and previous_load.get("sha256") == sha256:
                raise EngineError(
                    "loading this engine ended the process before",
                    hint="Build it again: `fedprune-device build-engine`.",
                )
            atomic_file.write_document(marker, {"sha256": sha256})
            try:
                yield
            finally:  # whatever went wrong, this process is still there
                atomic_file.remove_durably(marker)

    @property
    def _marker_path(self) -> Path:
        return self.root / "loading.json"

    def _note_path(self, kind: str) -> Path:
        return self.root / f"{kind}.json"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
