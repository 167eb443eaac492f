"""The state of a job between two events, as plain data that the server stores: digests and numbers, never weights.

A `State` has a `JobDevice` for each device of the job and a `DeviceTask` for each device's *part* (participation) in
the current round. The coordinator changes it; `to_json` and `from_json` write and read it. A *core* is the part of the
model that all boards train together at first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any, cast

from fedprune.core.errors import StorageError
from fedprune.core.metrics import METRICS
from fedprune.jobs.blob_references import basis_digests, contribution_digests, offer_digests, update_digests
from fedprune.jobs.change_tracking import TrackedDict, TrackedEntry
from fedprune.jobs.failure_kind import UNDELIVERED_KINDS, FailureKind
from fedprune.jobs.packed_json import PackedJson

# A state of another format is refused: fields have other meanings in it, and a round would continue wrongly.
FORMAT = "fedprune.state/4"

# Attributes of a device that only its next connection or part needs. They are most of its size, and stay in the
# database between a large fleet's rounds.
EVICTED_ATTRIBUTES = ("plan", "probe")

# Attributes of a task that do not depend on the ranking of channels.
_KEPT_BY_NEXT_ATTEMPT = (
    "widths", "density", "samples", "weight", "last_counted_round", "work", "accumulate",
)  # fmt: skip

# Counts devices that are not asked because they failed.
FAILED = "failed"

# Shared by the devices of a fleet: what an attribute holds is replaced, never changed in place.
_EMPTY: dict[str, Any] = {}


class Phase(str, Enum):
    """Where a round stands."""

    WAITING = "waiting"
    SCORING = "scoring"
    TRAINING = "training"
    CLOSING = "closing"
    EVALUATING = "evaluating"
    FINISHED = "finished"


class Progress(str, Enum):
    """Where one device's part in a round stands."""

    QUEUED = "queued"
    EXTRACTING = "extracting"
    OFFERED = "offered"
    PULLING = "pulling"
    STORED = "stored"
    FOLDED = "folded"
    REFUSED = "refused"

    @property
    def is_over(self) -> bool:
        """Whether nothing more is awaited."""
        return self in (Progress.FOLDED, Progress.REFUSED)


def outcome(progress: str, kind: str) -> str:
    """The progress of a device's part as a word for people: `late`, `lost` or `gone` where nothing was delivered."""
    return kind if progress == Progress.REFUSED and kind in UNDELIVERED_KINDS else progress


