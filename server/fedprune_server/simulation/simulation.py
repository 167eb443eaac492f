"""Simulates a fleet on a virtual clock: coordinator, worker and the boards' own training, without network and waiting.

Events wait in a queue, ordered by time and then by creation, so that a run is deterministic. Each goes to the
coordinator, which answers with commands. The worker or a virtual device carries them out, which queues further events.
A run resumes after a kill from the files of `saved_run` and the blobs next to them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State, SynchronousCoordinator, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, DivergedError, FedpruneError, PlanError, StorageError
from fedprune.core.metrics import primary_metric
from fedprune.core.rng import keyed_generator
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind, kind_of_exit_code
from fedprune.model.recipe import Recipe
from fedprune.planning.prediction import Prediction
from fedprune.planning.probe_report import CPU, CUDA
from fedprune_export.bundles.conversion import with_weights
from fedprune_export.pruning.model import Model
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.divergence import is_uncalibrated
from fedprune_server.executor.final_ranks import final_ranks
from fedprune_server.executor.helper_processes import with_helpers
from fedprune_server.executor.worker import Worker
from fedprune_server.monitoring.round_rows import RoundNotes
from fedprune_server.observation.snapshot import LazyMapping
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.device_runner import DeviceRunner, WorkerKilledError
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice, profiles_by_kind
from fedprune_server.simulation.network_model import NEVER_CLOSES
from fedprune_server.simulation.results.job_record import job_record
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.round_recorder import RoundRecorder
from fedprune_server.simulation.saved_run import SAVE_PACE, SavedRun, SavePace
from fedprune_server.simulation.stall_detector import StallDetector, standstill_reason
from fedprune_server.simulation.state import ACTIVE_MACS, ENERGY, MACS, Item, SimulationState, TrainingEnd, WindowEnd
from fedprune_server.simulation.transfers import Transfers

log = logging.getLogger("fedprune.server")


class Simulation:
    """Simulates an experiment.

    Args:
        store: A blob store that only this simulation uses: superseded blobs are deleted from it.
        folder: Where state and checkpoints are saved; None saves nothing.

    Raises:
        ConfigError: There are no devices, or names repeat.
        StorageError: The folder's state is damaged or belongs to another simulation.
    """

    def __init__(
        self, experiment: Experiment, store: BlobStore, *, folder: Path | None = None, pace: SavePace = SAVE_PACE
    ) -> None:
        self.experiment = experiment
        self.job = job = experiment.job
        self.model = model = experiment.model
        self.store = store
        self._devices = {d.name: d for d in experiment.devices}
        self._check_experiment()
        unit = CUDA if experiment.cuda else CPU
        prefix = f"{experiment.title}: "
        worker = Worker(job, model, store, experiment.evaluation, experiment.calibration, unit=unit, prefix=prefix)
        _ = worker.accountant  # raises now rather than at the first round's end
        self._worker: Worker | DistributedWorker = worker
        # Where devices share their offers, these are so few that processes for them would take longer to start.
        self._helpers = 1 if worker.strategy.is_device_independent else experiment.workers
        self._first_state = worker.begin
        self._recorder = RoundRecorder(job, model, store, experiment.measure)
        self._profiles = profiles_by_kind(experiment.devices)
        self._predictions: dict[tuple[int, int, tuple[int, ...], Recipe], Prediction] = {}
        self._folder = SavedRun(folder, experiment, pace)
        self._is_resumed = self._load_or_start()

    def _check_experiment(self) -> None:
        job, count = self.job, len(self.experiment.devices)
        if not count or len(self._devices) != count:
            raise ConfigError(("simulation", "devices"), expected="one or more with different names", got=count)
        if job.devices > count:
            raise ConfigError(("job", "devices"), expected=f"at most the {count} there are", got=job.devices)
        if job.secure_aggregation:
            raise ConfigError(
                ("job", "secure_aggregation"),
                expected="false",
                got="true",
                hint="Simulate the job without it, with move_limit = 0 and, since masked boards count alike, "
                "most_samples = 1: the model is the same bit for bit. With compression = 'int8' it differs by what "
                "codes round.",
            )

    @property
    def state(self) -> State:
        return self.coordinator.state

    @property
    def clock(self) -> float:
        """Virtual seconds since the start."""
        return self._run.clock

    @property
    def notes(self) -> Mapping[int, RoundNotes]:
        """Notes of finished rounds, by number."""
        return self._run.rounds

    @property
    def score_note(self) -> str:
        """The leading metric of the last round's global model, for a progress display; empty before it is measured."""
        leading_metric = primary_metric(self.state.history[-1]["metrics"] if self.state.history else {})
        return "" if leading_metric is None else leading_metric[0].titled_value(leading_metric[1])

    def run(
        self, progress: Callable[[Simulation], None] | None = None, on_begin: Callable[[Simulation], None] | None = None
    ) -> list[dict[str, Any]]:
        """Run the job to its end, from its last saved state. A finished job that was given more rounds continues.

        Returns the coordinator's history: a summary per round.

        Raises:
            StorageError: Another process uses the folder, or the disk fails.
            DivergedError: Training diverged on all devices.
            PlanError: No device can take part, or none ever makes its deadline.
            FedpruneError: The worker can't carry out a command.
        """
        workers, cuda = self.experiment.workers, self.experiment.cuda
        with (
            self._lock_folder(),
            self._folder.scratch_folder() as scratch,
            self._share_work(),
            closing(DeviceRunner(self.store, scratch, workers=workers, cuda=cuda)) as self._runner,
        ):
            if self._is_resumed:
                # A kill may have come between the last save and its deletions.
                self._delete_superseded(self.store.names())
            else:
                self._save()
            self._runner.state_digests = self._run.boards
            # Trainings that a saved run had under way begin again: they depend only on their offers.
            for work in self._run.trainings():
                self._runner.begin_ahead(self._devices[work.device], work.offer, work.round)
            if on_begin is not None:
                on_begin(self)
            if isinstance(self.coordinator, SynchronousCoordinator):
                # A finished run that was given more rounds goes on; an asynchronous job has dropped its trainings by
                # then (`Experiment.is_extendable`).
                self._carry_out_all(self.coordinator.extend(self._run.clock))
            while self.state.phase is not Phase.FINISHED:
                if not self._run.queue or isinstance(self._run.next_item, TrainingEnd):
                    self._complete_rounds(progress)
                if not self._run.queue:
                    kinds = {device.excluded_by for device in self.state.devices.values()}
                    error = DivergedError if kinds == {FailureKind.DIVERGED} else PlanError
                    raise error("the simulation has come to a standstill", hint=standstill_reason(self.state, self.job))
                if self._handle_item(self._run.pop()) and progress is not None:
                    progress(self)
            self._complete_rounds(progress)
            self._save()
            self._delete_superseded(self.store.names())
        return self.state.history

    def _handle_item(self, item: Item) -> bool:
        """Handle an item of the queue, and save the state if that is due; returns whether a training has ended."""
        event = self._coordinator_event(item)
        if event is None:
            return False
        finished_rounds = len(self.state.history)
        self._carry_out_all(self.coordinator.handle(event, self._run.clock))
        if len(self.state.history) > finished_rounds:
            self._stalls.on_progress()
            # A strategy may give other widths and recipes in every round; old entries would pile up.
            self._predictions.clear()
            self._run.finish_round(self.state.history[-1]["round"])
            self._earlier_blobs = self.store.names()
        if not isinstance(item, TrainingEnd):
            return False
        if self._folder.is_due(round_ended=False):
            self._save()
        return True

    def _complete_rounds(self, progress: Callable[[Simulation], None] | None) -> None:
        """Evaluate and save the rounds that have ended, while other processes train for the next one."""
        ended_rounds = self.state.history[self._completed_rounds :]
        if not ended_rounds:
            return
        for row in ended_rounds:
            row["metrics"] = dict(row["metrics"])
            if self.experiment.checkpoints and row["round"] % self.experiment.checkpoints == 0:
                self._folder.write_checkpoint(self.model, row["round"], self.store.read(row["model"]))
        self._completed_rounds += len(ended_rounds)
        if self._folder.is_due(round_ended=True):
            self._save()
            # Only now: until the new state is saved, a kill goes back to the old one.
            self._delete_superseded(self._earlier_blobs)
        if progress is not None:
            progress(self)

    def trained_model(self) -> Model:
        """The global model, with the ranks by which the job cuts it."""
        digest = self.state.model
        ranks = final_ranks(self.job, self.model, self.state, self.store, digest)
        return with_weights(self.model, tensorfile.decode(self.store.read(digest)), self.experiment.title, ranks)

    def record(self) -> Record:
        ranking = self.state.ranking
        return job_record(
            self.experiment.title,
            self.job,
            self.model.architecture,
            self.state,
            notes=self._run.rounds,
            ranking=self.store.read(ranking) if ranking and self.store.has(ranking) else None,
            measured="weights and graphs on the virtual links",
            partition=self.experiment.partition,
            uncalibrated=is_uncalibrated(
                self.model.architecture, self.job.recipe, self.experiment.calibration, self.model.frozen
            ),
        )

    def _load_or_start(self) -> bool:
        """Load the folder's state, or start from the beginning. Returns whether a state was loaded."""
        self._stalls = StallDetector(len(self._devices))
        saved_run = self._folder.load()
        self._run, state = saved_run or (SimulationState(), self._first_state())
        self._transfers = Transfers(self.experiment.weather, self.job.seed, self.store, self._run)
        self.coordinator = make_coordinator(self.job, self.model.architecture, state, self.model.frozen)
        # The rounds that are evaluated and saved, and the blobs that were there when the last one ended.
        self._completed_rounds, self._earlier_blobs = len(state.history), list[str]()
        # By device, an update that was added to the sums before its command came, and the result.
        self._folded_ahead: dict[str, tuple[do.FoldUpdate, on.Event]] = {}
        if saved_run is None:
            for name in sorted(self._devices):
                self._schedule_birth(name, 0.0)
        return saved_run is not None

    @contextmanager
    def _lock_folder(self) -> Iterator[None]:
        """Hold the folder's lock; load what another process saved there in the meantime."""
        with self._folder.lock() as changed:
            if changed:
                self._is_resumed = self._load_or_start()
            yield

    @contextmanager
    def _share_work(self) -> Iterator[None]:
        plain_worker = self._worker
        try:
            with with_helpers(plain_worker, self._helpers) as self._worker:
                yield
        finally:
            self._worker = plain_worker

    def _coordinator_event(self, item: Item) -> on.Event | None:
        """The coordinator's event for an item of the queue, or None."""
        run = self._run
        if isinstance(item, TrainingEnd):
            self._stalls.on_trained()
            return self._train(item)
        if isinstance(item, WindowEnd):
            # Its training is lost, an announced update is sent again when it reconnects.
            if item.device not in run.online or run.sessions[item.device] != item.session:
                return None
            run.online.discard(item.device)
            self._drop_work(item.device)
            self._schedule_birth(item.device, run.clock)
            return on.DeviceDied(item.device, item.session)
        if isinstance(item, on.DeviceBorn):
            run.sessions[item.device] = item.session
            run.online.add(item.device)
            if (end := run.leaves.get(item.device, NEVER_CLOSES)) < NEVER_CLOSES:
                run.push(end, WindowEnd(item.device, item.session))
            if item.device in run.unsent:  # announced again, as by a board
                run.push(run.clock, run.unsent[item.device])
            self._stalls.on_connected(self.state)
        elif isinstance(item, on.UpdateAnnounced):
            run.unsent[item.device] = item
        elif isinstance(item, on.UpdateStored):
            run.unsent.pop(item.device, None)
            self._stalls.on_progress()
        return item

    def _carry_out_all(self, commands: Sequence[do.Command]) -> None:
        self._worker.expect(commands)
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: do.Command) -> None:
        now = self._run.clock
        if isinstance(command, do.Evaluate):
            self._run.push(now, on.Evaluated(command.round, LazyMapping(partial(self._evaluate, command))))
        elif isinstance(command, do.FoldUpdate):
            folded = self._folded_ahead.pop(command.contribution.part.device, None)
            self._run.push(now, folded[1] if folded and folded[0] == command else self._worker.execute(command))
        elif isinstance(command, (do.Score, do.Extract, do.Close)):
            event = self._worker.execute(command)
            if isinstance(command, do.Close) and isinstance(event, on.Closed):
                state = self.state
                previous_end = state.history[-1]["at"] if state.history else 0.0
                basis = do.Basis(command.round, state.model, state.ranking or "", state.order, dict(state.memory))
                self._recorder.record_round(self._run.now, command, event, basis, now, previous_end)
                event = replace(event, spent_bytes=self._run.down + self._run.up, spent_macs=self._run.macs)
            self._run.push(now, event)
        elif isinstance(command, do.SendOffer):
            self._offer(command, now)
        elif isinstance(command, do.PullUpdate):
            self._pull(command, now)
        elif isinstance(command, do.Cancel):
            self._drop_work(command.device, command.round)
            unsent = self._run.unsent.get(command.device)
            # A cancelled update must not be announced when its device reconnects.
            if unsent is not None and unsent.round == command.round:
                del self._run.unsent[command.device]
        elif isinstance(command, do.WakeAt):
            self._run.push(command.at, on.Ticked())
        # Virtual devices need no acknowledgements, and the state shows the job's end.

    def _evaluate(self, command: do.Evaluate) -> Mapping[str, float]:
        event = self._worker.execute(command)
        return event.metrics if isinstance(event, on.Evaluated) else {}

    def _pull(self, command: do.PullUpdate, now: float) -> None:
        run, device, ref = self._run, command.device, BlobRef.from_dict(command.weights)
        if reason := self._transfers.misfit(device, ref):
            run.push(now, on.UpdateRejected(device, command.round, command.attempt, reason, FailureKind.MALFORMED))
            return
        arrives_at = self._transfers.upload(self._devices[device], command.round, ref)
        run.push(arrives_at, on.UpdateStored(device, command.round, command.attempt, ref.sha256))
        self._fold_ahead(device, ref.sha256, arrives_at)

    def _fold_ahead(self, device: str, weights: str, arrives_at: float) -> None:
        """Add an update to the sums now, while other devices train, if it will be in time."""
        # The Close command decides what counts, and begins sums again that hold anything else: an update that may still
        # be dropped is not worth adding.
        state, task = self.state, self.state.tasks[device]
        ends_at = min(self._run.leaves[device], state.deadline or math.inf, task.deadline or math.inf)
        is_synchronous = isinstance(self.coordinator, SynchronousCoordinator)
        if self.experiment.workers > 1 and is_synchronous and not state.target_updates and arrives_at < ends_at:
            command = self.coordinator.part_commands.fold_command(device, replace(task, weights=weights), task.weight)
            self._folded_ahead[device] = command, self._worker.execute(command)

    def _offer(self, command: do.SendOffer, now: float) -> None:
        name, run, seed = command.device, self._run, self.job.seed
        if name not in run.online:
            return  # it is offered again when the device is back
        unsent = run.unsent.get(name)
        if unsent is not None and (unsent.round, unsent.attempt) == (command.round, command.attempt):
            return  # trained already, and announced again when the device came back
        self._stalls.on_offered(command, self.state, run.refusal)
        self._drop_work(name)  # a newer offer replaces an older one
        run.unsent.pop(name, None)
        device = self._devices[name]
        received_at = self._transfers.download(device, command.offer, command.round)
        speed = self.experiment.weather.compute_factor(seed, command.round, name)
        train_s = self._predict(device, command.offer).computing_s / speed
        # Keyed by attempt and session: a device that dropped out must not drop out of every repetition.
        rng = keyed_generator(seed, command.round, name, command.attempt, run.sessions[name], "drop-out")
        if rng.random() < self.experiment.dropouts.probability:
            leaves_at = min(received_at + rng.random() * train_s, run.leaves.get(name, NEVER_CLOSES))
            run.push(leaves_at, on.DeviceDied(name, run.sessions[name]))
            run.online.discard(name)  # messages don't reach it meanwhile
            self._schedule_birth(name, leaves_at + rng.exponential(self.experiment.dropouts.away_s))
        else:
            run.push(received_at + train_s, TrainingEnd(name, command.round, command.attempt, command.offer))
            self._runner.begin_ahead(device, command.offer, command.round)

    def _predict(self, device: VirtualDevice, offer: Mapping[str, Any]) -> Prediction:
        """Predicted costs of a training; devices of one kind share them."""
        widths, recipe = tuple(offer["widths"]), Recipe.from_dict(offer["recipe"])
        key = id(device.profile), device.samples, widths, recipe
        if key not in self._predictions:
            self._predictions[key] = device.predict(self.model.architecture, widths, recipe)
        return self._predictions[key]

    def _train(self, item: TrainingEnd) -> on.Event:
        device = self._devices[item.device]
        try:
            outcome = self._runner.train(device, item.offer, item.round)
        except (StorageError, WorkerKilledError):
            raise
        except FedpruneError as error:
            reason = one_line(str(error))
            log.warning("device %s refuses round %d: %s", item.device, item.round, reason)
            self._run.refusal = f"{item.device}: {reason}"
            return on.OfferRefused(item.device, item.round, item.attempt, reason, kind_of_exit_code(error.exit_code))
        macs = self._recorder.macs(item.device, item.round, item.offer, outcome.steps, device.samples)
        costs = self._run.device_costs(item.device)
        costs[MACS] += macs
        costs[ACTIVE_MACS] += round(macs * self._recorder.active_share(item.offer))
        speed = self.experiment.weather.compute_factor(self.job.seed, item.round, item.device)
        costs[ENERGY] += round(1e6 * (self._predict(device, item.offer).train_j or 0) / speed)
        self._run.macs += macs
        event = on.UpdateAnnounced(
            item.device,
            item.round,
            item.attempt,
            item.offer["weights"]["sha256"],
            outcome.weights.to_dict(),
            outcome.samples,
            outcome.steps,
            outcome.metrics,
        )
        self._run.unsent[item.device] = event
        return event

    def _schedule_birth(self, name: str, earliest: float) -> None:
        """Connect a device as soon as its window is open."""
        session = self._run.sessions.get(name, 0) + 1
        device = self._devices[name]
        opens_at, closes_at = self.experiment.availability.next_window(self.job.seed, name, earliest)
        self._run.leaves[name] = closes_at
        self._run.push(max(earliest, opens_at), device.birth(session, self._profiles[id(device.profile)]))

    def _drop_work(self, device: str, number: int | None = None) -> None:
        """Drop a device's queued work and its training ahead, of one round or of all."""
        self._run.drop_work(device, number)
        self._runner.cancel(device, number)

    def _save(self) -> None:
        self._folder.save(self._run, self.state)

    def _delete_superseded(self, names: Collection[str]) -> None:
        """Delete those of these blobs that are superseded."""
        # Processes write blobs that no state refers to yet: those of trainings ahead are not superseded.
        trained_ahead = self._runner.trained_ahead()
        needed = self.state.references() | self._worker.graph_digests() | self._run.references() | trained_ahead
        for name in names:
            if name not in needed:
                self.store.delete(name)
