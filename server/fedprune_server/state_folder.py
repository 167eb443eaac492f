"""The folder in which a server keeps everything that must survive a crash: database, blobs, the model it began with."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import tensorfile
from fedprune.blobs import BlobStore
from fedprune.coordination import State
from fedprune.disk import storage_errors
from fedprune.errors import ConfigError, DataError, ModelError, StorageError
from fedprune.job import Job
from fedprune.selection import Selection
from fedprune_device.data import LocalData, load_data, load_inputs
from fedprune_export.imported import Model
from fedprune_export.importing import import_onnx, read_source
from fedprune_server.config import ServerConfig, with_stored, without_password
from fedprune_server.evaluator import Evaluation
from fedprune_server.garbage import sweep
from fedprune_server.storage import FILE as DATABASE
from fedprune_server.storage import LOCK, Storage
from fedprune_server.worker import Worker

log = logging.getLogger("fedprune.server")

MODEL = "model.onnx"
BLOBS = "blobs"
_LOCK_PATIENCE_S = 3.0


@dataclass
class OpenJob:
    """A job that is ready to run.

    Attributes:
        job: Its settings.
        model: The model that it began with.
        worker: Carries out its heavy commands.
        state: Where it stands.
        changed: What differs from the settings with which it ran last, one line each.
    """

    job: Job
    model: Model
    worker: Worker
    state: State
    changed: list[str]


class StateFolder:
    """A state folder, held by one server at a time.

    Args:
        path: The folder; made if missing.

    Raises:
        StorageError: Another server runs on it, or it can't be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(f"can't use state folder {path}"):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take_lock()
            self.store = BlobStore(path / BLOBS)
            self.storage = Storage.at(path)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Let other servers have it."""
        self.storage.close()
        os.close(self._lock)

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open_job(self, config: ServerConfig) -> OpenJob:
        """The job of this folder, begun if there is none yet.

        Raises:
            ConfigError: The configuration doesn't fit what the folder holds.
            ModelError: The model can't be used.
            DataError: The evaluation or calibration data can't be used.
            StorageError: The folder is damaged.
        """
        if config.archive:
            self.storage.logged = 0
        known = self.storage.settings()
        raw, name = self._model_bytes(config, known)
        model = import_onnx(raw, name)
        evaluation = calibration = None
        if config.evaluation is not None:
            evaluation = load_evaluation(config.evaluation, model, config.job.recipe.loss)
        if config.calibration is not None:
            calibration = load_calibration(config.calibration, model)
        settings = {
            "job": config.job.to_dict(),
            "name": name,
            "model": tensorfile.digest(raw),
            "evaluation": _anywhere(config.evaluation),
            "calibration": _anywhere(config.calibration),
            "server": config.server_settings(),
        }
        if known is None:
            self._keep_foreign(raw)
            self.store.write_file(self.path / MODEL, raw)
        # After the model and before the first state: a crash in between leaves nothing that contradicts itself.
        self.storage.put_settings(settings)
        worker = Worker(config.job, model, self.store, evaluation, calibration)
        state = self.storage.load()
        if state is None:
            state = State(model=worker.initial(), architecture=model.architecture.digest)
            self.storage.save(state, None, time.time())
        else:
            self._check_blobs(state)
            self._fit(state, model)
            sweep(self.store, state, config.kept)  # not a new job's folder: its worker has just put graphs there
        return OpenJob(config.job, model, worker, state, _changes(known, settings))

    def _model_bytes(self, config: ServerConfig, known: dict[str, Any] | None) -> tuple[bytes, str]:
        if known is None:
            if config.model is None:
                raise ConfigError(
                    f"{self.path} holds no job yet and no model is given",
                    expected="a model to begin with",
                    hint="Give --model model.onnx, or [model] path in the configuration.",
                )
            source = config.model
            name = source.rpartition(":")[2] if ":" in source else Path(source).stem
            return _source_bytes(source, config.input_shape), name
        path = self.path / MODEL
        with storage_errors(f"can't read {path}"):
            raw = path.read_bytes()
        if tensorfile.digest(raw) != known["model"]:
            raise StorageError(f"{path} is damaged", hint="Restore the server's backup.")
        # A torch factory may draw other weights each time; its job goes on with those that it drew first.
        if config.model is not None and Path(config.model).is_file() and read_source(config.model) != raw:
            raise ConfigError(
                f"{config.model} is not the model with which the job in {self.path} began",
                hint="Take another state folder for another model, or leave the model out to go on.",
            )
        return raw, str(known["name"])

    def _keep_foreign(self, raw: bytes) -> None:
        """A folder without a job may be somebody's own, with a model of theirs."""
        path = self.path / MODEL
        if path.exists() and path.read_bytes() != raw:
            raise ConfigError(
                f"{path} is another model, and {self.path} holds no job",
                hint="Name a folder of its own with --state, or move the file away.",
            )

    def _check_blobs(self, state: State) -> None:
        if not self.store.has(state.model):
            raise StorageError(
                f"the global model {state.model} is missing from {self.path / BLOBS}",
                hint="Restore the server's backup.",
            )

    def _fit(self, state: State, model: Model) -> None:
        """Let go of rankings of channels that another version of the compiler found in the model."""
        digest = model.architecture.digest
        known = {state.architecture or digest}
        if state.ranking is not None and self.store.has(state.ranking):
            known.add(Selection.owner(self.store.read(state.ranking)))
        if known != {digest}:
            log.warning("this version describes the model differently: channels are ranked anew")
            state.score_anew()
        if known != {digest} or not state.architecture:
            state.architecture = digest
            self.storage.save(state, None, time.time())

    def _take_lock(self) -> None:
        until = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                # A server that was killed a moment ago may still have a child that holds the file open.
                if time.monotonic() > until:
                    raise StorageError(
                        f"another server runs on {self.path}", hint="Stop it, or give another --state folder."
                    ) from error
            time.sleep(0.1)


