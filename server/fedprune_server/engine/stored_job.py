"""Reads a stored job from its state folder, for commands: its settings, its finished rounds, its global model.

A server may be running on the folder; nothing in it is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fedprune.coordination.events import Closed
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import ConfigError, StorageError
from fedprune.core.text import quantity
from fedprune.model.recipe import judging_metric
from fedprune.strategies.importance.scoring import Ranks
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.config.network_settings import EMBEDDED
from fedprune_server.config.server_config import SERVER_KEYS, UNSTORED_KEYS
from fedprune_server.config.stored_code import stored_job
from fedprune_server.executor.final_ranks import final_ranks
from fedprune_server.storage.blob_place import open_blobs_reader
from fedprune_server.storage.folder_layout import MODEL_FILE
from fedprune_server.storage.storage import Storage

log = logging.getLogger("fedprune.server")

# Attempts at reading a state and its blobs while a server runs: between the two reads it may begin a round and delete
# the blobs to which the state referred.
_READ_ATTEMPTS = 3


def stored_tables(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration tables with which a state folder's server was last started; None if there was no start.

    The table [server] of `overrides` takes precedence: the authority of another broker than its own is left out. Raises
    `StorageError` if the folder is damaged.
    """
    stored_settings = Storage.read_settings(folder, overrides.get("database"))
    if stored_settings is None:
        return None
    server = {
        key: value
        for key, value in stored_settings.get("server", {}).items()
        if key in SERVER_KEYS and key not in UNSTORED_KEYS and value is not None
    }
    broker = str(overrides.get("broker") or server.get("broker", EMBEDDED))
    if not broker.startswith("mqtts://") or overrides.get("broker") is not None:
        server.pop("ca", None)
    tables = {"job": stored_settings["job"], "server": server, "alerts": stored_settings.get("alerts", {})}
    return tables | {
        key: {"data": stored_settings[key]} for key in ("evaluation", "calibration") if stored_settings.get(key)
    }


class GlobalModel(NamedTuple):
    """A global model of a job.

    Attributes:
        model: The job's model, as it was imported.
        weights: The tensor file of the global model.
        ranks: The ranks by which the job would cut it; None if there are none (`final_ranks`), or for earlier weights
            without their round in the log.
        last_round: Number of the last finished round, or 0.
    """

    model: Model
    weights: bytes
    ranks: Ranks | None
    last_round: int


def global_model(folder: Path, digest: str | None = None, allowed: Collection[str] = ()) -> GlobalModel:
    """A global model of a state folder, on which a server may be running: the current one, or the one with this digest.
    Only `allowed` functions of the user are called; without the job's own strategy there are no ranks. Raises
    `StorageError` if the folder holds no job, or is damaged."""
    for _ in range(_READ_ATTEMPTS - 1):
        with suppress(StorageError):  # the server may have begun a round, and deleted what the state referred to
            return _read_global_model(folder, digest, allowed)
    return _read_global_model(folder, digest, allowed)


def _read_global_model(folder: Path, digest: str | None, allowed: Collection[str]) -> GlobalModel:
    with Storage.open_existing(folder) as storage:
        stored_settings, state = storage.settings(), storage.load()
        earlier = None if state is None or digest in (None, state.model) else _closed_event(storage, str(digest))
    if stored_settings is None or state is None:
        raise StorageError(f"{folder} holds no job yet")
    with storage_errors(f"can't read {folder / MODEL_FILE}"):
        raw = read_file(folder / MODEL_FILE)
    store, digest = open_blobs_reader(folder, stored_settings), digest or state.model
    model = import_onnx(raw, str(stored_settings["name"]))
    weights = store.read(digest)
    last_round = int(state.history[-1]["round"]) if state.history else 0
    ranks = None
    try:
        job = stored_job(stored_settings, allowed, str(folder))
        if digest == state.model:
            ranks = final_ranks(job, model, state, store, digest)
        elif earlier is not None:
            state.round, state.memory = earlier["round"], earlier["memory"]
            with suppress(StorageError):  # its memory may have been deleted since
                ranks = final_ranks(job, model, state, store, digest)
    except ConfigError as error:
        log.warning("the model is without the ranks of its fleet: %s", error)
    return GlobalModel(model, weights, ranks, last_round)


def _closed_event(storage: Storage, digest: str) -> dict[str, Any] | None:
    """The event that closed the round of this model, if it is still in the log."""
    bodies = (body for _, _, kind, body in storage.log.events() if kind == Closed.__name__)
    return next((body for body in bodies if body["model"] == digest), None)


# Stands for the round whose global model scored best, where a round's number is expected.
BEST_ROUND = "best"


def finished_round(folder: Path, round_or_best: int | str) -> tuple[dict[str, Any], str]:
    """A round of the history whose global model is kept, by its number or `BEST_ROUND`, and the metric by which the
    job's models are judged. Raises `StorageError` if there was no such round, its model is no longer kept, or the
    folder is damaged."""
    with Storage.open_existing(folder) as storage:
        stored_settings, state = storage.settings(), storage.load()
    if stored_settings is None or state is None:
        raise StorageError(f"{folder} holds no job yet")
    metric, rows = judging_metric(stored_settings["job"]), {row["round"]: row for row in state.history}
    row = state.best_round(metric) if round_or_best == BEST_ROUND else rows.get(round_or_best)
    if row is None and round_or_best == BEST_ROUND:
        raise StorageError(
            f"{folder} has no best model",
            expected=f"a round whose model was evaluated by {metric or 'a metric'}",
            got="none of the " + quantity(len(rows), "finished round"),
            hint="Give a round's number, and give the server samples to evaluate models on: --evaluation, or the table "
            "[evaluation].",
        )
    if row is None:
        raise StorageError(f"{folder} holds no round {round_or_best}", expected=f"1 to {max(rows, default=0)}")
    if not open_blobs_reader(folder, stored_settings).has(row["model"]):
        raise StorageError(
            f"the model after round {row['round']} is no longer kept",
            hint="Run with a larger --keep to keep more of them.",
        )
    return row, metric
