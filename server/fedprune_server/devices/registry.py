"""A job's devices as people see them: their traffic, progress and problems."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from fedprune.coordination import State
from fedprune.core.errors import ProtocolError
from fedprune.core.validation import is_number
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, Progress
from fedprune.model.architecture import Architecture
from fedprune.planning.costs import costs_at
from fedprune.planning.plan import WidthPlan
from fedprune.wire.lost_pieces import LostPieces, dropping_broker_message
from fedprune.wire.messages import BlobRequest, RoundProgress
from fedprune_server.devices.clone_detection import MIN_OVERLAPS, OVERLAP_WINDOW_S, CloneDetector

log = logging.getLogger("fedprune.server")


# Submodels and plans whose figures and texts are cached: devices of equal widths share them.
_MAX_REMEMBERED_PLANS = 4096

# The phase of a board's part before it has everything that it was offered.
_DOWNLOAD = "download"

# Shared by all devices without metrics, to save memory: metrics are replaced, never changed in place.
_NO_METRICS: Mapping[str, float] = {}


@dataclass(slots=True)
class Contact:
    """A device's volatile state, in addition to the coordinator's.

    Attributes:
        bytes_down: Payload bytes to the device, over all starts of the server.
        bytes_up: Payload bytes from it.
        progress: Its last report on its current part.
        offered_at: Time of its last offer; None once its update has arrived.
        heard_at: Time of its last sign of working on its offer.
        part_seconds: Time from its last offer until its update arrived.
        metrics: Those of the model that it serves, on its own test samples, as last reported.
        introduced: Hash of what was last logged of its plan.
        problem: The reason for which it can't take part; empty without one.
        temperature_c: As reported last: at its start, or while it worked.
        last_message_at: Seconds since 1970; None before the first message since the server's start.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    progress: RoundProgress | None = None
    software: str = ""
    offered_at: float | None = None
    heard_at: float = -math.inf
    part_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=lambda: _NO_METRICS)
    introduced: int = 0
    problem: str = ""
    temperature_c: float | None = None
    last_message_at: float | None = None


