"""A fleet on a virtual clock: the coordinator, the worker and the boards' own training, without network and waiting.

It is the second shell round the coordinator; the daemon is the first. Events wait in a queue ordered by time and, at
the same time, by the order in which they were made, so a run is the same every time. What a run needs to go on after a
kill is a JSON file and the blobs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs import BlobStore
from fedprune.chance import keyed
from fedprune.coordination import Coordinator, Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.errors import ConfigError, FedpruneError, PlanError, StorageError
from fedprune.job import Job
from fedprune.recipe import Recipe
from fedprune.wire.blob_ref import BlobRef
from fedprune_export.imported import Model
from fedprune_server.record import Record, record_of
from fedprune_server.simulation_state import Item, SimulationState, Trained, fingerprint
from fedprune_server.uploads import misfit
from fedprune_server.virtual_device import BLOBS, Bench, VirtualDevice
from fedprune_server.worker import Evaluation, Worker

_MAX_ATTEMPTS = 20
"""A round that nobody finished in this many attempts never will be."""


@dataclass(frozen=True)
class DropOuts:
    """Devices that vanish during a round.

    Attributes:
        probability: That a device vanishes while it works on an offer.
        away_s: Mean time until it is back, in virtual seconds.
    """

    probability: float = 0.0
    away_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1 or not self.away_s > 0:
            raise ConfigError(
                "drop-outs",
                expected="a probability from 0 to below 1 and away_s above 0",
                got=(self.probability, self.away_s),
            )


class Simulation:
    """A job on virtual devices.

    Args:
        job: The job's settings.
        model: The imported model.
        devices: The fleet.
        evaluation: The server's own samples and labels, or None.
        store: A blob store of this simulation's own: what is no longer needed is deleted from it.
        folder: Where the state is saved, and looked for; without it nothing is.
        dropouts: How devices vanish.
        calibration: Samples on which the server measures batch-norm statistics, or None.

    Raises:
        ConfigError: There are no devices, or names come twice.
        StorageError: The folder's state is damaged or belongs to another simulation.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        devices: Sequence[VirtualDevice],
        evaluation: Evaluation | None,
        store: BlobStore,
        *,
        folder: Path | None = None,
        dropouts: DropOuts | None = None,
        calibration: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.job = job
        self.model = model
        self.store = store
        self.dropouts = dropouts or DropOuts()
        self._devices = {d.name: d for d in devices}
        if not devices or len(self._devices) != len(devices):
            raise ConfigError("simulation: devices", expected="one or more with different names", got=len(devices))
        if job.devices > len(devices):
            raise ConfigError(
                "simulation: job.devices", expected=f"at most the {len(devices)} there are", got=job.devices
            )
        self._worker = Worker(job, model, store, evaluation, calibration)
        self._folder = folder
        self._fingerprint = fingerprint(job, model, devices, asdict(self.dropouts), evaluation, calibration)
        saved = None if folder is None else SimulationState.load(folder, self._fingerprint)
        if saved is not None:
            self._run, state = saved
            self.coordinator = Coordinator(job, model.architecture, state)
            self._tidy()  # a kill may have come between the last state and what it made superfluous
            return
        self._run = SimulationState()
        self.coordinator = Coordinator(job, model.architecture, State(model=self._worker.initial()))
        for name in sorted(self._devices):
            self._birth(name, 0.0)

    @property
    def state(self) -> State:
        """The coordinator's state."""
        return self.coordinator.state

    @property
    def clock(self) -> float:
        """Virtual seconds since the beginning."""
        return self._run.clock

    def run(self, progress: Callable[[Simulation], None] | None = None) -> list[dict[str, Any]]:
        """Run the job to its end, from wherever it stands.

        Args:
            progress: Called after every training and every round.

        Returns:
            The coordinator's history: a summary per round.

        Raises:
            PlanError: No device can take part, or none ever makes its deadline.
            FedpruneError: The worker can't do what it is told to.
        """
        with TemporaryDirectory(prefix="fedprune-simulation-") as scratch:
            bench = Bench(self.store, Path(scratch))
            while self.state.phase is not Phase.FINISHED:
                if not self._run.queue:
                    raise PlanError("the simulation has come to a standstill", hint=self._excuse())
                item: Item = self._run.pop()
                finished = len(self.state.history)
                trained = isinstance(item, Trained)
                if isinstance(item, Trained):
                    item = self._train(bench, item)
                elif isinstance(item, on.DeviceBorn):
                    self._run.sessions[item.device] = item.session
                    self._run.online.add(item.device)
                for command in self.coordinator.handle(item, self._run.clock):
                    self._carry_out(command)
                ended = len(self.state.history) > finished
                if ended:
                    self._run.traffic[len(self.state.history)] = (self._run.down, self._run.up)
                if trained or ended:
                    self._save()
                    if ended:
                        self._tidy()  # only now: until the new state is saved, a kill goes back to the old one
                    if progress is not None:
                        progress(self)
        return self.state.history

    def record(self, title: str) -> Record:
        """The run so far, as a record."""
        ranking = self.state.ranking
        return record_of(
            title,
            self.job,
            self.model.architecture,
            self.state,
            traffic=self._run.traffic,
            ranking=self.store.read(ranking) if ranking and self.store.has(ranking) else None,
            measured="weights and graphs on the virtual links",
        )

    def _carry_out(self, command: do.Command) -> None:
        now = self._run.clock
        if isinstance(command, (do.Score, do.Extract, do.Fold, do.Close, do.Evaluate)):
            self._run.push(now, self._worker.execute(command))
        elif isinstance(command, do.SendOffer):
            self._offer(command, now)
        elif isinstance(command, do.PullUpdate):
            self._pull(command, now)
        elif isinstance(command, do.Cancel):
            self._run.forget(command.device, command.round)
        elif isinstance(command, do.Wake):
            self._run.push(command.at, on.Ticked())
        # An acknowledgement tells a virtual device nothing that it must act on, and the end is seen by the state.

    def _pull(self, command: do.PullUpdate, now: float) -> None:
        device, ref = command.device, BlobRef.from_dict(command.weights)
        if reason := misfit(self.state.tasks[device].offer, ref):
            self._run.push(now, on.UpdateRejected(device, command.round, command.attempt, reason))
            return
        self._run.up += ref.size
        at = now + self._devices[device].upload_s(ref.size)
        self._run.push(at, on.UpdateStored(device, command.round, command.attempt, ref.sha256))

    def _offer(self, command: do.SendOffer, now: float) -> None:
        name, run = command.device, self._run
        if name not in run.online:
            return  # it is offered again when the device is back
        if command.attempt > _MAX_ATTEMPTS:
            raise PlanError(
                f"nobody finished round {command.round} in {_MAX_ATTEMPTS} attempts",
                got=self._run.refusal or None,
                hint="" if self._run.refusal else "Raise deadline_s, or ask for less training.",
            )
        self._run.forget(name, command.round)  # a newer attempt takes an older one's place
        device, held = self._devices[name], run.held.setdefault(name, set())
        refs = [command.offer[k] for k in BLOBS]
        size = sum(int(r["size"]) for r in refs if r["sha256"] not in held)
        run.held[name] = {r["sha256"] for r in refs}
        run.down += size
        ready = now + device.download_s(size)
        took = device.train_s(
            self.model.architecture, tuple(command.offer["widths"]), Recipe.from_dict(command.offer["recipe"])
        )
        chance = keyed(self.job.seed, command.round, name, command.attempt, run.sessions[name], "drop-out")
        if chance.random() < self.dropouts.probability:
            gone = ready + chance.random() * took
            self._run.push(gone, on.DeviceDied(name, run.sessions[name]))
            run.online.discard(name)  # whatever is sent meanwhile does not arrive
            self._birth(name, gone + chance.exponential(self.dropouts.away_s))
        else:
            self._run.push(ready + took, Trained(name, command.round, command.attempt, command.offer))

    def _train(self, bench: Bench, item: Trained) -> on.Event:
        device = self._devices[item.device]
        try:
            out = bench.carry_out(device, item.offer, item.round)
        except StorageError:
            raise
        except FedpruneError as error:
            self._run.refusal = f"{item.device}: {error}"
            return on.OfferRefused(item.device, item.round, item.attempt, str(error))
        return on.UpdateAnnounced(
            item.device,
            item.round,
            item.attempt,
            item.offer["weights"]["sha256"],
            out.weights.to_dict(),
            out.samples,
            out.steps,
            out.metrics,
        )

    def _birth(self, name: str, at: float) -> None:
        session = self._run.sessions.get(name, 0) + 1
        device = self._devices[name]
        self._run.push(at, on.DeviceBorn(name, session, device.profile.to_dict(), device.data.samples))

    def _excuse(self) -> str:
        reasons = sorted({d.excluded for d in self.state.devices.values() if d.excluded})
        return reasons[0] if reasons else "Fewer devices can take part than job.devices asks for."

    def _save(self) -> None:
        if self._folder is not None:
            self._run.save(self._folder, self.state, self._fingerprint)

    def _tidy(self) -> None:
        needed = self.state.references() | self._worker.graphs() | self._run.references()
        for name in list(self.store.names()):
            if name not in needed:
                self.store.delete(name)