@dataclass(slots=True)
class JobDevice(TrackedEntry):
    """A device as the job knows it.

    Attributes:
        session: Number of its latest connection.
        profile: Its hardware profile, as JSON.
        probe: What it measured of itself, as JSON.
        plan: The plan's JSON, or None where none fits.
        widths: Kept channels per group; empty without a plan.
        excluded: Why it takes no part; empty if it does.
        excluded_by: The kind of the failure behind `excluded`; empty if there was none.
        failures: Offers in a row that it refused or didn't answer, or that brought an update that didn't count.
        answer_s: What its last answers took, by kind (`fedprune.coordination.patience`).
        silent_since: When it was offered the part that it hasn't answered, while it isn't asked because of that.
        silent_offer: That offer's round and attempt, and the digest of its weights.
        asked_again_at: When it is asked again though it hasn't answered; None unless it was silent.
        correction: What its rounds taught about its predicted times (`fedprune.planning.correction.Correction`).
        density: Share of the model that it was given; where the planner chose widths group by group, the share of all
            channels that they keep.
        past: Its last counted update (`fedprune.coordination.commands.LastCountedUpdate`), if the strategy needs it.
        last_counted_round: The round of the offer behind its last counted update; 0 before the first.
        last_offered_round: The last round that it was offered; before the first offer, the round during which it
            joined.
        missed_rounds: Consecutive rounds that it was offered and that closed before it was done.
        allocation: What the strategy's allocator remembers of it.
        buffer: Asynchronous jobs: its last counted update (`fedprune.coordination.commands.Contribution`) where the
            schedule keeps that, and what it counted for.
        held: The state that it continues from, if updates or weights are encoded, or its optimiser's state is kept
            (`fedprune.coordination.commands.ReceivedWeights`).
        releases: Under differential privacy, how many releases contain its samples, by noise multiplier
            (`fedprune.coordination.privacy_budget`).
    """

    session: int
    online: bool
    profile: dict[str, Any]
    probe: Mapping[str, Any] | None
    samples: int
    plan: Mapping[str, Any] | None = None
    widths: tuple[int, ...] = ()
    excluded: str = ""
    excluded_by: str = ""
    failures: int = 0
    answer_s: dict[str, float] = field(default_factory=lambda: _EMPTY)
    silent_since: float | None = None
    silent_offer: list[Any] | None = None
    asked_again_at: float | None = None
    correction: dict[str, float] = field(default_factory=lambda: _EMPTY)
    density: float = 1.0
    past: dict[str, Any] | None = None
    last_counted_round: int = 0
    last_offered_round: int = 0
    missed_rounds: int = 0
    allocation: dict[str, Any] = field(default_factory=lambda: _EMPTY)
    buffer: dict[str, Any] | None = None
    codecs: list[str] = field(default_factory=list)
    held: dict[str, Any] | None = None
    releases: dict[str, int] = field(default_factory=lambda: _EMPTY)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> JobDevice:
        """Rebuild from JSON. Raises `TypeError` or `KeyError` if an attribute is wrong."""
        return cls(**{**body, "widths": tuple(body["widths"])})

    def __post_init__(self) -> None:
        for name in EVICTED_ATTRIBUTES:
            if (value := getattr(self, name)) is not None and not isinstance(value, PackedJson):
                setattr(self, name, PackedJson(value))

    def __getattr__(self, name: str) -> Any:
        """Read an attribute that was put away; it stays in memory until it is put away again."""
        if name not in EVICTED_ATTRIBUTES:
            raise AttributeError(f"device: {name}")
        if self._owner is None or self._owner.fetch is None:
            raise StorageError(
                f"device: its {name} is in the database alone", expected="a device of a job's state",
                got="one that was taken out of it", hint=f"Read its {name} before it is taken out.",
            )  # fmt: skip
        for key, value in self._owner.fetch(self._name).items():
            object.__setattr__(self, key, value)
        return object.__getattribute__(self, name)

    def to_dict(self) -> dict[str, Any]:
        packed = {k: dict(v) for k, v in (("plan", self.plan), ("probe", self.probe)) if v is not None}
        return TrackedEntry.to_dict(self) | packed  # a dataclass with slots doesn't know itself as `super`

    @property
    def count_kind(self) -> bool | str:
        """Devices are counted by whether they could take part in a round now; those that failed or are silent apart."""
        has_failed = self.silent_since is not None or (self.excluded and self.excluded_by)
        return FAILED if has_failed else self.online and not self.excluded

    def readmit(self) -> None:
        """Ask it again, after it was silent."""
        if self.asked_again_at is not None and self.widths:  # without a plan it has nothing to be asked for
            self.excluded, self.excluded_by = "", ""
        self.silent_since = self.asked_again_at = None

    @property
    def accumulate(self) -> int:
        """Gradient-accumulation steps per batch, as planned; 1 without a plan."""
        return int((self.plan or {}).get("accumulate", 1))

    def references(self) -> set[str]:
        """Digests of the blobs that are kept for it."""
        kept_contribution = contribution_digests((self.buffer or {}).get("contribution"))
        return update_digests(self.held) | update_digests(self.past) | kept_contribution