class DeviceRegistry:
    """A job's devices, in addition to the coordinator's state.

    Args:
        state: The coordinator's state; read, never changed.
        traffic: Payload bytes to and from each device before this start of the server.
        limit: Maximum number of devices, ever: names cost a stranger nothing, but memory and disk here.
        unplanned_devices: Devices that couldn't be planned for before this start of the server.
        clock: Seconds since 1970.
        prefix: Begins the log's lines about a device, if there are several jobs.

    Attributes:
        model_parameters: Number of the whole model's parameters.
        parameters_at: Number of a submodel's parameters, by its widths.
        total_traffic: Payload bytes to and from all devices, over all starts of the server.
        unsaved_traffic: Payload bytes to and from devices for which they have changed since they were saved.
        crashes: How devices' programs ended last, until an update of theirs arrives.
        unplanned_devices: Devices that have announced themselves but can't take part, and why. The coordinator doesn't
            know them.
    """

    def __init__(
        self,
        job: Job,
        architecture: Architecture,
        state: State,
        traffic: Mapping[str, tuple[int, int]],
        limit: int = 1000,
        unplanned_devices: Mapping[str, Mapping[str, Any]] | None = None,
        clock: Callable[[], float] = time.time,
        *,
        prefix: str = "",
    ) -> None:
        self._job = job
        self._architecture = architecture
        self.model_parameters = costs_at(architecture, architecture.sizes).parameters
        self._state = state
        self._limit = limit
        self._clock = clock
        self._contacts = {name: Contact(bytes_down=down, bytes_up=up) for name, (down, up) in traffic.items()}
        self.total_traffic = sum(down for down, _ in traffic.values()), sum(up for _, up in traffic.values())
        self._plan_descriptions: dict[int, tuple[str, str]] = {}  # first line and warning of a logged plan, by its hash
        self.parameters_at = lru_cache(_MAX_REMEMBERED_PLANS)(partial(submodel_parameters, architecture))
        self.unsaved_traffic: dict[str, tuple[int, int]] = {}
        self.prefix = prefix
        self.clones = CloneDetector()
        self._lost_downloads = defaultdict[str, LostPieces](LostPieces)
        self._lost_uploads = defaultdict[str, LostPieces](LostPieces)
        self.crashes: dict[str, str] = {}
        self._silent_since_offer = set[str]()  # devices of which nothing has come since their offer
        self.unplanned_devices: dict[str, dict[str, Any]] = {}
        for name, body in (unplanned_devices or {}).items():
            self.unplanned_devices[name] = {**body, "online": False}
            self._contacts.setdefault(name, Contact(problem=str(body.get("excluded", ""))))

    def __getitem__(self, device: str) -> Contact:
        """A device's contact; blank for one that was never admitted."""
        return self._contacts.get(device) or Contact()

    def admit(self, device: str, software: str, size: int) -> None:
        """Admit a device that announces itself. Raises `ProtocolError` if it is new, and there are too many already."""
        self._silent_since_offer.discard(device)
        if device not in self._contacts:
            if len(self._contacts) >= self._limit:
                raise ProtocolError(
                    f"device {device} is one too many",
                    expected=f"at most {self._limit} devices",
                    hint="Raise max_devices in [server], and see who uses your broker.",
                )
            self._contacts[device] = Contact(bytes_up=size)
            self.unsaved_traffic[device] = (0, size)
            self.total_traffic = self.total_traffic[0], self.total_traffic[1] + size
        self._contacts[device].software = sys.intern(software)
        if size:  # without a message it is only assigned to the job
            self._contacts[device].last_message_at = self._clock()

    def is_admitted(self, device: str) -> bool:
        return device in self._contacts

    @property
    def names(self) -> set[str]:
        return set(self._contacts)

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """Payload bytes to and from each device, over all starts of the server."""
        return {n: (c.bytes_down, c.bytes_up) for n, c in sorted(self._contacts.items())}

    def count_received(self, device: str, size: int) -> None:
        """Count bytes of a message from an admitted device. Unknown names are not counted: there may be any number."""
        self.count_traffic(device, 0, size)
        self.note_message(device)

    def note_message(self, device: str) -> None:
        """Note a message of an admitted device, whose bytes may be counted in another job."""
        self._silent_since_offer.discard(device)
        if device in self._contacts:
            self._contacts[device].last_message_at = self._clock()

    def count_sent(self, device: str, size: int) -> None:
        self.count_traffic(device, size, 0)

    def count_traffic(self, device: str, bytes_down: int, bytes_up: int) -> None:
        """Count bytes to and from an admitted device."""
        if device in self._contacts:
            contact = self._contacts[device]
            contact.bytes_down += bytes_down
            contact.bytes_up += bytes_up
            self.unsaved_traffic[device] = (contact.bytes_down, contact.bytes_up)
            self.total_traffic = self.total_traffic[0] + bytes_down, self.total_traffic[1] + bytes_up

    def note_offer(self, device: str, now: float) -> None:
        contact = self[device]
        contact.offered_at, contact.progress, contact.heard_at = now, None, now

    def note_activity(self, device: str, now: float, progress: RoundProgress | None = None) -> None:
        """Note a sign that a device works on its offer."""
        contact = self[device]
        contact.heard_at, contact.progress = now, progress or contact.progress
        if progress is not None and progress.phase != _DOWNLOAD:
            self._lost_downloads.pop(device, None)
        if progress is not None and progress.temperature_c is not None:
            contact.temperature_c = progress.temperature_c

    def note_temperature(self, device: str, temperature_c: object) -> None:
        """Note what a device measured at its start, if that is a temperature."""
        if is_number(temperature_c, -100.0, 300.0):
            self[device].temperature_c = float(temperature_c)

    def take_silent(self, now: float, patience_s: float) -> list[str]:
        """Connected devices with an offer that have shown no sign of working on it for `patience_s`.

        Each is named again only after another `patience_s`.
        """
        state = self._state
        names = []
        for name, task in state.tasks.items():
            if task.progress is not Progress.OFFERED or now - self[name].heard_at < patience_s:
                continue
            device = state.devices.get(name)
            if state.awaits(task) and device is not None and device.online:
                self[name].heard_at = now
                names.append(name)
                self._silent_since_offer.add(name)
        return sorted(names)

    def note_download_request(self, device: str, request: BlobRequest, now: float) -> None:
        """Note that a device requests pieces of a blob, which it is sent."""
        if device in self._contacts:
            self._lost_downloads[device].note_request(request, now)

    def note_upload_request(self, device: str, request: BlobRequest, now: float) -> None:
        """Note that pieces of its update are requested from a device."""
        if device in self._contacts:
            self._lost_uploads[device].note_request(request, now)

    def drop_reasons(self) -> dict[str, str]:
        """Texts about devices whose pieces of blobs, sent or requested, seem to be dropped by the broker."""
        reasons = {name: "gets no piece of its model: " + dropping_broker_message("what is sent to it")
                   for name, lost_pieces in self._lost_downloads.items() if lost_pieces.is_stuck}  # fmt: skip
        update_reason = "announces its update, and no piece of it comes: " + dropping_broker_message("what it sends")
        for name, lost_pieces in self._lost_uploads.items():
            if lost_pieces.is_stuck:
                reasons[name] = update_reason
        return reasons

    def silence_reasons(self) -> dict[str, str]:
        """Texts about devices of which nothing has come since their offer, disconnected ones included."""
        beginning = "was offered a round, and nothing has come of it since: its program hangs, or "
        return dict.fromkeys(self._silent_since_offer, beginning + dropping_broker_message("what it sends or is sent"))

    def note_delivery(self, device: str, now: float) -> None:
        """Note that a device's update has arrived."""
        self.forget_transfers(device)
        self.crashes.pop(device, None)
        contact = self[device]
        if contact.offered_at is not None:
            contact.part_seconds, contact.offered_at = now - contact.offered_at, None

    def note_birth(self, device: str, session: int, profile: str, samples: int, now: float, *, connected: bool) -> None:
        """Note an admitted device's birth. Warn if another board seems to use its name."""
        self.forget_transfers(device)
        reason = self.clones.note_birth(device, session, (profile, samples), connected, now)
        if reason:
            log.warning(
                "device %s: another board called %s seems to be connected: %s. Give every board a --device of its own, "
                "unless this one was only started again with other data. If the card of one is a copy of the other's: "
                "fedprune-server devices replace %s, and let each join again.",
                device,
                device,
                reason,
                device,
            )

    def note_shared_key(self, device: str, now: float) -> None:
        """Note a sign that two boards sign with one key. Warn after enough signs."""
        if self.clones.note_shared_key(device, now):
            log.warning(
                "two boards seem to use the identity of %s, as if one were a copy of the other's card or state folder: "
                "%d signs of it within %.0f minutes. A broker that delays messages for long can look the same, so look "
                "for the second board first. If there is one, take it away, or revoke the identity of both "
                "(fedprune-server devices replace %s) and let each join again with a name and claim of its own.",
                device,
                MIN_OVERLAPS,
                OVERLAP_WINDOW_S / 60,
                device,
            )

    def exclude(self, device: str, problem: str, profile: str, samples: int, *, cannot_start: bool = False) -> None:
        """Note that an admitted device can't be planned for, or reports that it can't start. It is logged once."""
        if self[device].problem != problem:
            log.warning("%sdevice %s is excluded: %s", self.prefix, device, problem)
        self[device].problem = problem
        body = {"online": not cannot_start, "profile": profile, "samples": samples, "excluded": problem}
        self.unplanned_devices[device] = body | ({"cannot_start": True} if cannot_start else {})
        self._note_seen(device)

    def note_start(self, device: str) -> None:
        """Note that a device that couldn't start has started. Whether it can be planned for is checked later."""
        if self.unplanned_devices.get(device, {}).get("cannot_start"):
            del self.unplanned_devices[device]
            self[device].problem = ""

    def forget_transfers(self, device: str) -> None:
        """Forget the requests under way to and from a device: their pieces can no longer be missed."""
        self._lost_uploads.pop(device, None)
        self._lost_downloads.pop(device, None)

    def note_disconnect(self, device: str) -> None:
        """Note that a device has disconnected."""
        self.forget_transfers(device)
        if device in self.unplanned_devices:
            self.unplanned_devices[device]["online"] = False
            self._note_seen(device)

    def _note_seen(self, device: str) -> None:
        """Store with an excluded device when its last message came: no event of the job tells it."""
        if (at := self[device].last_message_at) is not None:
            self.unplanned_devices[device]["seen_at"] = at

    def introduce(self, name: str) -> None:
        """Log a connected device once per plan, with the plan; of one that was logged before, only the first line."""
        contact, device = self[name], self._state.devices[name]
        contact.problem = ""
        self.unplanned_devices.pop(name, None)
        introduction = hash((device.widths, device.excluded, device.profile.get("name")))
        if introduction == contact.introduced:
            return
        contact.introduced = introduction
        title = device.profile.get("title") or device.profile.get("name")
        if device.excluded:
            log.warning("%sdevice %s (%s) is excluded: %s", self.prefix, name, title, device.excluded)
            return
        description = (name, title, device.samples, contact.software or "?")
        log.info("%sdevice %s is connected: %s, %d samples, %s", self.prefix, *description)
        plan_hash = hash(device.plan if device.plan is not None else (device.widths, device.density))
        if plan_hash not in self._plan_descriptions:
            if len(self._plan_descriptions) >= _MAX_REMEMBERED_PLANS:
                self._plan_descriptions.clear()
            self._plan_descriptions[plan_hash] = self._log_plan(device)
        elif device.plan is not None or device.density != self._job.density:
            log.info("  %s", self._plan_descriptions[plan_hash][0])
        if warning := self._plan_descriptions[plan_hash][1]:
            log.warning("%sdevice %s: %s", self.prefix, name, warning)

    def _log_plan(self, device: JobDevice) -> tuple[str, str]:
        """Log a plan that no other device has had. Returns its first line and warning, for devices that share it."""
        if device.plan is None:
            kept_share = costs_at(self._architecture, device.widths).parameters / self.model_parameters
            decider = "job" if device.density == self._job.density else "strategy"
            lines = [
                f"density {device.density:.3g}, as the {decider} says: keeps {100 * kept_share:.0f}% of the weights"
            ]
            warning = ""
        else:
            plan = WidthPlan.from_dict(device.plan)
            lines, warning = plan.describe(self.model_parameters).splitlines(), plan.warning
            lines[0] = f"{lines[0]}, {plan.unbound_line() or f'bound by {plan.bound}'}"
        log.info("  %s", lines[0])
        for line in lines[1:]:  # for everyday use `status` and the console's page of the board have them
            log.debug("  %s", line)
        return lines[0], warning

    def is_excluded(self, device: str) -> bool:
        """Whether a device is known to be unable to take part."""
        device_state = self._state.devices.get(device)
        return device in self.unplanned_devices or (device_state is not None and bool(device_state.excluded))


def submodel_parameters(architecture: Architecture, widths: tuple[int, ...]) -> int:
    return sum(math.prod(architecture.shape(spec.name, widths)) for spec in architecture.trainable)
