"""Registers the devices of a job: admits them, counts their traffic, and notes their progress and problems."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from fedprune.coordination import State
from fedprune.core.errors import ProtocolError
from fedprune.core.validation import is_number
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, Progress
from fedprune.model.architecture import Architecture
from fedprune.planning.correction import Correction
from fedprune.planning.costs import costs_at
from fedprune.planning.width_plan import WidthPlan
from fedprune.wire.lost_pieces import LostPieces, dropping_broker_message
from fedprune.wire.messages import BlobRequest, RoundProgress
from fedprune_server.devices.clone_detection import CloneDetector

log = logging.getLogger("fedprune.server")

# Submodels whose numbers of parameters are cached: devices of equal widths share them.
_MAX_CACHED_WIDTHS = 4096

# Seconds without an answer to an offer after which a board is slow: it answers each repetition of the offer, and a
# machine under load takes some seconds for that.
SLOW_S = 60.0

# The phase of a board's part before it has everything that it was offered.
_DOWNLOAD = "download"


# Plans whose texts are cached: devices of one plan share them.
_MAX_CACHED_PLANS = 4096


# Shared by all devices without metrics, to save memory: metrics are replaced, never changed in place.
_NO_METRICS: Mapping[str, float] = {}


@dataclass(slots=True)
class Contact:
    """A device's volatile state, in addition to the coordinator's.

    Attributes:
        bytes_down: Payload bytes to the device, over all starts of the server.
        bytes_up: Payload bytes from it.
        progress: Its last report on its current part.
        sent_part: Round and attempt of the last offer that was really sent to it.
        offered_at: Time at which that was first sent; None once its update has arrived.
        sent_at: Time at which it was last sent, in seconds of listening (`ListeningClock`).
        heard_at: Time of its last sign of working on that offer; at first, of the sending. In seconds of listening.
        part_seconds: Time from its last offer until its update arrived.
        metrics: Scores of the model that it serves, on its own test samples, as last reported.
        introduced: Hash of the plan with which it was last logged.
        problem: The reason for which it can't take part; empty without one.
        temperature_c: As reported last: at its start, or while it worked.
        last_message_at: Seconds since 1970; None before the first message since the server's start.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    progress: RoundProgress | None = None
    software: str = ""
    sent_part: tuple[int, int] | None = None
    offered_at: float | None = None
    sent_at: float = 0.0
    heard_at: float = 0.0
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
        listening: Seconds in which the server could hear its boards (`ListeningClock`).

    Attributes:
        parameters_at: Number of a submodel's parameters, by its widths.
        total_traffic: Payload bytes to and from all devices, over all starts of the server.
        unsaved_traffic: Payload bytes to and from devices for which they have changed since they were saved.
        crashes: How devices' programs ended last, until an update of theirs arrives.
        transfers: Notices pieces of blobs that the broker drops.
        clones: Detects names that two boards use.
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
        listening: Callable[[], float] = time.monotonic,
        *,
        prefix: str = "",
    ) -> None:
        self.model_parameters = costs_at(architecture, architecture.sizes).parameters
        self._state = state
        self._limit = limit
        self._clock, self._listening = clock, listening
        self._contacts = {name: Contact(bytes_down=down, bytes_up=up) for name, (down, up) in traffic.items()}
        self.total_traffic = sum(down for down, _ in traffic.values()), sum(up for _, up in traffic.values())
        self.plan_log = PlanLog(job, architecture, self.model_parameters, prefix)
        self.parameters_at = lru_cache(_MAX_CACHED_WIDTHS)(partial(submodel_parameters, architecture))
        self.unsaved_traffic: dict[str, tuple[int, int]] = {}
        self.prefix = prefix
        self.clones = CloneDetector()
        self.transfers = TransferWatch(self._contacts, listening)
        self.crashes: dict[str, str] = {}
        self.unplanned_devices: dict[str, dict[str, Any]] = {}
        for name, body in (unplanned_devices or {}).items():
            self.unplanned_devices[name] = {**body, "online": False}
            self._contacts.setdefault(name, Contact(problem=str(body.get("excluded", ""))))

    def __getitem__(self, device: str) -> Contact:
        """A device's contact; blank for one that was never admitted."""
        return self._contacts.get(device) or Contact()

    def admit(self, device: str, software: str, size: int) -> None:
        """Admit a device that announces itself. Raises `ProtocolError` if it is new, and there are too many already."""
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

    def note_offer(self, device: str, sent_part: tuple[int, int], now: float) -> None:
        """Note that an offer, by its round and attempt, has been sent. Its time counts from the first sending; `now` is
        monotonic."""
        contact = self[device]
        contact.sent_at = self._listening()
        if contact.sent_part != sent_part:
            contact.sent_part, contact.heard_at = sent_part, contact.sent_at
            contact.offered_at, contact.progress = now, None

    def note_activity(self, device: str, progress: RoundProgress | None = None) -> None:
        """Note a sign that a device works on its offer."""
        contact = self[device]
        contact.heard_at, contact.progress = self._listening(), progress or contact.progress
        if progress is not None and progress.phase != _DOWNLOAD:
            self.transfers.note_complete_download(device)
        if progress is not None and progress.temperature_c is not None:
            contact.temperature_c = progress.temperature_c

    def note_temperature(self, device: str, temperature_c: object) -> None:
        """Note what a device measured at its start, if that is a temperature."""
        if is_number(temperature_c, -100.0, 300.0):
            self[device].temperature_c = float(temperature_c)

    def take_silent(self, patience_s: float) -> list[str]:
        """Connected devices that haven't answered their offer for `patience_s`, each once in that time."""
        now = self._listening()
        due = (name for name in self.silences(patience_s) if now - self[name].sent_at >= patience_s)
        names = sorted(name for name in due if self._state.devices[name].online)
        for name in names:
            self[name].sent_at = now  # it is sent again at the end of this turn, unless the connection is busy
        return names

    def silences(self, min_s: float = SLOW_S) -> dict[str, float]:
        """Seconds since the offers to devices that haven't answered them for `min_s`, disconnected ones included.

        Only what was sent is judged: between the coordinator's decision and the sending, an earlier offer may be the
        last one that the device knows.
        """
        now, state, silences = self._listening(), self._state, dict[str, float]()
        for name, task in state.tasks.items():
            if task.progress is not Progress.OFFERED or name not in state.devices:
                continue
            contact = self[name]
            is_sent = contact.sent_part == (state.round_of(task), task.attempt) and state.awaits(task)
            if is_sent and now - contact.heard_at >= min_s:
                silences[name] = now - contact.heard_at
        return silences

    def unreached(self, number: int, names: Iterable[str]) -> frozenset[str]:
        """Those devices of a round that were sent no offer of it."""
        return frozenset(name for name in names if (self[name].sent_part or (0, 0))[0] != number)

    def note_delivery(self, device: str, now: float) -> None:
        """Note that a device's update has arrived."""
        self.transfers.forget(device)
        self.crashes.pop(device, None)
        contact = self[device]
        if contact.offered_at is not None:
            contact.part_seconds, contact.offered_at = now - contact.offered_at, None

    def note_birth(self, device: str, session: int, profile: str, samples: int, now: float, *, connected: bool) -> None:
        """Note an admitted device's birth."""
        if not connected:  # its offer is sent again, and nothing from before counts
            self[device].heard_at = self._listening()
        self.transfers.forget(device)
        self.clones.note_birth(device, session, (profile, samples), connected, now)

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

    def note_disconnect(self, device: str) -> None:
        """Note that a device has disconnected."""
        self.transfers.forget(device)
        if device in self.unplanned_devices:
            self.unplanned_devices[device]["online"] = False
            self._note_seen(device)

    def _note_seen(self, device: str) -> None:
        """Store with an excluded device when its last message came: no event of the job tells it."""
        if (at := self[device].last_message_at) is not None:
            self.unplanned_devices[device]["seen_at"] = at

    def introduce(self, name: str) -> None:
        """Log a connected device, for which the coordinator has a plan."""
        contact = self[name]
        contact.problem = ""
        self.unplanned_devices.pop(name, None)
        self.plan_log.introduce(name, contact, self._state.devices[name])

    def is_excluded(self, device: str) -> bool:
        """Whether a device is known to be unable to take part."""
        device_state = self._state.devices.get(device)
        return device in self.unplanned_devices or (device_state is not None and bool(device_state.excluded))


