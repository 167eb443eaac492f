"""Opens a state folder for a server, and begins or continues the job in it.

A state folder holds everything that must survive a crash: database, blobs and the first model. `app` opens it, calls
`read_job` and, once the server could start, `save_job`. `engine.stored_job` reads folders for commands.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State
from fedprune.core import tensorfile
from fedprune.core.closeable import Closeable
from fedprune.core.disk import make_private_folder, read_file, storage_errors
from fedprune.core.errors import ConfigError, StorageError
from fedprune.jobs.job import Job
from fedprune_device.storage.directory_owner import check_unowned
from fedprune_export.importing import check_input, import_onnx, is_factory_source
from fedprune_export.pruning.model import Model
from fedprune_server.config.network_settings import without_password
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.job_inputs import check_job_model, input_changes, input_digests, read_job_model
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.executor.retention import kept_models, sweep_blobs
from fedprune_server.executor.server_samples import load_calibration, load_evaluation
from fedprune_server.executor.worker import Worker
from fedprune_server.storage import blob_place
from fedprune_server.storage.database import hide_passwords, parse_database_url
from fedprune_server.storage.folder_layout import DATABASE_FILE, MODEL_FILE, database_url, has_database, store_url
from fedprune_server.storage.folder_lock import folder_lock
from fedprune_server.storage.lease import Lease
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.storage import Storage

log = logging.getLogger("fedprune.server")


@dataclass
class OpenJob:
    """A job that is ready to run.

    Attributes:
        model: The model with which it began.
        setting_changes: Differences from the settings with which it ran last, one line each.
        settings: The settings that the next start continues with.
        unsaved_model: Bytes of the model's file, if the folder doesn't have it yet.
    """

    job: Job
    model: Model
    worker: Worker
    state: State
    setting_changes: list[str]
    settings: dict[str, Any]
    unsaved_model: bytes | None


class StateFolder(Closeable):
    """A state folder, held by one server at a time; it is made if it is missing. Raises `ConfigError` if the folder's
    job is in another database than the given one, and `StorageError` if another server runs on it, it is a device's, or
    it can't be used.

    Args:
        database: The database's URL; by default the one that the folder names, or the file in the folder.
        standby: Wait until no other server has the folder, or the database.
        stopping: Set if another server takes the database over.

    Attributes:
        lease: Keeps other servers from writing to the database.
        database_url: The database's URL, perhaps with a password.
    """

    def __init__(
        self, path: Path, database: str | None = None, *, standby: bool = False, stopping: threading.Event | None = None
    ) -> None:
        self.path = path
        check_unowned(path)
        with storage_errors(f"can't use state folder {path}"):
            make_private_folder(path)
        with ExitStack() as stack:
            stack.enter_context(folder_lock(path, standby=standby))
            self.database_url = database_url(path, database)
            if database is not None:
                self._check_database_moved()
            if standby and Storage.read_settings(path, database) is not None:
                store_url(path, self.database_url)  # so that `status` and `doctor` find the job while this one waits
            self.lease = Lease(self.database_url, path, stopping)
            stack.callback(self.lease.close)
            self.lease.wait(standby=standby)
            # Opened only once the lease is free, because opening changes them: another server may have been at work.
            self.store = BlobStore(path / blob_place.BLOBS_FOLDER)
            self.storage = Storage.open_in(path, database)
            stack.callback(self.storage.close)
            self.lease.take()
            self.storage.database.fence = self.lease.check
            self._exit_stack = stack.pop_all()
        self._raw_model = b""

    def close(self) -> None:
        self._exit_stack.close()

    def read_job(self, config: ServerConfig, prefix: str = "") -> OpenJob:
        """The job of this folder, begun if it is missing. Nothing is stored before `save_job`: the start may fail.
        `prefix` begins log lines about the job, if the server has several.

        Raises:
            ConfigError: The configuration doesn't fit the job in the folder.
            ModelError: The model can't be used.
            DataError: The evaluation or calibration data can't be used.
            StorageError: The folder is damaged.
        """
        stored_settings, state = self.storage.settings(), self.storage.load()
        if stored_settings is not None:
            self._check_name(config, stored_settings, state)
        self.store = blob_place.open_blobs(self.path, config.blobs, config.cache_mib * 2**20, stored_settings)
        self._exit_stack.callback(self.store.close)
        raw, name = self._read_model_file(config, stored_settings, state)
        model = import_onnx(raw, name)
        check_input(config.model or name, model, config.input_shape)
        evaluation = calibration = None
        if config.evaluation is not None:
            evaluation = load_evaluation(config.evaluation, model, config.job.recipe)
        if config.calibration is not None:
            calibration = load_calibration(config.calibration, model, config.job.recipe)
        settings = {
            "job": config.job.to_dict(),
            "name": name,
            "model": tensorfile.sha256_hex(raw),
            "evaluation": _absolute_source(config.evaluation),
            "calibration": _absolute_source(config.calibration),
            "inputs": input_digests(config, evaluation, calibration),
            "server": config.server_settings(),
            "alerts": config.alerts.to_dict(),
            blob_place.NUMBER_KEY: blob_place.bucket_number(stored_settings) or secrets.token_hex(16),
        }
        if stored_settings is None:
            self._check_foreign_model(raw)
        worker = Worker(config.job, model, self.store, evaluation, calibration, prefix=prefix)
        _ = worker.accountant  # computed here, so that a missing package ends the start and not a later round
        if state is None:
            state = worker.begin()
        else:
            needed_digests = state.references() | kept_models(state, config.keep, config.job.recipe.judged_by)
            blob_place.copy_needed_blobs(self.path, self.store, stored_settings or {}, needed_digests)
            if not self.store.has(state.model):
                raise StorageError(
                    f"the global model {state.model} is missing from {self.store.describe()}",
                    hint="Restore the server's backup.",
                )
            self._rank_again_if_changed(state, model)
            # A new job's folder isn't swept: its worker has just put graphs there, to which no state refers yet.
            sweep_blobs(self.store, state, config.keep, config.job.recipe.judged_by)
            if (stored_settings or {}).get("job") != settings["job"] and state.phase is not Phase.FINISHED:
                worker.check_recipe(state.round + 1)
        source = raw if stored_settings is None else None
        self._raw_model = raw
        return OpenJob(config.job, model, worker, state, _setting_changes(stored_settings, settings), settings, source)

    def save_job(self, open_job: OpenJob) -> None:
        """Store a job and its settings for the next start. Raises `StorageError` if the disk fails or is full."""
        if open_job.unsaved_model is not None:
            self.store.write_file(self.path / MODEL_FILE, open_job.unsaved_model)
        store_url(self.path, self.database_url)
        # After the model and before the first state: a crash in between leaves nothing that contradicts itself.
        self.storage.put_settings(open_job.settings)
        self.store.claim(open_job.settings[blob_place.NUMBER_KEY], open_job.job.name, self._raw_model)
        if self.storage.load() is None:
            self.storage.save(open_job.state, (), time.time())

    def _check_database_moved(self) -> None:
        """Refuse another database that is empty: the server would begin a second job in it."""
        stored_url = database_url(self.path)
        if stored_url == self.database_url:
            return
        if Storage.read_settings(self.path) is None:
            self._check_claims(hide_passwords(parse_database_url(stored_url)))
            return
        if Storage.read_settings(self.path, self.database_url) is None:
            stored_place = hide_passwords(parse_database_url(stored_url))
            raise ConfigError(
                f"the job of {self.path} is in {stored_place}, and the given database is empty",
                hint="To move it there, use `fedprune-server backup`, and `restore --database` into a new folder.",
            )

    def _check_claims(self, stored_place: str) -> None:
        """Refuse a start that would not see the claims or members made before it."""
        if not has_database(self.path):
            return
        with open_database(self.path, read_only=True) as database:
            if IdentityStore(database).is_empty:
                return
        raise ConfigError(
            f"claims or members of {self.path} are in {stored_place}, where a server with another database doesn't see "
            "them",
            hint=f"Delete {self.path / DATABASE_FILE}, and make the claims again with `fedprune-server claim "
            "--database URL`.",
        )

    def _check_name(self, config: ServerConfig, stored_settings: dict[str, Any], state: State | None) -> None:
        """Refuse a configuration for a job of another name."""
        name = stored_settings["job"]["name"]
        if config.job.name != name:
            raise ConfigError(
                f"{self.path} holds {_job_description(stored_settings, state)}",
                expected=f"the name {name}",
                got=config.job.name,
                hint=f"For a new job take another --state folder; to continue with {name} give its name, or none.",
            )

    def _read_model_file(
        self, config: ServerConfig, stored_settings: dict[str, Any] | None, state: State | None
    ) -> tuple[bytes, str]:
        """The first model's file and name: a new job's configured model, else the stored one, compared with it."""
        if stored_settings is None:
            if config.model is None:
                raise ConfigError(
                    f"{self.path} holds no job yet and no model is given",
                    expected="a model to begin with",
                    hint="Give --model model.onnx, or [model] path in the configuration.",
                )
            return read_job_model(config), _model_name(config.model)
        path = self.path / MODEL_FILE
        with storage_errors(f"can't read {path}"):
            # A second server of a job, on a machine of its own, has no file yet: it reads the configured model, or else
            # the copy in the bucket.
            raw: bytes | None = None
            if not path.exists():
                has_model_file = config.model is not None and Path(config.model).is_file()
                raw = read_job_model(config) if has_model_file else self.store.first_model()
            is_from_elsewhere = raw is not None
            if raw is None:
                raw = read_file(path)
        if is_from_elsewhere and tensorfile.sha256_hex(raw) == stored_settings["model"]:
            self.store.write_file(path, raw)
        elif tensorfile.sha256_hex(raw) != stored_settings["model"]:
            raise StorageError(f"{path} is damaged", hint="Restore the server's backup.")
        name = str(stored_settings["name"])
        job_text = f"the job in {self.path} began, which holds {_job_description(stored_settings, state)}"
        if config.model is not None and is_factory_source(config.model) and _model_name(config.model) != name:
            raise ConfigError(
                f"{config.model} is not the model with which {job_text}",
                hint="For another model take another --state folder; to continue with this one leave the model out.",
            )
        check_job_model(config, raw, job_text)
        return raw, name

    def _check_foreign_model(self, raw: bytes) -> None:
        """Refuse a folder without a job but with another model: it may be a user's own folder."""
        path = self.path / MODEL_FILE
        with storage_errors(f"can't read {path}"):
            is_foreign = path.exists() and read_file(path) != raw
        if is_foreign:
            raise ConfigError(
                f"{path} is another model, and {self.path} holds no job",
                hint="Name a folder of its own with --state, or move the file away.",
            )

    def _rank_again_if_changed(self, state: State, model: Model) -> None:
        """Drop rankings of channels if another version of the compiler describes the model's channels differently."""
        digest = model.architecture.digest
        if state.architecture != digest:
            log.warning("this version describes the model differently: channels are ranked again")
            state.rank_again()
            state.architecture = digest
            self.storage.save(state, (), time.time())