@dataclass(slots=True)
class DeviceTask(TrackedEntry):
    """One device's task: in the current round or, in an asynchronous job, in the round in which it was offered.

    Attributes:
        offer: What it was offered, as JSON.
        update: Reference of the update that it announced, as JSON.
        weights: Digest of that update, once it is stored.
        samples: Its training samples when the round began.
        weight: What its update counts for in the sums.
        work: How often the recipe's epochs are trained.
        kind: The `FailureKind` behind `reason`; empty unless the update was refused.
        past: The device's last counted update when the part began.
        last_counted_round: The round of the offer behind `past`; 0 for none.
        basis: Asynchronous jobs: the model and ranking it was cut from (`fedprune.coordination.commands.Basis`); None
            in synchronous jobs, where the state has them.
        offered_at: When it was offered first, on the shell's clock; None before, and after a restart.
        arrived_at: Asynchronous jobs: when its update was here.
        deadline: Its own deadline, if tasks have individual ones; for a refused task of an asynchronous job, when it
            may be offered again.
        in_summary: Asynchronous jobs: whether a finished round's summary includes it already.
    """

    attempt: int
    widths: tuple[int, ...]
    density: float = 1.0
    progress: Progress = Progress.EXTRACTING
    offer: dict[str, Any] | None = None
    update: dict[str, Any] | None = None
    weights: str = ""
    samples: int = 0
    weight: int = 1
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    past: dict[str, Any] | None = None
    last_counted_round: int = 0
    work: int = 1
    basis: dict[str, Any] | None = None
    offered_at: float | None = None
    seconds: float | None = None
    arrived_at: float | None = None
    deadline: float | None = None
    in_summary: bool = False
    accumulate: int = 1
    kind: str = ""

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> DeviceTask:
        """Rebuild from JSON. Raises `TypeError`, `KeyError` or `ValueError` if an attribute is wrong."""
        return cls(**{**body, "widths": tuple(body["widths"]), "progress": Progress(body["progress"])})

    @property
    def count_kind(self) -> Progress:
        return self.progress

    def references(self) -> set[str]:
        """Digests of the blobs that it needs."""
        digests = {self.weights, (self.offer or {}).get("ranking")}
        digests |= update_digests(self.past) | basis_digests(self.basis) | offer_digests(self.offer or {})
        return {d for d in digests if d}

    def refuse(self, reason: str, kind: str) -> None:
        """Note that its update doesn't count.

        An update that stood out among the others, or couldn't be used once it was in the sums, isn't a failure: the
        coordinator asks the device again as usual, since its data may be unusual, or the model may have changed.
        """
        self.progress, self.reason, self.kind = Progress.REFUSED, reason, str(FailureKind(kind).value)

    def summary(self) -> dict[str, Any]:
        """The entry of the finished round's record, as JSON."""
        return {
            "progress": self.progress.value,
            "attempt": self.attempt,
            "widths": list(self.widths),
            "density": self.density,
            "samples": self.samples,
            "metrics": dict(self.metrics),
            "reason": self.reason,
            "kind": self.kind,
        }


