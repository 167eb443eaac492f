"""What a simulation knows beside the coordinator's state: the events to come, who is there, what was sent.

One JSON file holds all of it, so that a run that was killed goes on. A digest of everything that decides a run is in
that file, too: a run is never continued with other settings, another model or other data.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.disk import write_whole
from fedprune.errors import StorageError
from fedprune.job import Job
from fedprune_export.imported import Model
from fedprune_server.virtual_device import VirtualDevice
from fedprune_server.worker import Evaluation

FORMAT = "fedprune.simulation/1"
FILE = "simulation.json"

_ANEW = "Choose another folder, or delete this one to begin anew."


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


@dataclass
class SimulationState:
    """Everything of a run that is not the coordinator's.

    Attributes:
        clock: Virtual seconds since the beginning.
        sequence: How many events have been made; orders those of the same time.
        queue: Events to come, as a heap by time and sequence.
        sessions: The last session of each device.
        online: Devices that are there.
        held: Digests that each device holds.
        down: Bytes sent to devices.
        up: Bytes sent by devices.
        traffic: Bytes down and up at the end of each round.
        refusal: Why a device refused an offer, last.
    """

    clock: float = 0.0
    sequence: int = 0
    queue: list[tuple[float, int, Item]] = field(default_factory=list)
    sessions: dict[str, int] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)
    held: dict[str, set[str]] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    traffic: dict[int, tuple[int, int]] = field(default_factory=dict)
    refusal: str = ""

    def push(self, at: float, item: Item) -> None:
        """Let something happen at a time."""
        self.sequence += 1
        heapq.heappush(self.queue, (at, self.sequence, item))

    def pop(self) -> Item:
        """Go on to the next event.

        Raises:
            IndexError: There is none.
        """
        self.clock, _, item = heapq.heappop(self.queue)
        return item

    def forget(self, device: str, number: int) -> None:
        """Stop whatever a device still does for a round."""
        kept = [
            entry
            for entry in self.queue
            if not (
                isinstance(entry[2], (Trained, on.UpdateAnnounced))
                and entry[2].device == device
                and entry[2].round == number
            )
        ]
        if len(kept) < len(self.queue):
            self.queue = kept
            heapq.heapify(self.queue)

    def references(self) -> set[str]:
        """Every text of the events to come that may name a blob."""
        return set().union(*(_texts(asdict(item)) for _, _, item in self.queue))

    def save(self, folder: Path, coordinator: State, fingerprint: str) -> None:
        """Write it, and the coordinator's state with it.

        Raises:
            StorageFullError: There is no room; what was saved before is untouched.
            StorageError: The disk fails.
        """
        body = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "coordinator": coordinator.to_json(),
            "clock": self.clock,
            "sequence": self.sequence,
            "sessions": self.sessions,
            "online": sorted(self.online),
            "held": {k: sorted(v) for k, v in self.held.items()},
            "bytes": [self.down, self.up],
            "traffic": {str(k): list(v) for k, v in self.traffic.items()},
            "queue": [[at, n, type(item).__name__, asdict(item)] for at, n, item in self.queue],
        }
        write_whole(folder / FILE, json.dumps(body).encode())

    @classmethod
    def load(cls, folder: Path, fingerprint: str) -> tuple[SimulationState, State] | None:
        """What `save` wrote, and the coordinator's state; None where nothing was saved.

        Raises:
            StorageError: It is damaged, of another version, or of a run with another fingerprint.
        """
        path = folder / FILE
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(f"can't read the simulation in {path} ({error})", hint=_ANEW) from error
        try:
            if body["format"] != FORMAT:
                raise StorageError(f"{path} is of another version", expected=FORMAT, hint=_ANEW)
            if body["fingerprint"] != fingerprint:
                raise StorageError(f"{path} belongs to a simulation with other settings, model or data", hint=_ANEW)
            state = cls(
                clock=float(body["clock"]),
                sequence=int(body["sequence"]),
                queue=[(float(at), int(n), _ITEMS[kind](**fields)) for at, n, kind, fields in body["queue"]],
                sessions={str(k): int(v) for k, v in body["sessions"].items()},
                online=set(body["online"]),
                held={k: set(v) for k, v in body["held"].items()},
                down=int(body["bytes"][0]),
                up=int(body["bytes"][1]),
                traffic={int(k): (int(d), int(u)) for k, (d, u) in body["traffic"].items()},
            )
            heapq.heapify(state.queue)
            return state, State.from_json(body["coordinator"])
        except StorageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StorageError(f"{path} is damaged ({type(error).__name__}: {error})", hint=_ANEW) from error


def fingerprint(
    job: Job,
    model: Model,
    devices: Sequence[VirtualDevice],
    dropouts: Mapping[str, float],
    evaluation: Evaluation | None,
    calibration: npt.NDArray[np.float32] | None,
) -> str:
    """Digest of all that decides a run.

    Args:
        job: The job's settings.
        model: The model: its graph as well as its architecture, which says nothing about activations.
        devices: The fleet with its data.
        dropouts: Settings of drop-outs.
        evaluation: The server's own samples and labels, or None.
        calibration: Its calibration samples, or None.
    """
    digest = hashlib.sha256(json.dumps([job.to_dict(), dict(dropouts)], sort_keys=True).encode())
    digest.update(model.architecture.digest.encode())
    digest.update(hashlib.sha256(model.graph.to_bytes()).digest())
    for device in sorted(devices, key=lambda d: d.name):
        digest.update(json.dumps([device.name, device.profile.to_dict()], sort_keys=True).encode())
        data = device.data
        _add(digest, (data.x_train, data.y_train, data.x_test, data.y_test))
    _add(digest, evaluation or ())
    _add(digest, () if calibration is None else (calibration,))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, arrays: Iterable[npt.NDArray[Any]]) -> None:
    """Add arrays with their types and shapes, so that no two lists of arrays add the same bytes."""
    arrays = list(arrays)
    digest.update(json.dumps([[a.dtype.str, a.shape] for a in arrays]).encode())
    for array in arrays:
        digest.update(array.tobytes())


def _texts(value: object) -> set[str]:
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        return set().union(*map(_texts, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_texts, value))
    return set()