def submodel_parameters(architecture: Architecture, widths: tuple[int, ...]) -> int:
    return sum(math.prod(architecture.shape(spec.name, widths)) for spec in architecture.trainable)


class TransferWatch:
    """The transfers under way to and from `admitted` devices: a stranger may use any number of names. Times are in
    seconds of `listening`: pieces that wait in the server are not lost."""

    def __init__(self, admitted: Container[str], listening: Callable[[], float]) -> None:
        self._admitted, self._listening = admitted, listening
        self._lost_downloads = defaultdict[str, LostPieces](LostPieces)
        self._lost_uploads = defaultdict[str, LostPieces](LostPieces)

    def note_download_request(self, device: str, request: BlobRequest) -> None:
        """Note that a device requests pieces of a blob of which none waits to be sent to it."""
        if device in self._admitted:
            self._lost_downloads[device].note_request(request, self._listening())

    def note_upload_request(self, device: str, request: BlobRequest) -> None:
        """Note that pieces of its update are requested from a device."""
        if device in self._admitted:
            self._lost_uploads[device].note_request(request, self._listening())

    def drop_reasons(self) -> dict[str, str]:
        """Texts about devices whose pieces of blobs, sent or requested, seem to be dropped by the broker."""
        reasons = {name: "gets no piece of its model: " + dropping_broker_message("what is sent to it")
                   for name, lost_pieces in self._lost_downloads.items() if lost_pieces.is_stuck}  # fmt: skip
        update_reason = "announces its update, and no piece of it comes: " + dropping_broker_message("what it sends")
        for name, lost_pieces in self._lost_uploads.items():
            if lost_pieces.is_stuck:
                reasons[name] = update_reason
        return reasons

    def note_complete_download(self, device: str) -> None:
        """Note that a device has all that it was offered."""
        self._lost_downloads.pop(device, None)

    def forget(self, device: str) -> None:
        """Forget the requests under way to and from a device: their pieces can no longer be missed."""
        self._lost_uploads.pop(device, None)
        self._lost_downloads.pop(device, None)


