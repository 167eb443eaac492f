"""A job as an aggregator runs it: its coordinator is the parent's, and its worker fetches missing blobs from there."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import FedpruneError, StorageError
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.state import Device, Progress, Task, basis_digests, update_digests
from fedprune.model.architecture import Architecture
from fedprune_server.aggregators.channel import ParentLostError, UnansweredError
from fedprune_server.aggregators.messages import UP, Steered
from fedprune_server.executor.background import CommandExecutor, Work
from fedprune_server.executor.worker import Worker

log = logging.getLogger("fedprune.server")

LOST = "no server of the tier has all of its update any more"
"""Why an update doesn't count: some of it was lost with the aggregator that had acknowledged it."""

_TRIES, _AGAIN_S = 3, 1.0
"""Times that the parent is asked for a blob that it should have, and the seconds between two of them."""

Fetch = Callable[[str], bytes | None]
_Entry = TypeVar("_Entry", Device, Task)


class NotFoundError(StorageError):
    """No server of the tier has a blob that a command needs."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"blob {digest} is on no server of the tier")
        self.digest = digest


class UpdateLostError(FedpruneError):
    """No server of the tier has a device's update: it doesn't count, and the others do."""


class RemoteCoordinator:
    """Stands in for the coordinator: sends events to the parent, and takes over its rows and commands.

    Args:
        state: A copy of the parent's state, limited to this region.
        report: Sends an event up.
    """

    def __init__(self, architecture: Architecture, state: State, report: Callable[[on.Event], None]) -> None:
        self.architecture = architecture
        self._state, self._report = state, report

    def handle(self, event: on.Event, now: float) -> list[do.Command]:
        if isinstance(event, UP):
            self._note(event)
            self._report(event)
        return []

    def _note(self, event: on.Event) -> None:
        """Enter the blobs that are reported in the copy of the part's row: what no row names is deleted when a round
        begins, and the parent's row may name them only after that."""
        if not isinstance(event, on.Extracted | on.UpdateStored) or event.region:
            return
        task = self._state.part(event.device, event.round, event.attempt)
        if task is None:
            return
        if isinstance(event, on.Extracted) and task.progress is Progress.EXTRACTING:
            task.offer = event.offer
        if isinstance(event, on.UpdateStored) and task.progress is Progress.PULLING:
            task.weights = event.weights

    def follow(self, steered: Steered) -> list[do.Command]:
        """Take over the parent's rows; returns its commands."""
        state = self._state
        for name, value in steered.head.items():
            setattr(state, name, value)
        for name, row in steered.tasks.items():
            if row is not None and (known := state.tasks.get(name)) is not None:
                _keep_reported(known, row)
        _replace(state.devices, steered.devices, whole=steered.whole)
        _replace(state.tasks, steered.tasks, whole=steered.whole)
        return list(steered.commands)


def _replace(known: TrackedDict[_Entry], rows: Mapping[str, _Entry | None], *, whole: bool) -> None:
    for name in known.keys() - rows.keys() if whole else ():
        del known[name]
    for name, row in rows.items():
        if row is None:
            known.pop(name, None)
        else:
            known[name] = row


def _keep_reported(known: Task, row: Task) -> None:
    """Take over what was reported of a part to a row that the parent sent before it learned of it. Synchronous rounds
    end with no part at this point."""
    if row.basis is None or (row.basis, row.attempt, row.progress) != (known.basis, known.attempt, known.progress):
        return
    if row.progress is Progress.EXTRACTING:
        row.offer = known.offer
    if row.progress is Progress.PULLING:
        row.weights = known.weights