def _model_name(source: str) -> str:
    return source.rpartition(":")[2] if ":" in source else Path(source).stem


def _job_description(stored_settings: Mapping[str, Any], state: State | None) -> str:
    """A folder's job for messages: its name, model and progress."""
    name, rounds = stored_settings["job"]["name"], stored_settings["job"]["rounds"]
    done = 0 if state is None else len(state.history)
    ended = state is not None and state.phase is Phase.FINISHED
    # The limit may have been lowered since.
    of_limit = f" of {rounds:,}" if done <= rounds else ""
    progress = f"{'finished' if ended else 'stopped'} after {done:,}{of_limit} rounds"
    return f"job {name} of model {stored_settings['name']}, {progress}"


def _setting_changes(stored_settings: dict[str, Any] | None, settings: dict[str, Any]) -> list[str]:
    """Lines about settings and inputs that differ from those of the last start."""
    if stored_settings is None:
        return []
    lines = []
    for table in ("job", "server"):
        stored_table, new_table = stored_settings.get(table, settings[table]), settings[table]
        for key in new_table:
            stored_value, new_value = stored_table.get(key), new_table[key]
            if stored_value == new_value:
                continue
            # Of a recipe only the keys that differ are of interest.
            if isinstance(stored_value, dict) and isinstance(new_value, dict):
                names = sorted(n for n in {*stored_value, *new_value} if stored_value.get(n) != new_value.get(n))
                lines += [f"{key}.{name}: {stored_value.get(name)!r} is now {new_value.get(name)!r}" for name in names]
                continue
            if key == "broker":  # it may contain a password
                stored_value, new_value = without_password(str(stored_value)), without_password(str(new_value))
            lines.append(f"{key}: {stored_value!r} is now {new_value!r}")
    return [*lines, *input_changes(stored_settings, settings)]


def _absolute_source(source: str | None) -> str | None:
    """A source as the next start finds it from any working folder: a file's absolute path, or a function's name."""
    return str(Path(source).resolve()) if source is not None and Path(source).is_file() else source
