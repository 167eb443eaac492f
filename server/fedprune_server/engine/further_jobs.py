"""Jobs beside a server's first one: where they are kept, what they may be told, and how they are put on one host.

The first job lies in the state folder itself, with the identity; each further one in a folder `jobs/NAME` of it that is
a whole state folder: database, blobs, model, lock. So every command that looks at a job works on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError
from fedprune.core.validation import only
from fedprune_server.config.config import ServerConfig
from fedprune_server.config.layers import file_layer, located
from fedprune_server.config.tables import TABLES, parse_config
from fedprune_server.engine.host import Host
from fedprune_server.engine.job_runner import JobDesk
from fedprune_server.engine.state_directory import OpenJob, StateFolder, stored_config
from fedprune_server.executor.background import CommandExecutor
from fedprune_server.executor.worker_pool import helped
from fedprune_server.messaging.connection import Connection
from fedprune_server.monitoring.observer import DisplayObserver, Observer
from fedprune_server.storage.further_folders import FOLDER, folders
from fedprune_server.storage.storage import Storage
from fedprune_server.terminal.table import Lines

_OWN = ("archive", "blobs", "cache_mib", "database", "keep", "pulls", "slabs", "weight", "workers")
"""Keys of [server] that a further job has of its own."""


@dataclass
class Kept:
    """A job, and the folder that it is kept in, held.

    Attributes:
        config: Its configuration.
        folder: The folder.
        opened: The job.
        worker: Carries out its heavy commands.
    """

    config: ServerConfig
    folder: StateFolder
    opened: OpenJob
    worker: CommandExecutor


def further(first: ServerConfig, files: Sequence[Path]) -> list[ServerConfig]:
    """Configurations of the jobs beside the first: those of files, and those that the state folder has from before.

    Args:
        first: The first job's, which says what concerns the server.
        files: One for each job that is new, or whose settings have changed.

    Raises:
        ConfigError: A file can't be used, or two jobs have one name.
        StorageError: A folder can't be read.
    """
    found = [_read(first, path) for path in files]
    names = [first.job.name, *(c.job.name for c in found)]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError("jobs of one server", expected="names that differ", got=", ".join(twice) + " twice")
    kept = [p for p in folders(first.state) if p.name not in names and Storage.settings_in(p) is not None]
    return [*found, *(_placed(first, stored_config(p, ServerConfig(), {}), p.name) for p in kept)]


def _read(first: ServerConfig, path: Path) -> ServerConfig:
    layer = file_layer(path)
    with located([layer], str(path)):
        only([t for t in TABLES if t != "alerts"], layer.tables, str(path), "table")
        if isinstance(layer.tables.get("server"), dict):
            only(_OWN, layer.tables["server"], f"{path}: [server] of a further job")
        config = parse_config(layer.tables, str(path), path.parent)
    return _placed(first, config, config.job.name)


def _placed(first: ServerConfig, config: ServerConfig, name: str) -> ServerConfig:
    """A further job's configuration, with all that concerns the server as the first one's has it."""
    own = {k: getattr(config, k) for k in (*_OWN, "job", "model", "input_shape", "evaluation", "calibration")}
    return replace(first, **own, state=first.state / FOLDER / name)


def opened(stack: ExitStack, config: ServerConfig, folder: StateFolder | None = None) -> Kept:
    """A job that is ready to run, held until the stack is left.

    Args:
        stack: Closes it.
        config: Its configuration.
        folder: Its folder, if that is held already.

    Raises:
        FedpruneError: As `StateFolder` and its `read_job`.
    """
    held = folder or stack.enter_context(StateFolder(config.state, config.database))
    job = held.read_job(config)
    worker: CommandExecutor = stack.enter_context(helped(job.worker, config.workers, config.workers_url))
    return Kept(config, held, job, worker)


def hosted(
    jobs: Sequence[Kept],
    reached: Connection,
    finished: Callable[[Kept, JobDesk], None],
    *,
    profiles: Sequence[Path] = (),
    watch: Callable[[str], Sequence[Observer]] = lambda job: (),
    **first: Any,
) -> Host:
    """A host for several jobs.

    Args:
        jobs: The jobs.
        reached: The connection.
        finished: Called when one of them is done.
        profiles: Folders of hardware profiles beside the shipped ones.
        watch: Gives those who look on at each job, by its name.
        first: Further options for the first job's desk.
    """
    desks: list[JobDesk] = []
    for kept in jobs:
        config, job = kept.config, kept.opened
        job.worker.prefix = f"{job.job.name}: "
        desk = JobDesk(
            job.job,
            job.model.architecture,
            job.state,
            kept.folder.storage,
            kept.folder.store,
            kept.worker,
            reached.wire,
            weight=config.weight,
            site=reached.site,
            keep=config.kept,
            pulls=config.pulls,
            profiles=profiles,
            max_devices=config.max_devices,
            max_packet=config.max_packet,
            quarantine=reached.quarantine,
            observers=[DisplayObserver(Lines(of_several=True)), *watch(job.job.name)],
            frozen=job.model.frozen,
            **({} if desks else first),
        )
        desk.when_finished = lambda kept=kept, desk=desk: finished(kept, desk)  # type: ignore[misc]
        desks.append(desk)
    return Host(desks, reached.wire, reached.quarantine, site=reached.site, broker=reached.broker)
