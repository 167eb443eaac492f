"""Checks the messages of one job's devices, and turns them into events of the job."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.coordination import events as on
from fedprune.coordination.patience import ROUND
from fedprune.core.errors import ProfileError, ProtocolError, UnknownProfileError
from fedprune.core.metrics import credible_metrics, served_metrics
from fedprune.core.text import one_line, sentences
from fedprune.jobs.blob_references import offer_digests
from fedprune.jobs.failure_kind import Failure, kind_of_exit_code
from fedprune.jobs.state import Progress
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import NAME_PATTERN
from fedprune.planning.profile_store import find_profile
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import CrashReport, ReleaseReport
from fedprune.wire.messages import (
    Birth,
    BlobNotFound,
    BlobRequest,
    Cancelled,
    Message,
    Refusal,
    RoundProgress,
    SecureStep,
    TrainingDone,
    UpdateAnnouncement,
    UploadResult,
    parse_message,
)
from fedprune_server.devices.crash_store import CrashStore
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.command_dispatcher import DeviceTraffic
from fedprune_server.engine.update_channel import UpdateChannel
from fedprune_server.ota.coordinator import RolloutCoordinator

log = logging.getLogger("fedprune.server")

# Seconds for which a hardware profile is used before its file is read again: ten thousand boards that reconnect at once
# name a few profiles, and an operator who changes a file doesn't have to restart the server.
_PROFILE_CACHE_S = 10.0


@dataclass(frozen=True)
class Envelope:
    """A decoded message or chunk (`body`), with the device that sent it, the job that its topic names, and its size in
    bytes."""

    device: str
    job: str
    body: Message | Chunk
    size: int

    @classmethod
    def decode(cls, device: str, job: str, channel: str, payload: bytes) -> Envelope:
        """Decode a payload. Raises `ProtocolError` if it is malformed, or names another device than its topic."""
        if channel == "up/blob":
            return cls(device, job, Chunk.parse(payload), len(payload))
        if channel != "up":
            raise ProtocolError("channel", expected="up or up/blob", got=channel)
        message = parse_message(payload)
        sender = getattr(message, "device", device)
        if sender != device:
            raise ProtocolError("device of a message", expected=device, got=sender)
        return cls(device, job, message, len(payload))


class MessageHandler:
    """Handles the messages of a job's devices, except births and deaths (a device's announcement of itself, and its
    will), which concern all jobs.

    Blob requests and chunks are answered here: they need no decision of the coordinator. Without `crashes` boards'
    crash reports are dropped."""

    def __init__(
        self,
        traffic: DeviceTraffic,
        channel: UpdateChannel,
        quarantine: Quarantine,
        profiles: Sequence[Path] = (),
        rollouts: RolloutCoordinator | None = None,
        crashes: CrashStore | None = None,
    ) -> None:
        self._channel = channel
        self._job, self._state, self._registry = traffic.job, traffic.state, traffic.registry
        self._uploads, self._outbox, self._monotonic = traffic.uploads, traffic.outbox, traffic.monotonic
        self._quarantine, self._profiles, self._rollouts, self._crashes = quarantine, tuple(profiles), rollouts, crashes
        self._cached_profiles: dict[str, tuple[float, dict[str, Any] | None]] = {}

    def receive(self, envelope: Envelope) -> on.Event | None:
        """Handle a message or chunk; returns the job's event, if the message is one. Raises `ProtocolError` if devices
        must not send this kind of message, and `StorageError` if the disk fails."""
        device, now = envelope.device, self._monotonic()
        self._registry.count_received(device, envelope.size)
        match envelope.body:
            case Chunk() as chunk:
                self._outbox.send_requests(self._uploads.on_chunk(device, chunk, now))
            case BlobRequest() as want:
                self._registry.note_activity(device)
                self._outbox.serve_request(device, want, self.fetchable_digests(device))
            case ReleaseReport() as report:
                if self._rollouts is not None:
                    self._rollouts.on_report(report)
            case CrashReport() as crash:
                # Only of admitted devices, whose number is limited: anybody can invent names.
                if self._crashes is not None and self._registry.is_admitted(device):
                    self._crashes.add(crash)
                    self._registry.crashes[device] = one_line(crash.text, 200)
            case BlobNotFound() as gone:
                self._outbox.send_requests(self._uploads.on_blob_missing(device, gone.sha256, now))
            case UploadResult() as result:
                self._outbox.send_requests(self._uploads.on_upload_result(device, result, now))
            case SecureStep() as step:
                self._registry.note_activity(device)
                if step.job == self._job.name:
                    self._channel.on_secure_step(device, step)
            case RoundProgress() | Refusal() | TrainingDone() | UpdateAnnouncement() as report:
                if report.job == self._job.name:
                    return self._on_report(device, report)
                # A board that reports on another job would repeat its report until it is answered.
                if isinstance(report, (TrainingDone, UpdateAnnouncement)):
                    self.cancel_outdated_part(device, report.job, report.round, report.attempt)
            case message:
                raise ProtocolError("message of a device", got=message.kind)
        return None

    def report_to_quarantine(self, event: on.Event) -> None:
        """Report to the quarantine whether a device's update was rejected or counted."""
        if isinstance(event, on.UpdateRejected):
            self._quarantine.note_rejected_update(event.device, event.kind, event.reason)
        elif isinstance(event, on.Folded):
            self._quarantine.note_counted_update(event.device)

    def removal_events(self, device: str, failure: Failure) -> list[on.Event]:
        """Events that end a device's part in the round, because the server no longer listens to the device."""
        device_state, task = self._state.devices.get(device), self._state.tasks.get(device)
        if device_state is None:
            return []
        events: list[on.Event] = [self.on_disconnect(device, device_state.session)]
        if task is not None:
            part_fields = device, self._state.round_of(task), task.attempt, failure.reason, failure.kind
            if task.progress is Progress.OFFERED:
                events.append(on.OfferRefused(*part_fields))
            if task.progress is Progress.PULLING:
                events.append(on.UpdateRejected(*part_fields))
        return events

    def on_disconnect(self, device: str, session: int) -> on.Event:
        """Drop what was under way with a device whose connection `session` has ended; returns the job's event."""
        device_state = self._state.devices.get(device)
        # A will may be delivered after the device has connected again: then transfers of the new session go on.
        if device_state is not None and device_state.session == session:
            self._uploads.drop(device)
            self._outbox.forget(device)
        self._registry.note_disconnect(device)
        return on.DeviceDied(device, session, self._registry[device].last_message_at)

    def note_warnings(self, birth: Birth) -> None:
        if self._crashes is not None:
            self._crashes.note_warnings(birth.device, birth.warnings)

    def save_crashes(self) -> None:
        """Save the crashes that boards reported, and acknowledge them."""
        for device, acknowledgement in ({} if self._crashes is None else self._crashes.save()).items():
            self._outbox.send(device, acknowledgement)

    def birth_event(self, birth: Birth) -> on.DeviceBorn | None:
        """The event of a device's birth; None if the device's profile or probe can't be used."""
        name = one_line(birth.profile, 64)
        try:
            profile = self._profile(_checked_profile_name(birth.profile))
            # Decoded and encoded again, so that nothing unchecked reaches the database.
            probe = None if birth.probe is None else ProbeReport.from_dict(birth.probe).to_dict()
        except ProfileError as error:
            self._registry.exclude(birth.device, _profile_problem(error), name, birth.samples)
            return None
        return on.DeviceBorn(birth.device, birth.session, profile, birth.samples, probe, birth.codecs)

    def _profile(self, name: str) -> dict[str, Any]:
        """A hardware profile; a changed file is read again within `_PROFILE_CACHE_S`.

        Boards of one kind share one object, because thousands of copies would fill the memory.
        """
        now = self._monotonic()
        read_at, cached = self._cached_profiles.get(name, (-math.inf, None))
        if cached is None or now - read_at > _PROFILE_CACHE_S:
            current = find_profile(name, self._profiles).to_dict()
            if cached is not None and cached != current:
                log.warning(
                    "%shardware profile %s has changed: boards that connect from now on get it",
                    self._registry.prefix,
                    name,
                )
            cached = cached if cached == current else current
            self._cached_profiles[name] = now, cached
        return cached

    def _on_report(
        self, device: str, message: RoundProgress | Refusal | TrainingDone | UpdateAnnouncement
    ) -> on.Event | None:
        """The event of a device's report on its part in a round."""
        is_news, state = False, self._state.devices.get(device)
        if self._state.task_at(device, message.round, message.attempt) is not None:
            # Of others, waits go by their last answers: an event a round would cost more than it tells.
            is_news = self._registry[device].progress is None and state is not None and ROUND not in state.answer_s
            self._registry.note_activity(device, message if isinstance(message, RoundProgress) else None)
        if isinstance(message, RoundProgress):
            return on.WorkReported(device, message.round, message.attempt) if is_news else None
        if isinstance(message, Refusal):
            reason = one_line(message.reason)
            log.warning("%sdevice %s refuses round %d: %s", self._registry.prefix, device, message.round, reason)
            kind = kind_of_exit_code(message.exit_code)
            self._channel.on_refusal(device, message.round, message.attempt, reason)
            return on.OfferRefused(device, message.round, message.attempt, reason, kind)
        contact = self._registry[device]
        metrics = credible_metrics(message.metrics)
        contact.metrics = served_metrics(metrics) or contact.metrics
        return self._channel.on_announcement(device, message, metrics)

    def cancel_outdated_part(self, device: str, job: str, round: int, attempt: int) -> None:  # noqa: A002 - the message's own names
        """Cancel a device's part that can no longer count, so that the device doesn't train in vain."""
        task = self._state.tasks.get(device)
        if job != self._job.name:
            reason = "this server runs another job"
        elif task is None or round != self._state.round_of(task):
            reason = "the round is over"
        else:
            return  # an earlier attempt of this round may be going on as the present one
        self._outbox.send(device, Cancelled(job, round, attempt, reason), job)

    def fetchable_digests(self, device: str) -> frozenset[str]:
        """Digests of the blobs that a device may fetch: those of its own offer and of its release."""
        digests = self.offered_digests(device)
        return digests if self._rollouts is None else digests | self._rollouts.downloadable_files(device)

    def offered_digests(self, device: str) -> frozenset[str]:
        """Digests of the blobs that a device's own offer names; may be called from any thread."""
        task = self._state.tasks.get(device)
        return frozenset(offer_digests((task.offer if task else None) or {}))


def _profile_problem(error: ProfileError) -> str:
    """Why a device's profile can't be used, and what the server's operator can do."""
    if not isinstance(error, UnknownProfileError):
        return one_line(str(error))
    return one_line(
        sentences(error.what, "Give the server the board's profile file, too: --profiles FOLDER (docs/add-a-board.md)")
    )


def _checked_profile_name(profile: str) -> str:
    """The name of a profile; `ProfileError` for other texts, which must not become a path on this machine."""
    if not NAME_PATTERN.fullmatch(profile):
        raise ProfileError(
            "name of a device's hardware profile",
            expected="up to 64 lower-case letters, digits, dots and dashes",
            got=repr(profile)[:80],
        )
    return profile