def stored_config(folder: Path, config: ServerConfig, chosen: Mapping[str, Any]) -> ServerConfig:
    """The configuration with what a state folder's last start ran with, if there was one.

    Args:
        folder: The state folder.
        config: The configuration for a new one.
        chosen: What the command line says of the server; None means that it says nothing.

    Raises:
        StorageError: The folder is damaged.
        ConfigError: What it ran with no longer makes sense, such as a folder that has gone.
    """
    if not (folder / DATABASE).is_file():
        return config
    with Storage.at(folder) as storage:
        known = storage.settings()
    if known is None:
        return config
    data: dict[str, Any] = {k: getattr(config, k) or known.get(k) for k in ("evaluation", "calibration")}
    config = replace(config, **data, job=Job.from_dict(known["job"]))
    return with_stored(config, known.get("server", {}), chosen)


def load_evaluation(source: str, model: Model, loss: str) -> Evaluation:
    """The server's own samples: `x_test` and `y_test` where a file has them, else all samples.

    Args:
        source: A `.npz` file or `package.module:function`, as devices' data.
        model: The model that will be measured.
        loss: What it is trained with.

    Raises:
        DataError: The data can't be read or doesn't fit the model.
    """
    data = load_data(source)
    try:
        check_data(data, model, loss)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if len(data.y_test) and _has_test_split(Path(source)):
        return data.x_test, data.y_test
    if not len(data.y_test):
        return data.x_train, data.y_train
    return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])


def check_data(data: LocalData, model: Model, loss: str) -> None:
    """Check samples and labels against a model.

    Args:
        data: The samples.
        model: The model.
        loss: What it is trained with.

    Raises:
        DataError: Labels don't fit the loss or the number of classes, or samples have another shape or type.
    """
    shape = model.architecture.input_shape
    data.check(model.architecture.classes, shape, loss=loss, token_ids=_takes_token_ids(model))


def load_calibration(source: str, model: Model) -> npt.NDArray[Any]:
    """Samples for batch-norm statistics: `x_test` where the source has it, else all of `x`; labels are not needed.

    Args:
        source: A `.npz` file or `package.module:function`, as devices' data.
        model: The model whose statistics will be measured.

    Raises:
        DataError: The samples can't be read or don't fit the model.
    """
    return load_inputs(source, tuple(model.architecture.input_shape), token_ids=_takes_token_ids(model))


def _takes_token_ids(model: Model) -> bool:
    return model.graph.inputs[0].dtype.kind == "i"


def global_model(folder: Path, digest: str | None = None) -> tuple[Model, bytes]:
    """The model of a state folder, and the bytes of its weights.

    Args:
        folder: The folder; a server may be running on it.
        digest: Which weights; the current ones by default.

    Raises:
        StorageError: The folder holds no job, or is damaged.
    """
    with Storage.existing(folder) as storage:
        known, state = storage.settings(), storage.load()
    if known is None or state is None:
        raise StorageError(f"{folder} holds no job yet")
    with storage_errors(f"can't read {folder / MODEL}"):
        raw = (folder / MODEL).read_bytes()
    weights = BlobStore(folder / BLOBS).read(digest or state.model)
    return import_onnx(raw, str(known["name"])), weights


def model_after(folder: Path, round_: int) -> str:
    """Digest of the global model after a round.

    Raises:
        StorageError: There was no such round, its model is no longer kept, or the folder is damaged.
    """
    with Storage.existing(folder) as storage:
        found = {r["round"]: str(r["model"]) for r in storage.rounds()}
    if round_ not in found:
        raise StorageError(f"{folder} holds no round {round_}", expected=f"1 to {max(found, default=0)}")
    if not BlobStore(folder / BLOBS).has(found[round_]):
        raise StorageError(
            f"the model after round {round_} is no longer kept", hint="Run with a larger --keep to keep more of them."
        )
    return found[round_]


def _has_test_split(path: Path) -> bool:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return "x_test" in file.files
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError):
        return False


def _changes(known: dict[str, Any] | None, settings: dict[str, Any]) -> list[str]:
    if known is None:
        return []
    lines = []
    for table in ("job", "server"):
        old, new = known.get(table, settings[table]), settings[table]
        for key in new:
            before, after = old.get(key), new[key]
            if before == after:
                continue
            if key == "broker":  # the password in it is nobody's business
                before, after = without_password(str(before)), without_password(str(after))
            lines.append(f"{key}: {before!r} is now {after!r}")
    return lines


def _anywhere(source: str | None) -> str | None:
    """A source that the next start finds from any folder: the file's whole path, or a function's name."""
    return str(Path(source).resolve()) if source is not None and Path(source).is_file() else source


def _source_bytes(source: str, input_shape: tuple[int, ...] | None) -> bytes:
    """A model's bytes, without advice that only `fedprune-export` can follow."""
    try:
        return read_source(source, input_shape=input_shape)
    except ModelError as error:
        if "--input-shape" not in error.hint:
            raise
        hint = (
            "Give the module an attribute input_shape, such as (3, 32, 32), or the configuration "
            "[model] input_shape, such as [3, 32, 32]."
        )
        raise ModelError(error.what, expected=error.expected, got=error.got, hint=hint) from error
