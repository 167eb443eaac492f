"""A job worked out again from its log: the same events, a new coordinator and a new worker, the same models.

The log has everything that the coordinator was ever told, and when. Rankings, submodels and models are made again, in a
store of their own, and compared with what the log says that they were; only what came from devices (updates) and what
the server measured of its models are taken as they are. So the log proves how a model came about, also of an
asynchronous job, whose course no other run repeats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State, coordinate
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import ConfigError, FedpruneError, StorageError
from fedprune.core.text import all_strings
from fedprune.jobs.job import Job
from fedprune_export.importing import import_onnx
from fedprune_server.config.alert_settings import OFF
from fedprune_server.config.server_config import parent_in
from fedprune_server.config.stored_code import check_allowed, stored_job
from fedprune_server.executor.evaluator import load_calibration
from fedprune_server.executor.worker import Worker
from fedprune_server.maintenance.finding import Finding, Severity
from fedprune_server.maintenance.inventory import Inventory
from fedprune_server.storage.blob_place import reader
from fedprune_server.storage.state_folder import MODEL
from fedprune_server.storage.storage import Storage

_KINDS: dict[str, Callable[..., on.Event]] = {kind.__name__: kind for kind in get_args(on.Event)}
_MADE = (on.Scored, on.Extracted, on.Closed)
"""Events that a worker answers with, and so can be worked out again."""

_WAYS = ("coded", "moved")
"""Entries of an offer that say how something travelled."""


@dataclass(frozen=True)
class Step:
    """A round that was worked out again.

    Attributes:
        model: Digest of its model, the same as in the log.
        devices: Whose updates entered it.
    """

    round: int
    model: str
    devices: tuple[str, ...]


def replay(folder: Path, allowed: Collection[str] = ()) -> Iterator[Step]:
    """Work out the job of a state folder again, round by round.

    Args:
        folder: The folder of a server that ran with `archive`, and with the same settings from beginning to end.
        allowed: Names of functions that may be called, where the job has a strategy or calibration of one's own.

    Raises:
        ConfigError: The server ran without `archive`, is an aggregator, or its job names code that isn't allowed.
        StorageError: The folder holds no job, a part of what was archived is gone, or something that was worked out
            differs from the log; the message says what.
        FedpruneError: As for a server that is started on the folder.
    """
    with Storage.existing(folder) as storage:
        known, log = storage.settings(), storage.log.events()
        first = next(log, None)
        if known is None or first is None:
            raise StorageError(f"{folder} holds no job with a log", hint="Has a server been started on it?")
        if parent_in(known) != OFF:
            raise ConfigError("an aggregator's rounds are its parent's, and can't be replayed here")
        if not known.get("server", {}).get("archive"):
            raise ConfigError(
                "a job that runs without --archive can't be replayed: its updates are deleted after each round",
                hint="A new job can, if it is started with `fedprune-server run --archive`.",
            )
        if first[0] != 1:
            raise _gone(f"the log of {folder} begins with event {first[0]}")
        source = known.get("calibration")
        check_allowed({"calibration": {"data": source}}, allowed, str(folder))
        job = stored_job(known, allowed, str(folder))
        with storage_errors(f"can't read {folder / MODEL}"):
            raw = read_file(folder / MODEL)
        model = import_onnx(raw, str(known["name"]))
        calibration = None if source is None else load_calibration(str(source), model)
        with TemporaryDirectory(prefix="fedprune-replay-") as scratch:
            store = BlobStore(Path(scratch), durable=False)
            worker = Worker(job, model, store, None, calibration)
            yield from _Replay(worker, store, reader(folder, known)).run(chain([first], log))


def _gone(what: str) -> StorageError:
    return StorageError(what, hint="Did the server run with --archive from the beginning? Else restore a backup.")


class _Replay:
    def __init__(self, worker: Worker, store: BlobStore, updates: BlobStore) -> None:
        self._worker = worker
        self._store = store
        self._updates = updates
        self._made: dict[tuple[Any, ...], on.Event] = {}

    def run(self, log: Iterable[tuple[int, float, str, dict[str, Any]]]) -> Iterator[Step]:
        worker = self._worker
        state = worker.begin()
        coordinator = coordinate(worker.job, worker.architecture, state, worker.model.frozen)
        devices: tuple[str, ...] = ()
        for number, at, kind, body in log:
            event = event_of(number, kind, body)
            self._compare(number, event)
            finished = len(state.history)
            for command in coordinator.handle(event, at):
                if isinstance(command, (do.Score, do.Extract, do.Close)):
                    self._work(command)
                if isinstance(command, do.Close):
                    devices = tuple(c.part.device for c in command.contributions)
            if len(state.history) > finished:
                self._tidy(state)
                yield Step(state.history[-1]["round"], state.history[-1]["model"], devices)

    def _tidy(self, state: State) -> None:
        """Delete what later rounds don't need."""
        needed = state.references() | self._worker.graphs()
        for event in self._made.values():
            needed |= all_strings(vars(event))
        for name in list(self._store.names()):
            if name not in needed:
                self._store.delete(name)

    def _work(self, command: do.Score | do.Extract | do.Close) -> None:
        if isinstance(command, do.Close):
            needed = {found.weights: f"update of {found.part.device}" for found in command.contributions}
            if command.sums:
                needed = {found.total: "sum of masked updates" for found in command.sums}
            for digest, what in needed.items():
                if not (self._store.has(digest) or self._updates.has(digest)):
                    raise _gone(f"the {what} in round {command.round} is gone")
                if not self._store.has(digest):
                    self._store.put(self._updates.read(digest))
        event = self._worker.execute(command)
        self._made[_key(event)] = event

    def _compare(self, number: int, event: on.Event) -> None:
        if not isinstance(event, _MADE):
            return
        made = self._made.pop(_key(event), None)
        if made is None:
            raise StorageError(f"event {number} of the log answers nothing that was asked", got=type(event).__name__)
        for f in (f for f in fields(event) if f.compare):
            logged, found = getattr(_plain(event), f.name), getattr(_plain(made), f.name)
            if logged != found:
                raise StorageError(
                    f"event {number} of the log ({type(event).__name__} of round {event.round}): {f.name}",
                    expected=logged,
                    got=found,
                    hint="Was the job run with other settings, or by another version?",
                )