class FetchingWorker:
    """Carries out a parent's commands, after fetching the blobs that they name and this server doesn't have.

    A blob that the parent can't find is asked for again, a few times: then the parts that need it have failed, so that
    the round can close. While the parent can't tell, and no connection ends, it is asked until it can.

    Args:
        fetch: Gives a blob of the parent or of another of its aggregators; None if no server has it. Raises
            `ParentLostError`.
        inner: The worker, perhaps with helpers.
        state: The copy of the parent's; read, never changed.
    """

    def __init__(self, worker: Worker, inner: CommandExecutor, fetch: Fetch, state: State) -> None:
        self._worker, self._inner, self._fetch, self._state = worker, inner, fetch, state
        self._absent = Counter[str]()

    def expect(self, commands: Sequence[do.Command]) -> None:
        self._worker.expect(commands)  # helpers can't begin before the blobs are here

    def execute(self, command: Work) -> on.Event:
        while not self._outdated(command):
            try:
                equipped = self._equipped(command)
                lost = self._lost(equipped)
            except UnansweredError as error:
                log.debug("asking again: %s", error)
            except ParentLostError as error:
                log.info("left undone until the parent repeats it: %s", error)
                return on.Ticked()
            except NotFoundError as error:
                if self._absent[error.digest] >= _TRIES:
                    log.error("it can't be done: %s", error)
                    return _failed(command, dict.fromkeys(_devices(command), str(error)))
            else:
                return _failed(command, lost) if lost else self._inner.execute(equipped)
            time.sleep(_AGAIN_S)
        return on.Ticked()

    def _outdated(self, command: Work) -> bool:
        """Whether the parent has replaced the order for a part: blobs that it needs may have been deleted there."""
        match command:
            case do.Extract():
                part, number, awaited = command.part, command.basis.round, (Progress.EXTRACTING, Progress.PULLING)
            case do.Fold():
                part, number = command.contribution.part, command.contribution.basis.round
                awaited = (Progress.STORED, Progress.FOLDED)
            case _:
                return False
        task = self._state.part(part.device, number, part.attempt)
        return task is None or task.progress not in awaited

    def _equipped(self, command: Work) -> Work:
        match command:
            case do.Extract():
                part = self._with_past(command.part)
                self._get(basis_digests(vars(command.basis)))
                if command.coding.held is not None:
                    self._get({command.coding.held.ranking}, needed=False)
                return replace(command, part=part)
            case do.Fold():
                self._get({command.model, *command.memory.values()})
                found = command.contribution
                return replace(command, contribution=replace(found, part=self._with_past(found.part)))
            case do.Measure():
                self._get({command.model, *command.memory.values()})
                some = (replace(c, part=self._with_past(c.part)) for c in command.contributions)
                return replace(command, contributions=tuple(some))
        return command

    def _lost(self, command: Work) -> dict[str, str]:
        """Fetch the updates that a command reads here; returns by device why one can't be had."""
        match command:
            case do.Fold():
                stored: tuple[do.Contribution, ...] = (command.contribution,)
            case do.Measure():
                stored = tuple(c for c in command.contributions if not c.region)
            case _:
                stored = ()
        return {c.part.device: LOST for c in stored if not self._get(blobs_of(c), needed=False)}

    def _with_past(self, part: do.Part) -> do.Part:
        """A part with its last counted update, whose blobs are here now; without it if a lost aggregator had them."""
        past = part.past
        if past is None or self._get(update_digests(vars(past)), needed=False):
            return part
        log.warning("the last update of %s is on an aggregator that isn't connected: it begins without", part.device)
        return replace(part, past=None)

    def _get(self, digests: set[str], *, needed: bool = True) -> bool:
        """Fetch blobs that aren't here; returns whether all are here now. Raises `NotFoundError` for one that is
        needed."""
        for digest in sorted(digests):
            if self._worker.store.has(digest):
                continue
            data = self._fetch(digest)
            if data is None and needed:
                self._absent[digest] += 1
                raise NotFoundError(digest)
            if data is None:
                return False
            self._worker.store.put(data)
            del self._absent[digest]
        return True


def _failed(command: Work, failed: Mapping[str, str]) -> on.Event:
    """The answer to a command that needs blobs which can't be had: by device, why its part has failed."""
    match command:
        case do.Extract(part=part):
            return on.OfferRefused(part.device, command.basis.round, part.attempt, failed[part.device])
        case do.Fold():
            part = command.contribution.part
            return on.UpdateRejected(part.device, command.contribution.basis.round, part.attempt, failed[part.device])
        case do.AddUp():
            return on.AddedUp(command.round, command.number, failed=dict(failed))
        case do.Measure():
            return on.Measured(command.round, command.number, failed=dict(failed))
    raise TypeError(f"{type(command).__name__} is no command for an aggregator")


def _devices(command: Work) -> list[str]:
    """The devices whose parts a command is about."""
    match command:
        case do.Extract():
            return [command.part.device]
        case do.Fold():
            return [command.contribution.part.device]
        case do.Measure():
            return [c.part.device for c in command.contributions]
    return []


def blobs_of(found: do.Contribution) -> set[str]:
    """Digests of all blobs that are read for a stored update."""
    return update_digests(vars(found)) | basis_digests(vars(found.basis))
