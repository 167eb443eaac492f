"""Secure sums of the updates of a job's devices: the cohorts that sum together, and the steps of each sum.

The protocol is that of `fedprune.secure_aggregation`; here its steps are bound to messages, time-outs and uploads.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.masked import cohort_sum_line
from fedprune.core.errors import ConfigError, FedpruneError, ProtocolError, SignatureError
from fedprune.core.text import one_line
from fedprune.secure_aggregation.collector import Collector, FalseSharesError
from fedprune.secure_aggregation.messages import decode_roster
from fedprune.secure_aggregation.session import MIN_BOARDS, SecureSumSession, task_digest
from fedprune.secure_aggregation.vector_form import SECURE_FIELD, MaskedForm
from fedprune.security.keys import KEY_BYTES, VerifyingKey
from fedprune.wire.messages import Accepted, SecureStep, TrainingDone, UpdateAnnouncement
from fedprune_server.engine.command_dispatcher import DeviceTraffic
from fedprune_server.engine.update_channel import UpdateChannel, announcement

log = logging.getLogger("fedprune.server")

# Boards' answers, by the server's message that they answer. A delivery is answered with an `Update`, which announces
# the masked vector.
_ANSWER_STEPS = {"session": "keys", "roster": "shares", "delivery": "", "survivors": "unmasking"}

# The protocol's steps (docs/secure-aggregation.md), by the server's message that begins each.
_STEP_NAMES = {"session": "keys", "roster": "shares", "delivery": "masks", "survivors": "unmasking"}

# Share of a cohort's boards that may drop out after the step of keys. A larger share needs more neighbours per board,
# and so more shares and key agreements.
_DROPOUT_SHARE = 0.2

_RECONNECT_S = 10.0
_RANDOM_BYTES = 16


class MaskedChannel(UpdateChannel):
    """The secure sums of a job's current round, one for each cohort of devices that were sent the same.

    Nothing of a sum is stored: after a restart the coordinator orders the sums again, under new keys. Boards repeat
    their last message until the next step reaches them; each repetition makes the server send that step again. Masked
    vectors arrive in `store`, and are deleted once they are added."""

    holds_devices = True  # a device that disconnected after its part was settled could not unmask the others

    def __init__(self, traffic: DeviceTraffic, store: BlobStore) -> None:
        super().__init__(traffic)
        self._store = store
        self._round = 0
        self._cohorts: list[_Cohort] = []
        self._cohort_by_device: dict[str, _Cohort] = {}
        self._drop_reasons: dict[str, str] = {}
        self._reports: list[dict[str, Any]] = []
        self._acceptances: dict[str, Accepted] = {}
        self._device_by_digest: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, "fedprune-masks")

    @property
    def is_computing(self) -> bool:
        """Whether vectors are being added, or masks subtracted."""
        return any(cohort.pending_work for cohort in self._cohorts)

    def awaits_upload(self, device: str) -> bool:
        """Whether a device is in an unfinished sum."""
        return self._cohort_of(device) is not None

    def begin_sums(self, command: do.SumMasked) -> None:
        """Begin the sums of a round; earlier ones are dropped."""
        self._round, self._drop_reasons, self._reports, self._acceptances = command.round, {}, [], {}
        self._cohorts, self._cohort_by_device = [], {}
        self._device_by_digest = {}
        for devices in command.cohorts:
            offer = self._state.tasks[devices[0]].offer or {}
            form = MaskedForm.from_json(offer[SECURE_FIELD])
            task = task_digest(offer["selection"], offer["weights"]["sha256"], offer["recipe"], offer[SECURE_FIELD])
            try:
                session = _sum_session(self._job.name, command.round, task, len(devices), form)
            except FedpruneError as error:
                self._drop_reasons |= dict.fromkeys(devices, one_line(str(error)))
                log.warning("round %d: no secure sum of %s: %s", command.round, ", ".join(devices), error)
                self._reports.append({"boards": len(devices), "summed": 0, "lost": {}})
                continue
            cohort = _Cohort(session, devices)
            self._cohorts.append(cohort)
            self._cohort_by_device |= dict.fromkeys(devices, cohort)
            self._begin_step(cohort, "session", dict.fromkeys(devices, session.to_bytes()))

    def _resend_step(self, device: str, round_: int) -> None:
        """Send a device in this round's sum its step again: it repeats its last message, so it may have missed it."""
        cohort = self._cohort_of(device)
        if round_ != self._round:
            return
        if cohort is not None and device not in cohort.answered:
            self._send(cohort, device)
        elif device in self._acceptances:
            self._traffic.outbox.send(device, self._acceptances[device], self._job.name)

    def on_secure_step(self, device: str, message: SecureStep) -> None:
        """Handle a device's answer. An unusable one costs the device its place in the sum."""
        cohort = self._cohort_of(device)
        is_awaited = cohort is not None and message.sum == cohort.sum_id and not cohort.pending_work
        if cohort is None or not is_awaited or message.step != _ANSWER_STEPS[cohort.step] or device in cohort.answered:
            # The answer is of an earlier step, came twice, or is no longer needed.
            self._resend_step(device, message.round)
            return
        try:
            cohort.add_answer(device, message.step, message.content)
        except (ProtocolError, SignatureError) as error:
            self._drop_device(cohort, device, one_line(str(error)))

    def on_announcement(
        self, device: str, message: TrainingDone | UpdateAnnouncement, metrics: Mapping[str, float]
    ) -> on.Event | None:
        if isinstance(message, TrainingDone):
            self._resend_step(device, message.round)
            return announcement(device, message, metrics, {})
        if not self._fetch_masked(device, message):
            self._cancel(device, message, "this job takes no updates but masked ones of a sum that goes on")
        return None

    def _fetch_masked(self, device: str, update: UpdateAnnouncement) -> bool:
        """Fetch a masked vector, or send the device its current step again. False if none is expected."""
        cohort, accepted = self._cohort_by_device.get(device), self._acceptances.get(device)
        if accepted is not None and (update.round, update.attempt) == (self._round, accepted.attempt):
            self._resend_step(device, update.round)
            return True
        if cohort is None or not self._is_current(device, update.round, update.attempt):
            return False
        if cohort.is_over or cohort.step != "delivery":
            # In the first steps the vector can only be masked for an earlier sum.
            self._resend_step(device, update.round)
            return True
        if update.weights.size != cohort.session.size:
            return False
        if device not in cohort.answered:
            ref, now = update.weights, self._traffic.monotonic()
            # Masked vectors are random, so one that is here already is a copy. It would be deleted with the original.
            owner = self._device_by_digest.setdefault(ref.sha256, device)
            is_repeated = cohort.announced_digests.get(device) == ref.sha256
            if owner != device or (self._store.has(ref.sha256) and not is_repeated):
                forgery = "a file that the server has" if owner == device else f"the masked update of {owner}"
                self._drop_device(cohort, device, f"it announces {forgery} as its own")
                return False
            cohort.announced_digests[device] = ref.sha256
            requests = self._traffic.uploads.add(device, update.round, update.attempt, ref, now)
            self._traffic.outbox.send_requests(requests)
        return True

    def take_upload(self, event: on.Event) -> bool:
        """Handle the end of an upload, if it is that of a masked vector."""
        if not isinstance(event, (on.UpdateStored, on.UpdateRejected)):
            return False
        cohort = self._cohort_of(event.device)
        current = self._is_current(event.device, event.round, event.attempt)
        if cohort is None or cohort.step != "delivery" or not current:
            return False
        if isinstance(event, on.UpdateRejected):
            self._drop_device(cohort, event.device, event.reason)
        elif event.weights != cohort.announced_digests.get(event.device):
            return False
        elif event.device not in cohort.answered:
            cohort.answer(event.device)
            accepted = Accepted(self._job.name, event.round, event.attempt, event.weights)
            cohort.acceptances[event.device] = accepted
            future = self._thread.submit(self._add_vector, cohort, event.device, event.weights)
            cohort.pending_work.append((event.device, future))
        return True

    def on_refusal(self, device: str, round_: int, attempt: int, reason: str) -> None:
        """Drop a device from its sum, if it refuses the current attempt at this round."""
        cohort = self._cohort_of(device)
        if cohort is not None and self._is_current(device, round_, attempt):
            self._drop_device(cohort, device, reason)

    def take_sums(self, now: float) -> on.Unmasked | None:
        """End each step whose answers are all in, or whose time is up. Returns the round's sums once all have ended.

        No step waits for devices that are offline, except the step of keys, which waits `_RECONNECT_S`: after a restart
        the server begins before devices have connected again. Each step has the job's deadline.
        """
        if not self._cohorts and not self._drop_reasons:
            return None
        for cohort in self._cohorts:
            self._advance(cohort, now)
        if not all(cohort.is_over for cohort in self._cohorts):
            return None
        sums: list[dict[str, Any]] = []
        for cohort in self._cohorts:
            if cohort.total_digest:
                devices = cohort.collector.boards
                sums.append({"total": cohort.total_digest, "narrow": cohort.session.narrow, "devices": list(devices)})
                self._acceptances |= {name: cohort.acceptances[name] for name in devices}
            self._drop_reasons |= cohort.absence_reasons()
            report = cohort.report()
            log.info("round %d: %s", self._round, cohort_sum_line(report))
            self._reports.append(report)
        false_cohorts = [list(cohort.collector.boards) for cohort in self._cohorts if cohort.has_false_shares]
        event = on.Unmasked(self._round, sums, dict(sorted(self._drop_reasons.items())), self._reports, false_cohorts)
        self._cohorts, self._cohort_by_device, self._drop_reasons = [], {}, {}
        for device in self._acceptances:
            self._resend_step(device, self._round)
        return event

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _advance(self, cohort: _Cohort, now: float) -> None:
        """End a cohort's step, if its answers are in or its time is up, and begin the next one."""
        cohort.step_began_at = cohort.step_began_at or now
        cohort.take_results()
        if cohort.is_over or cohort.pending_work:
            return
        is_reconnecting = cohort.step == "session" and now < cohort.step_began_at + _RECONNECT_S
        has_time_left = now < cohort.step_began_at + self._job.deadline_s
        # A set's order is random, so the search meets a device that is online early, if many are.
        is_waiting = is_reconnecting or any(self._state.devices[name].online for name in cohort.awaited)
        has_enough = cohort.step == "survivors" and cohort.collector.is_ready
        if has_time_left and cohort.awaited and is_waiting and not has_enough:
            return
        cohort.note_missed_step(cohort.messages.keys() - cohort.answered)
        try:
            match cohort.step:
                case "session":
                    self._begin_step(cohort, "roster", cohort.rosters())
                case "roster":
                    self._begin_step(cohort, "delivery", cohort.collector.deliveries())
                case "delivery":
                    self._begin_step(cohort, "survivors", cohort.collector.survivors())
                case _:
                    cohort.pending_work.append(("", self._thread.submit(self._unmask, cohort)))
        except ProtocolError as error:
            cohort.fail(error)

    def _begin_step(self, cohort: _Cohort, step: str, messages: Mapping[str, bytes]) -> None:
        """Begin a step by sending its message to each device."""
        cohort.step, cohort.messages, cohort.step_began_at = step, dict(messages), 0.0
        cohort.answered, cohort.awaited = set(), messages.keys() - cohort.drop_reasons.keys()
        for device in cohort.messages:
            self._send(cohort, device)

    def _send(self, cohort: _Cohort, device: str) -> None:
        task, content = self._state.tasks.get(device), cohort.messages.get(device)
        if task is None or content is None:
            return
        message = SecureStep.of(self._job.name, self._round, task.attempt, cohort.sum_id, cohort.step, content)
        self._traffic.outbox.send(device, message, self._job.name)

    def _drop_device(self, cohort: _Cohort, device: str, reason: str) -> None:
        log.warning("round %d: %s drops out of the secure sum: %s", self._round, device, reason)
        cohort.drop(device, reason)

    def _is_current(self, device: str, round_: int, attempt: int) -> bool:
        task = self._state.tasks.get(device)
        return task is not None and (round_, attempt) == (self._round, task.attempt)

    def _cohort_of(self, device: str) -> _Cohort | None:
        """The cohort of a device, if its sum is unfinished."""
        cohort = self._cohort_by_device.get(device)
        return None if cohort is None or cohort.is_over else cohort

    # In the thread.

    def _add_vector(self, cohort: _Cohort, device: str, digest: str) -> None:
        """Add a masked vector to the sum, and delete it."""
        try:
            cohort.collector.add_masked(device, self._store.read(digest))
        finally:
            self._store.delete(digest)

    def _unmask(self, cohort: _Cohort) -> str:
        return self._store.put(cohort.collector.total().to_bytes()).sha256


