"""The models of one server without aggregators: coordinator and worker in one process, with the same updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.swarm.updates import update_file
from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import commands as do
from fedprune.coordination import coordinate
from fedprune.coordination import events as on
from fedprune.planning.profile_store import find
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_directory import StateFolder


class OneServer:
    """A job in this process, on boards that answer at once.

    Args:
        config: The job's, with which the measured servers were started.
        folder: The folder of its blobs.
        profile: A hardware profile for all boards; submodels of this job don't depend on it.
    """

    def __init__(self, config: ServerConfig, folder: Path, profile: str, seed: int) -> None:
        self._config = replace(config, state=folder, blobs="folder", job=replace(config.job, participation=1.0))
        self._profile, self._seed = find(profile).to_dict(), seed

    def models(self, rounds: Sequence[Mapping[int, tuple[str, int]]]) -> list[str]:
        """Digests of the models after each round.

        Args:
            rounds: Of each round by the boards' numbers, their names and samples. All of them are asked.
        """
        with StateFolder(self._config.state) as folder:
            opened = folder.read_job(self._config)
            job = replace(opened.job, devices=1)
            self._store, self._worker = folder.store, opened.worker
            self._coordinator = coordinate(job, opened.model.architecture, opened.state, opened.model.frozen)
            models = []
            for boards in rounds:
                self._boards = {name: (index, samples) for index, (name, samples) in boards.items()}
                born = [on.DeviceBorn(n, 1, self._profile, s, None) for n, (_, s) in self._boards.items()]
                self._run([*(replace(e, more=True) for e in born[:-1]), born[-1]])
                models.append(opened.state.model)
            return models

    def _run(self, events: list[on.Event]) -> None:
        """Handle events, and all that follows from each before the next, so that no two updates are on the disk."""
        left: deque[on.Event | do.Command] = deque(events)
        while left:
            item = left.popleft()
            found = self._coordinator.handle(item, 0.0) if isinstance(item, on.Event) else self._carried_out(item)
            left.extendleft(reversed(found))

    def _carried_out(self, command: do.Command) -> Sequence[on.Event]:
        """Carry out a command; boards leave once their update is accepted."""
        match command:
            case do.Fold():
                event = self._worker.execute(command)
                self._store.delete(command.contribution.weights)  # it is in the sums
                return [event]
            case do.Score() | do.Extract() | do.Close() | do.Evaluate():
                return [self._worker.execute(command)]
            case do.SendOffer():
                return [self._trained(command)]
            case do.PullUpdate():
                stored = str(command.weights["sha256"])
                return [on.UpdateStored(command.device, command.round, command.attempt, stored)]
            case do.Acknowledge():
                return [on.DeviceDied(command.device, 1)]
        return []

    def _trained(self, command: do.SendOffer) -> on.Event:
        index, samples = self._boards[command.device]
        base = BlobRef.from_dict(command.offer["weights"])
        ref = self._store.put(update_file(self._store.read(base.sha256), index, command.round, self._seed))
        part: tuple[Any, ...] = command.device, command.round, command.attempt
        return on.UpdateAnnounced(*part, base.sha256, ref.to_dict(), samples, 1)
