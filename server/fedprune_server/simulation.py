"""A fleet on a virtual clock: the coordinator, the worker and the boards' own training, without network and waiting.

It is the second shell round the coordinator; the daemon is the first. Events wait in a queue ordered by time and, at
the same time, by the order in which they were made, so a run is the same every time. What a run needs to go on after a
kill is a JSON file and the blobs beside it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from fedprune_export.imported import Model
from fedprune_server.record import Record, record_of
from fedprune_server.virtual_device import BLOBS, Bench, VirtualDevice
from fedprune_server.worker import Evaluation, Worker

FORMAT = "fedprune.simulation/1"
STATE = "simulation.json"

_MAX_ATTEMPTS = 20
"""A round that nobody finished in this many attempts never will be."""


@dataclass(frozen=True)
class Trained:
    """A virtual device's training has come to its end (the numbers are worked out only now)."""

    device: str
    round: int
    attempt: int
    offer: dict[str, Any]


Item = on.Event | Trained

_ITEMS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Trained, on.DeviceBorn, on.DeviceDied, on.Scored, on.Extracted, on.UpdateAnnounced, on.UpdateStored,
        on.UpdateRejected, on.OfferRefused, on.Folded, on.Closed, on.Evaluated, on.Ticked,
    )
}  # fmt: skip


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


@dataclass
class _Run:
    """What a simulation remembers beside the coordinator's state."""

    clock: float = 0.0
    sequence: int = 0
    sessions: dict[str, int] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)
    held: dict[str, set[str]] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    traffic: dict[int, tuple[int, int]] = field(default_factory=dict)
    refusal: str = ""


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
        self._queue: list[tuple[float, int, Item]] = []
        self._run = _Run()
        self._fingerprint = _fingerprint(job, model, devices, self.dropouts, calibration)
        state = None if folder is None else self._load(folder / STATE)
        fresh = state is None
        self.coordinator = Coordinator(job, model.architecture, state or State(model=self._worker.initial()))
        if fresh:
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
                if not self._queue:
                    raise PlanError("the simulation has come to a standstill", hint=self._excuse())
                self._run.clock, _, item = heapq.heappop(self._queue)
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
                    self._tidy()
                if trained or ended:
                    self._save()
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
        now, run = self._run.clock, self._run
        if isinstance(command, (do.Score, do.Extract, do.Fold, do.Close, do.Evaluate)):
            self._push(now, self._worker.execute(command))
        elif isinstance(command, do.SendOffer):
            self._offer(command, now)
        elif isinstance(command, do.PullUpdate):
            size = int(command.weights["size"])
            run.up += size
            at = now + self._devices[command.device].upload_s(size)
            stored = on.UpdateStored(command.device, command.round, command.attempt, command.weights["sha256"])
            self._push(at, stored)
        elif isinstance(command, do.Cancel):
            self._forget(command.device, command.round)
        elif isinstance(command, do.Wake):
            self._push(command.at, on.Ticked())
        # An acknowledgement tells a virtual device nothing that it must act on, and the end is seen by the state.

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
        self._forget(name, command.round)  # a newer attempt takes an older one's place
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
            self._push(gone, on.DeviceDied(name, run.sessions[name]))
            run.online.discard(name)  # whatever is sent meanwhile does not arrive
            self._birth(name, gone + chance.exponential(self.dropouts.away_s))
        else:
            self._push(ready + took, Trained(name, command.round, command.attempt, command.offer))

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
        self._push(at, on.DeviceBorn(name, session, device.profile.to_dict(), device.data.samples))

    def _push(self, at: float, item: Item) -> None:
        self._run.sequence += 1
        heapq.heappush(self._queue, (at, self._run.sequence, item))

    def _forget(self, device: str, number: int) -> None:
        """Stop whatever a device still does for a round."""
        kept = [
            entry
            for entry in self._queue
            if not (
                isinstance(entry[2], (Trained, on.UpdateAnnounced))
                and entry[2].device == device
                and entry[2].round == number
            )
        ]
        if len(kept) < len(self._queue):
            self._queue = kept
            heapq.heapify(self._queue)

    def _excuse(self) -> str:
        reasons = sorted({d.excluded for d in self.state.devices.values() if d.excluded})
        return reasons[0] if reasons else "Fewer devices can take part than job.devices asks for."

    def _tidy(self) -> None:
        needed = self.state.references() | self._worker.graphs()
        for _, _, item in self._queue:
            needed |= _digests(asdict(item))
        for name in list(self.store.names()):
            if name not in needed:
                self.store.delete(name)

    def _save(self) -> None:
        if self._folder is None:
            return
        run = self._run
        body = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "coordinator": self.state.to_json(),
            "clock": run.clock,
            "sequence": run.sequence,
            "sessions": run.sessions,
            "online": sorted(run.online),
            "held": {k: sorted(v) for k, v in run.held.items()},
            "bytes": [run.down, run.up],
            "traffic": {str(k): list(v) for k, v in run.traffic.items()},
            "queue": [[at, n, type(item).__name__, asdict(item)] for at, n, item in self._queue],
        }
        path = self._folder / STATE
        fresh = path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(body, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    def _load(self, path: Path) -> State | None:
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(f"can't read the simulation in {path} ({error})", hint=_ANEW) from error
        try:
            if body["format"] != FORMAT:
                raise StorageError(f"{path} is of another version", expected=FORMAT, hint=_ANEW)
            if body["fingerprint"] != self._fingerprint:
                raise StorageError(f"{path} belongs to a simulation with other settings", hint=_ANEW)
            self._run = _Run(
                clock=float(body["clock"]),
                sequence=int(body["sequence"]),
                sessions={str(k): int(v) for k, v in body["sessions"].items()},
                online=set(body["online"]),
                held={k: set(v) for k, v in body["held"].items()},
                down=int(body["bytes"][0]),
                up=int(body["bytes"][1]),
                traffic={int(k): (int(d), int(u)) for k, (d, u) in body["traffic"].items()},
            )
            self._queue = [(float(at), int(n), _ITEMS[kind](**fields)) for at, n, kind, fields in body["queue"]]
            heapq.heapify(self._queue)
            return State.from_json(body["coordinator"])
        except StorageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StorageError(f"{path} is damaged ({type(error).__name__}: {error})", hint=_ANEW) from error


_ANEW = "Choose another folder, or delete this one to begin anew."


def _fingerprint(
    job: Job,
    model: Model,
    devices: Sequence[VirtualDevice],
    dropouts: DropOuts,
    calibration: npt.NDArray[np.float32] | None,
) -> str:
    """Digest of all that decides a run."""
    digest = hashlib.sha256(json.dumps([job.to_dict(), asdict(dropouts)], sort_keys=True).encode())
    digest.update(model.architecture.digest.encode())
    for tensor in model.tensors.values():
        digest.update(tensor.tobytes())
    for device in sorted(devices, key=lambda d: d.name):
        digest.update(json.dumps([device.name, device.profile.to_dict()], sort_keys=True).encode())
        for array in (device.data.x_train, device.data.y_train, device.data.x_test, device.data.y_test):
            digest.update(array.tobytes())
    if calibration is not None:
        digest.update(calibration.tobytes())
    return digest.hexdigest()


def _digests(value: object) -> set[str]:
    """Every text in a JSON value that may name a blob."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        return set().union(*map(_digests, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_digests, value))
    return set()