@dataclass
class _Cohort:
    """One secure sum.

    Attributes:
        sum_id: Random id of the sum.
        identity_keys: Identity keys by device, as they came over the devices' connections.
        step: The server's last step.
        messages: The server's messages of this step, by device.
        answered: Devices that have answered the step.
        awaited: Devices for whose answers the step waits, unless they are offline.
        announced_digests: Digest of the masked vector that a device has announced, by device.
        acceptances: The message that will accept a device's masked vector, by device.
        drop_reasons: The reason, by device that was dropped for one.
        missed_steps: The first step that a device didn't answer, by device that has dropped out for whatever reason.
        pending_work: Tasks of the thread, in its order, with the device that each concerns; an empty name for the sum
            itself.
        step_began_at: The time at which the step began; 0 until the next turn.
        total_digest: Digest of the sum, once it is stored.
        failure: The reason why there is no sum; empty if there is one.
        has_false_shares: Whether a board's false shares are that reason.
    """

    session: SecureSumSession
    devices: tuple[str, ...]
    sum_id: str = field(default_factory=lambda: secrets.token_hex(_RANDOM_BYTES))
    identity_keys: dict[str, VerifyingKey] = field(default_factory=dict)
    step: str = ""
    messages: dict[str, bytes] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    awaited: set[str] = field(default_factory=set)
    announced_digests: dict[str, str] = field(default_factory=dict)
    acceptances: dict[str, Accepted] = field(default_factory=dict)
    drop_reasons: dict[str, str] = field(default_factory=dict)
    missed_steps: dict[str, str] = field(default_factory=dict)
    pending_work: deque[tuple[str, Future[Any]]] = field(default_factory=deque)
    step_began_at: float = 0.0
    total_digest: str = ""
    failure: str = ""
    has_false_shares: bool = False

    def __post_init__(self) -> None:
        self.collector = Collector(self.session, self.identity_keys)

    @property
    def is_over(self) -> bool:
        return bool(self.total_digest or self.failure)

    def answer(self, device: str) -> None:
        self.answered.add(device)
        self.awaited.discard(device)

    def drop(self, device: str, reason: str) -> None:
        self.drop_reasons[device] = reason
        self.awaited.discard(device)
        self.note_missed_step((device,))

    def note_missed_step(self, devices: Iterable[str]) -> None:
        for device in devices:
            self.missed_steps.setdefault(device, _STEP_NAMES[self.step])

    def add_answer(self, device: str, step: str, content: bytes) -> None:
        """Add a device's answer. Raises `ProtocolError` or `SignatureError`."""
        if step == "keys":
            self.identity_keys.setdefault(device, VerifyingKey(content[:KEY_BYTES]))
            self.collector.add_advertisement(device, content[KEY_BYTES:])
        elif step == "shares":
            self.collector.add_shares(device, content)
        else:
            self.collector.add_unmasking(device, content)
        self.answer(device)

    def rosters(self) -> dict[str, bytes]:
        """Each device's neighbours: their identity keys, and the collector's roster."""
        rosters = self.collector.rosters()
        neighbours_of = {device: tuple(decode_roster(roster, self.session)) for device, roster in rosters.items()}
        return {
            device: len(neighbours).to_bytes(2, "big")
            + b"".join(self.identity_keys[neighbour].raw for neighbour in neighbours)
            + rosters[device]
            for device, neighbours in neighbours_of.items()
        }

    def take_results(self) -> None:
        """Handle the results of the thread. Raises `StorageError` if the disk has failed; a device whose vector is lost
        by that is awaited again."""
        while self.pending_work and self.pending_work[0][1].done():
            device, future = self.pending_work.popleft()
            error = future.exception()
            if error is None:
                self.total_digest = self.total_digest if device else future.result()
            elif not isinstance(error, ProtocolError):
                if device:
                    self.answered.discard(device)
                    self.awaited.add(device)
                raise error
            elif device:
                self.drop(device, one_line(str(error)))
            else:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        self.failure = one_line(f"the secure sum failed: {error}")
        self.has_false_shares = isinstance(error, FalseSharesError)
        log.warning("%s", self.failure)

    def absence_reasons(self) -> dict[str, str]:
        """The reasons of the devices that are not in the sum, by device."""
        summed = self.collector.boards if self.total_digest else ()
        step_reasons = {
            name: f"it dropped out of the secure sum at the step of {step}" for name, step in self.missed_steps.items()
        }
        reasons = {name: self.drop_reasons.get(name) or step_reasons.get(name) or self.failure for name in self.devices}
        return {name: reason or "no neighbour is left" for name, reason in reasons.items() if name not in summed}

    def report(self) -> dict[str, Any]:
        """A report on the sum, as in `on.Unmasked`. A board that drops out after its vector has arrived is summed."""
        summed = self.collector.boards if self.total_digest else ()
        lost: dict[str, list[str]] = {}
        for name, step in sorted(self.missed_steps.items()):
            if name not in summed:
                lost.setdefault(step, []).append(name)
        return {"boards": len(self.devices), "summed": len(summed), "lost": lost}


def _sum_session(job: str, round_: int, task: str, boards: int, form: MaskedForm) -> SecureSumSession:
    """The session of a sum of this many boards. Raises `ConfigError` if they are too few.

    A fifth of the boards may drop out after the step of keys, and in small cohorts as many as k − t allows: k is even
    and less than the number of boards, t is k/2 + 1.
    """
    if boards < MIN_BOARDS:
        raise ConfigError("boards of the same channels in a secure sum", expected=f"{MIN_BOARDS} or more", got=boards)
    context = json.dumps([job, round_, secrets.token_hex(_RANDOM_BYTES)]).encode()
    dropout_share = min(_DROPOUT_SHARE, (boards - MIN_BOARDS) // 2 / boards)
    return SecureSumSession.choose(context, boards, form.narrow, form.wide, task=task, dropping=dropout_share)
