"""Makes the snapshots of a job that its observers get after each turn.

Figures that need a pass over all devices are computed when an observer reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.jobs.state import DeviceTask, Progress, outcome
from fedprune_server.devices.plan_vs_actual import compare_latest
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.executor.background import BackgroundExecutor
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.observation.snapshot import (
    AT_OTHER_JOB,
    AWAITED_PROGRESS,
    OFFLINE,
    DeviceSnapshot,
    FleetSnapshot,
    JobSnapshot,
    LazyMapping,
)
from fedprune_server.transfer.uploads import Uploads


class SnapshotMaker:
    """Makes snapshots of one job. The clock counts seconds since 1970. `members` returns the names of the fleet's
    members, the same object until they change; it is None if every device may take part."""

    def __init__(
        self,
        job: Job,
        state: State,
        registry: DeviceRegistry,
        uploads: Uploads,
        executor: BackgroundExecutor,
        outbox: Outbox,
        *,
        schedule: Schedule,
        clock: Callable[[], float],
        members: Callable[[], Collection[str]] | None = None,
    ) -> None:
        self._job, self._state, self._registry, self._uploads = job, state, registry, uploads
        self._executor, self._outbox, self._clock = executor, outbox, clock
        self._schedule, self._members = schedule, members
        self._cached_revoked: tuple[Collection[str] | None, Collection[str]] = None, ()

    def snapshot(self, fleet: FleetSnapshot) -> JobSnapshot:
        job, state, registry, schedule = self._job, self._state, self._registry, self._schedule
        bytes_down, bytes_up = registry.total_traffic
        return JobSnapshot(
            name=job.name,
            strategy=job.strategy,
            judged_by=job.recipe.judged_by,
            rounds=job.rounds,
            min_devices=job.devices,
            is_asynchronous=schedule.asynchronous,
            closes_early=schedule.asynchronous or job.over_selection > 0,
            deadline_s=job.deadline_s,
            round=state.round,
            phase=state.phase,
            is_paused=state.paused,
            model=state.model,
            now=self._clock(),
            closes_at=None if state.paused else state.deadline,
            history=state.history,
            parts_by_progress=state.tasks.counts,
            parameters=registry.model_parameters,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
            queues=LazyMapping(self._queues),
            able_devices=state.devices.count(True),
            known_devices=len(state.devices) + len(registry.unplanned_devices),
            devices=_Devices(state, registry, self._uploads, fleet),
            devices_with_traffic=registry.unsaved_traffic,
            device_states=LazyMapping(self._count_states),
            awaited_devices=LazyMapping(self._awaited_deadlines),
            unplanned_devices=registry.unplanned_devices,
            revoked_devices=LazyMapping(lambda: dict.fromkeys(self._revoked_devices(), True)),
            cloned_devices=LazyMapping(registry.clones.suspicions),
            undelivered_devices=LazyMapping(registry.transfers.drop_reasons),
            silent_devices=LazyMapping(registry.silences),
            crashes=registry.crashes,
            comparisons=LazyMapping(lambda: compare_latest(state)),
            fleet=fleet,
        )

    def _revoked_devices(self) -> Collection[str]:
        """Devices of the job that are no longer members."""
        if self._members is None:
            return ()
        members = self._members()
        # A device that the job gets to know later is a member then, so that only a change of the members counts.
        if self._cached_revoked[0] is not members:
            self._cached_revoked = members, {name for name in self._state.devices if name not in members}
        return self._cached_revoked[1]

    def _queues(self) -> dict[str, int]:
        uploads = len(self._uploads.devices())
        return {"commands": self._executor.pending_count, "uploads": uploads, "messages": self._outbox.queued_messages}

    def _count_states(self) -> Counter[str]:
        """Count devices by their present activity."""
        state, revoked, counts = self._state, self._revoked_devices(), Counter[str]()
        for name, device in state.devices.items():
            task = state.tasks.get(name)
            is_working = task is not None and task.progress in AWAITED_PROGRESS and state.awaits(task)
            online_state = "working" if is_working else "idle"
            offline_state = "revoked" if name in revoked else "offline"
            counts["excluded" if device.excluded else online_state if device.online else offline_state] += 1
        counts["excluded"] += len(self._registry.unplanned_devices.keys() - state.devices.keys())
        return counts

    def _awaited_deadlines(self) -> dict[str, float | None]:
        """Devices with a part under way, with their deadlines."""
        state = self._state
        if state.phase is not Phase.TRAINING or not state.tasks.count(*AWAITED_PROGRESS):
            return {}
        # With `in_flight` each board has a deadline of its own.
        return {
            name: task.deadline or state.deadline
            for name, task in state.tasks.items()
            if task.progress in AWAITED_PROGRESS
        }


class _Devices(Mapping[str, DeviceSnapshot]):
    """Makes the snapshot of a device when it is asked for: a turn concerns few devices."""

    def __init__(self, state: State, registry: DeviceRegistry, uploads: Uploads, fleet: FleetSnapshot) -> None:
        self._state, self._registry, self._uploads, self._fleet = state, registry, uploads, fleet

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._state.devices.keys() | self._registry.names))

    def __len__(self) -> int:
        return len(self._state.devices.keys() | self._registry.names)

    def __contains__(self, name: object) -> bool:
        return name in self._state.devices or (isinstance(name, str) and self._registry.is_admitted(name))

    def __getitem__(self, name: str) -> DeviceSnapshot:
        if name not in self:
            raise KeyError(name)
        state, contact = self._state, self._registry[name]
        device, task = state.devices.get(name), state.tasks.get(name)
        connected = name in self._fleet.connected_devices
        activity = self._activity(name, task, connected=connected)
        if self._registry.clones.is_suspected(name):
            activity = f"{activity} (two boards of this name?)"
        values: dict[str, Any] = {"profile": str(self._registry.unplanned_devices.get(name, {}).get("profile", "?"))}
        if device is not None:
            values = {
                "profile": str(device.profile.get("name", "?")),
                "density": device.density if device.widths else None,  # its plan need not be in memory
                "parameters": self._registry.parameters_at(device.widths) if device.widths else 0,
                "samples": device.samples,
                "seconds": contact.part_seconds,
                "metrics": contact.metrics,
                "excluded_by": device.excluded_by,
                "last_counted_round": device.last_counted_round,
            }
            if task is not None and state.awaits(task):
                is_training = task.progress is Progress.OFFERED and contact.progress is not None
                values["part_progress"] = "training" if is_training else outcome(task.progress.value, task.kind)
        return DeviceSnapshot(
            name=name,
            takes_part=device is not None,
            online=device is not None and device.online,
            connected=connected,
            bytes_down=contact.bytes_down,
            bytes_up=contact.bytes_up,
            activity=activity,
            excluded=contact.problem or ("" if device is None else device.excluded),
            software=contact.software,
            temperature_c=contact.temperature_c,
            last_message_at=contact.last_message_at,
            **values,
        )

    def _activity(self, name: str, task: DeviceTask | None, *, connected: bool) -> str:
        """A device's activity, in words."""
        device, contact = self._state.devices.get(name), self._registry[name]
        if problem := contact.problem or ("" if device is None else device.excluded):
            return f"excluded: {problem}"
        if device is None:
            return "unknown"
        if not device.online:
            return AT_OTHER_JOB if connected else OFFLINE
        if task is None or not self._state.awaits(task):
            return "ready"
        if task.progress is Progress.OFFERED and (progress := contact.progress) is not None:
            return f"{progress.phase} {progress.done}/{progress.total}" if progress.total else progress.phase
        if task.progress is Progress.PULLING and (upload_leaves := self._uploads.progress(name)) is not None:
            return f"upload {upload_leaves[0]}/{upload_leaves[1]}"
        if task.progress is Progress.REFUSED:
            return f"{outcome(task.progress, task.kind)}: {task.reason}"
        return "aggregated" if task.progress is Progress.FOLDED else task.progress.value