class PlanLog:
    """Logs devices of a job once for each plan."""

    def __init__(self, job: Job, architecture: Architecture, model_parameters: int, prefix: str) -> None:
        self._job, self._architecture, self._model_parameters = job, architecture, model_parameters
        self._prefix = prefix
        self._doubted = set[str]()
        self._descriptions: dict[int, tuple[str, str]] = {}  # first line and warning of a logged plan, by its hash

    def introduce(self, name: str, contact: Contact, device: JobDevice) -> None:
        """Log a connected device once per plan, with the plan; only its first line if that plan was logged before."""
        introduction = hash((device.widths, device.excluded, device.profile.get("name")))
        if introduction == contact.introduced:
            return
        contact.introduced = introduction
        title = device.profile.get("title") or device.profile.get("name")
        if device.excluded:
            log.warning("%sdevice %s (%s) is excluded: %s", self._prefix, name, title, device.excluded)
            return
        description = (name, title, device.samples, contact.software or "?")
        log.info("%sdevice %s is connected: %s, %d samples, %s", self._prefix, *description)
        plan_hash = hash(device.plan if device.plan is not None else (device.widths, device.density))
        if plan_hash not in self._descriptions:
            if len(self._descriptions) >= _MAX_CACHED_PLANS:
                self._descriptions.clear()
            self._descriptions[plan_hash] = self._log_plan(device)
        elif device.plan is not None or device.density != self._job.density:
            log.info("  %s", self._descriptions[plan_hash][0])
        if warning := self._descriptions[plan_hash][1]:
            log.warning("%sdevice %s: %s", self._prefix, name, warning)

    def warn_of_doubt(self, name: str, device: JobDevice) -> None:
        """Log once that a device's rounds are far from what it measured of itself."""
        doubt = Correction(**device.correction).doubt
        if doubt and name not in self._doubted:
            log.warning("%sdevice %s: %s; it is planned by its rounds", self._prefix, name, doubt)
            self._doubted.add(name)

    def _log_plan(self, device: JobDevice) -> tuple[str, str]:
        """Log a plan for the first time. Returns its first line and warning, for other devices with this plan."""
        if device.plan is None:
            kept_share = costs_at(self._architecture, device.widths).parameters / self._model_parameters
            lines = [f"density {device.density:.3g}, as asked: keeps {100 * kept_share:.0f}% of the weights"]
            warning = ""
        else:
            plan = WidthPlan.from_dict(device.plan)
            lines = plan.describe(self._model_parameters).splitlines()
            warning = "; ".join(filter(None, (plan.doubt, plan.warning)))
            lines[0] = f"{lines[0]}, {plan.unbound_line() or f'bound by {plan.bound}'}"
        log.info("  %s", lines[0])
        for line in lines[1:]:  # for everyday use `status` and the console's page of the board have them
            log.debug("  %s", line)
        return lines[0], warning
