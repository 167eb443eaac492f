"""The blobs that a stored job needs to go on, for checks, repairs and backups of its state folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedprune.coordination import State
from fedprune.core.errors import StorageError
from fedprune.core.validation import MAX_INT, is_whole
from fedprune.model.recipe import judging_metric
from fedprune_server.executor.retention import kept_models
from fedprune_server.storage.storage import Storage


@dataclass(frozen=True)
class JobNeeds:
    """The digests of the blobs that a job needs, with the job's settings and state.

    Attributes:
        references: Blobs without which the job can't go on.
        models: Global models that the setting `keep` promises. The job goes on without a missing one.
        expected_updates: Updates that boards are uploading.
    """

    settings: Mapping[str, Any]
    state: State
    references: frozenset[str]
    models: frozenset[str]
    expected_updates: frozenset[str]

    @property
    def needed(self) -> frozenset[str]:
        """All blobs that the next start of the server would keep."""
        return self.references | self.models | self.expected_updates


def read_job_needs(storage: Storage) -> JobNeeds:
    """Read what a database's job needs; raises `StorageError` if the database has no job or is damaged."""
    settings, state = storage.settings(), storage.load()
    if settings is None or state is None:
        raise StorageError(f"{storage.url} holds no job yet", hint="Has a server been started on it?")
    keep = settings.get("server", {}).get("keep", 1)
    if not is_whole(keep, -MAX_INT):
        raise StorageError(f"{storage.url}: its settings are damaged", expected="a whole number keep", got=repr(keep))
    updates = frozenset(str(t.update["sha256"]) for t in state.tasks.values() if t.update)
    models = frozenset(kept_models(state, keep, judging_metric(settings.get("job", {}))))
    return JobNeeds(settings, state, frozenset(state.references()), models, updates)