def _plain(event: on.Event) -> on.Event:
    """The result of a command, without its transport.

    Packed bytes depend on the version of zlib.
    """
    if not isinstance(event, on.Extracted):
        return event
    return replace(event, offer={k: v for k, v in event.offer.items() if k not in _WAYS})


def _key(event: on.Event) -> tuple[Any, ...]:
    return (type(event), *(getattr(event, n, None) for n in ("round", "device", "attempt")))


def event_of(number: int, kind: str, body: dict[str, Any]) -> on.Event:
    """A row of the log as the event that it was. Raises `StorageError` if this version knows no such event."""
    try:
        return _KINDS[kind](**body)
    except (KeyError, TypeError) as error:
        raise StorageError(f"event {number} of the log is of another version ({kind}: {error})") from error


def replayed_events(
    folder: Path, storage: Storage, needs: Inventory, allowed: Collection[str] = ()
) -> Iterator[Finding]:
    """Feed a job's log to a new coordinator, and find where it ends elsewhere than the job's state.

    Workers' results are taken from the log, so that this is quick and needs no updates; it proves only that log and
    state belong together. A difference is wrong in an archived job, whose settings never changed, else a note.

    Args:
        folder: The state folder; no server runs on it.
        allowed: Names of functions that may be called: the job's strategy, if it is the user's own.
    """
    if parent_in(needs.settings) != OFF:
        return  # an aggregator's events lead to nothing here: its parent decides
    log = storage.log.events()
    first = next(log, None)
    if first is None or first[0] != 1:
        at = "is empty" if first is None else f"begins with event {first[0]}"
        yield Finding(Severity.NOTE, f"the log {at}, so that it can't be compared with the state")
        return
    try:
        job = stored_job(needs.settings, allowed, str(folder))
    except ConfigError as error:
        yield Finding(Severity.NOTE, f"the log isn't compared with the state: {error}")
        return
    weight = Severity.WRONG if needs.archive else Severity.NOTE
    try:
        differing = _differing(folder, needs, job, chain([first], log))
    except FedpruneError as error:
        yield Finding(weight, f"the log can't be followed: {error}")
        return
    if differing:
        advice = (
            "That is so once the job's settings, as the log of a start says, or this program's version have changed. "
            "If neither ever did, restore a backup."
        )
        yield Finding(weight, f"the log ends in another state: {', '.join(differing)}", advice)


def _differing(
    folder: Path, needs: Inventory, job: Job, log: Iterator[tuple[int, float, str, dict[str, Any]]] | chain[Any]
) -> list[str]:
    path = folder / MODEL
    with storage_errors(f"can't read {path}"):
        raw = read_file(path)
    model = import_onnx(raw, str(needs.settings["name"]))
    with TemporaryDirectory(prefix="fedprune-check-") as scratch:
        state = Worker(job, model, BlobStore(Path(scratch), durable=False), None, None).begin()
    coordinator = coordinate(job, model.architecture, state, model.frozen)
    for number, at, kind, body in log:
        coordinator.handle(event_of(number, kind, body), at)
    told, saved = (json.loads(s.to_json()) for s in (state, needs.state))
    return sorted(k for k in told.keys() | saved.keys() if told.get(k) != saved.get(k))
