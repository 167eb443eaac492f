"""The needs of a job and the files of its state folder, for checks, repairs and backups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import TABLE_SUFFIX
from fedprune.coordination import State
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.validation import MAX_INT, is_digest, is_whole
from fedprune.model.recipe import judging_metric
from fedprune_server.executor.retention import kept_models
from fedprune_server.storage.storage import Storage


@dataclass(frozen=True)
class JobNeeds:
    """The blobs that a job needs, with its settings and state.

    Attributes:
        references: Digests without which it can't go on.
        models: Global models that the setting `keep` promises: one that is missing is no reason to stop.
        expected_updates: Updates that are on their way.
    """

    settings: Mapping[str, Any]
    state: State
    references: frozenset[str]
    models: frozenset[str]
    expected_updates: frozenset[str]

    @property
    def needed(self) -> frozenset[str]:
        """All that the next start would keep."""
        return self.references | self.models | self.expected_updates


def read_job_needs(storage: Storage) -> JobNeeds:
    """The needs of a database's job; raises `StorageError` if it has none or is damaged."""
    settings, state = storage.settings(), storage.load()
    if settings is None or state is None:
        raise StorageError(f"{storage.url} holds no job yet", hint="Has a server been started on it?")
    server = settings.get("server", {})
    keep = server.get("keep", 1)
    if not is_whole(keep, -MAX_INT):
        raise StorageError(f"{storage.url}: its settings are damaged", expected="a whole number keep", got=repr(keep))
    updates = frozenset(str(t.update["sha256"]) for t in state.tasks.values() if t.update)
    models = frozenset(kept_models(state, keep, judging_metric(settings.get("job", {}))))
    return JobNeeds(settings, state, frozenset(state.references()), models, updates)


@dataclass(frozen=True)
class BlobFiles:
    """Files of a folder of blobs.

    Attributes:
        blobs: Blobs by digest.
        tables: Leaf tables, by their blob's digest.
        partial: Files of blobs that have not arrived completely.
        temporary: Files of writers, some of which may be dead.
        foreign: Files that no server wrote.
    """

    blobs: Mapping[str, Path]
    tables: Mapping[str, Path]
    partial: tuple[Path, ...]
    temporary: tuple[Path, ...]
    foreign: tuple[Path, ...]


def find_blob_files(root: Path) -> BlobFiles:
    """The files of a folder of blobs. Reads it without `BlobStore`, which makes missing folders and deletes files."""
    blobs, tables = dict[str, Path](), dict[str, Path]()
    partial, temporary, foreign = list[Path](), list[Path](), list[Path]()
    for path in _all_files(root):
        parent_name, name = path.parent.name, path.name.removesuffix(TABLE_SUFFIX)
        if path.parent.parent == root and is_digest(name) and name[:2] == parent_name:
            (tables if path.name != name else blobs)[name] = path
        elif path.parent == root / "partial":
            partial.append(path)
        elif path.parent == root / "tmp":
            temporary.append(path)
        else:
            foreign.append(path)
    return BlobFiles(blobs, tables, tuple(partial), tuple(temporary), tuple(foreign))


def _all_files(root: Path) -> Iterator[Path]:
    with storage_errors(f"can't read {root}"):
        for path in sorted(root.rglob("*")):
            if not path.is_dir():
                yield path