@dataclass
class State:
    """A job's state between two events.

    Attributes:
        model: Digest of the global model.
        tasks: The current round's parts, by device.
        ranking: Digest of the current round's ranking of channels.
        order: Digest of the ranking of elements; None without element masks.
        memory: Digests of the strategy's memories, by name.
        allocation: What the strategy's allocator remembers of the fleet.
        deadline: When the current round stops waiting, on the caller's clock.
        target_updates: Updates with which the current round closes; 0 for all.
        opened_at: Asynchronous jobs: when the current round began to collect.
        closing: While a round is being closed. Asynchronous jobs: which updates are new, the weight of each, and how
            far the sums move the model. With secure aggregation: the division of the devices into cohorts, until the
            sums of masked updates are known; then these sums and, until the round's end, how they went
            (`events.Unmasked`).
        wake_times: Times of `WakeAt` commands that the shell has not answered yet.
        architecture: Digest of the architecture that rankings and widths belong to; empty if the caller doesn't store
            it.
        private: Whether boards add noise to what they hand in, and have done so from the first round.
        paused: Whether the operator has paused the job: nothing new begins, and no deadline passes.
        paused_at: When the pause began, on the shell's clock.
        spent_under: Privacy settings under which one more release would exceed the budget; None until that happens.
        suspects: With secure aggregation, groups of devices of which one has spoilt a sum (`coordination.suspects`).
        at_fault: Devices that spoil sums; they are not asked again.
        began_at: When the first round began, on the shell's clock; None before.
        spent_bytes: Payload bytes to and from all devices until the last round was closed, as the shell counts them.
        spent_macs: The same of MACs of their training, where the shell counts them.
        untrained: Whether the job began with a model that had just been made, and shares a core since.
        core_widths: The widths that the fleet shares in the present round; empty where each board trains all that it
            can hold.
        core_density: The share of the model that these are, or would be if the fleet shared them.
        longest_s: How long the whole model would take the slowest board in a round, in seconds; 0 where nobody asks.
    """

    model: str
    round: int = 0
    phase: Phase = Phase.WAITING
    devices: TrackedDict[JobDevice] = field(default_factory=TrackedDict)
    tasks: TrackedDict[DeviceTask] = field(default_factory=TrackedDict)
    ranking: str | None = None
    order: str | None = None
    memory: dict[str, str] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    deadline: float | None = None
    target_updates: int = 0
    opened_at: float | None = None
    closing: dict[str, Any] | None = None
    wake_times: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    architecture: str = ""
    private: bool = False
    paused: bool = False
    paused_at: float | None = None
    spent_under: dict[str, Any] | None = None
    suspects: list[list[str]] = field(default_factory=list)
    at_fault: list[str] = field(default_factory=list)
    began_at: float | None = None
    spent_bytes: int = 0
    spent_macs: int = 0
    untrained: bool = False
    core_widths: list[int] = field(default_factory=list)
    core_density: float = 1.0
    longest_s: float = 0.0

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("devices", "tasks"):
            # Replacing all entries also changes those that were there before.
            former: TrackedDict[Any] = self.__dict__.get(name, TrackedDict())
            value = value if isinstance(value, TrackedDict) else TrackedDict(cast(dict[str, Any], value))
            if value is not former:
                value.take_over(former)
        object.__setattr__(self, name, value)

    def mark_saved(self) -> None:
        """Mark all changes of devices and tasks as saved."""
        self.devices.mark_saved()
        self.tasks.mark_saved()

    def drop_old_summaries(self, kept_summaries: int) -> None:
        """Drop the device summaries of finished rounds except the latest; the rounds' results stay."""
        for summary in reversed(self.history):
            kept_summaries -= len(summary["devices"])
            if kept_summaries < 0 and summary["devices"]:
                summary["devices"] = {}

    def best_round(self, judged_by: str) -> dict[str, Any] | None:
        """The finished round whose global model scored best by a metric, the earliest of equals; None where no model
        was evaluated by it."""
        metric = METRICS.get(judged_by)  # another version's may be unknown here
        best = None if metric is None else metric.best_index([row["metrics"].get(judged_by) for row in self.history])
        return None if best is None else self.history[best]

    def references(self) -> set[str]:
        """Digests of the blobs that this state needs."""
        digests = self.state_references()
        for entry in chain[TrackedEntry](self.devices.values(), self.tasks.values()):
            digests |= entry.references()
        return digests

    def state_references(self) -> set[str]:
        """Digests of the blobs that the state itself needs, without those of its devices and tasks."""
        sums = [cohort_sum["total"] for cohort_sum in (self.closing or {}).get("sums", ())]
        return {d for d in (self.model, self.ranking, self.order, *self.memory.values(), *sums) if d}

    def round_of(self, task: DeviceTask) -> int:
        """The round that a part was offered in."""
        return self.round if task.basis is None else int(task.basis["round"])

    def task_at(self, device: str, round_: int, attempt: int) -> DeviceTask | None:
        """A device's part, if it is of this round and attempt; None if the job has gone on."""
        task = self.tasks.get(device)
        if task is None or (self.round_of(task), task.attempt) != (round_, attempt):
            return None
        return task

    def shift_deadlines(self, seconds: float) -> None:
        """Move all that is due, by a pause's length or with the clock; the shell must be asked to wake up anew."""

        def shift(at: float | None) -> float | None:
            return None if at is None else at + seconds

        self.deadline, self.opened_at, self.paused_at = map(shift, (self.deadline, self.opened_at, self.paused_at))
        for task in self.tasks.values():
            times = (task.deadline, task.offered_at, task.arrived_at)
            task.deadline, task.offered_at, task.arrived_at = map(shift, times)
        for device in self.devices.values():
            if device.silent_since is not None or device.asked_again_at is not None:
                device.silent_since, device.asked_again_at = shift(device.silent_since), shift(device.asked_again_at)
        self.wake_times = []

    def awaits(self, task: DeviceTask) -> bool:
        """Whether a part may still bring something: in this phase of a round or, in an asynchronous job, in any."""
        return self.phase is Phase.TRAINING or (task.basis is not None and self.phase is not Phase.FINISHED)

    def rank_again(self) -> None:
        """Drop the ranking; a round that has begun with it starts again, under the next attempt number.

        Updates trained in it no longer count, because the old ranking chose their channels.
        """
        self.ranking = self.order = self.closing = None
        self.core_widths, self.core_density = [], 1.0  # of an architecture that is another now
        for device in self.devices.values():
            # All of these name channels by the old ranking.
            device.past = device.buffer = device.held = None
        if any(t.basis is not None for t in self.tasks.values()):
            for task in self.tasks.values():
                task.refuse("ranked again", FailureKind.STALE)
                task.past = task.deadline = None
            if self.phase in (Phase.TRAINING, Phase.CLOSING):
                self.phase, self.deadline = Phase.SCORING, None
        elif self.phase in (Phase.SCORING, Phase.TRAINING, Phase.CLOSING):
            self.phase, self.deadline = Phase.SCORING, None
            self.tasks = TrackedDict(
                (name, DeviceTask(t.attempt + 1, **{key: getattr(t, key) for key in _KEPT_BY_NEXT_ATTEMPT}))
                for name, t in self.tasks.items()
            )

    def drop_incompatible_parts(self, *, asynchronous: bool, masked: bool = False) -> None:
        """Drop parts that were made under another kind of schedule, or offered with other masks, as after a change of
        settings; a round that has begun with them starts again.
        """
        offers = [t.offer for t in self.tasks.values() if t.offer is not None]
        scheduled = all((t.basis is not None) == asynchronous for t in self.tasks.values())
        if scheduled and all(("secure" in offer) == masked for offer in offers):
            return
        self.tasks, self.closing, self.deadline, self.wake_times = TrackedDict(), None, None, []
        if self.phase in (Phase.SCORING, Phase.TRAINING, Phase.CLOSING):
            self.phase, self.round = Phase.WAITING, self.round - 1

    def to_json(self) -> str:
        """As JSON text."""
        body = {"format": FORMAT, **vars(self)}
        return json.dumps(body, sort_keys=True, separators=(",", ":"), default=lambda entry: entry.to_dict())

    @classmethod
    def from_json(
        cls, text: str, devices: Iterable[tuple[str, Any]] = (), tasks: Iterable[tuple[str, Any]] = ()
    ) -> State:
        """Read what `to_json` wrote, with rows of devices and tasks, by name, that the text doesn't have. Raises
        `StorageError` if the text is damaged or of another version."""
        try:
            body = json.loads(text)
            if body.pop("format") != FORMAT:
                raise StorageError("state of a job is of another version", expected=FORMAT)
            body["phase"] = Phase(body["phase"])
            shared: dict[str, Any] = {}
            body["devices"] = TrackedDict(
                (k, JobDevice.from_dict(_share_common_values(v, shared)))
                for k, v in chain(body["devices"].items(), devices)
            )
            body["tasks"] = TrackedDict((k, DeviceTask.from_dict(v)) for k, v in chain(body["tasks"].items(), tasks))
            return cls(**body)
        except StorageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"state of a job is damaged ({type(error).__name__}: {error})"
            raise StorageError(what, hint="Restore the server's backup.") from error


def _share_common_values(device: Mapping[str, Any], shared: dict[str, Any]) -> Mapping[str, Any]:
    """A device's JSON, sharing the profile and codecs of another device of its kind if they are equal: a profile takes
    10 kB, which a large fleet has no memory for."""
    profile, codecs = device["profile"], device["codecs"]
    shared_profile = shared.setdefault(f"profile {profile.get('name')}", profile)
    profile = shared_profile if shared_profile == profile else profile
    return {**device, "profile": profile, "codecs": shared.setdefault(f"codecs {codecs}", codecs)}
