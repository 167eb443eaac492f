"""Secure sums of the updates of a job's devices: the cohorts that sum together, and the steps of each sum.

The protocol is that of `fedprune.secure_aggregation`; here its steps are bound to messages, time-outs and uploads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.masked import cohort_sum_line
from fedprune.coordination.patience import Patience
from fedprune.core.errors import FedpruneError, ProtocolError, SignatureError
from fedprune.core.text import one_line
from fedprune.secure_aggregation.session import task_digest
from fedprune.secure_aggregation.vector_form import SECURE_FIELD, MaskedForm
from fedprune.wire.messages import Accepted, SecureStep, TrainingDone, UpdateAnnouncement
from fedprune_server.engine.command_dispatcher import DeviceTraffic
from fedprune_server.engine.secure_cohort import Cohort, sum_session
from fedprune_server.engine.update_channel import UpdateChannel, announcement

log = logging.getLogger("fedprune.server")

# Boards' answers, by the server's message that they answer. A delivery is answered with an `Update`, which announces
# the masked vector.
_ANSWER_STEPS = {"session": "keys", "roster": "shares", "delivery": "", "survivors": "unmasking"}

_RECONNECT_S = 10.0


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
        self._cohorts: list[Cohort] = []
        self._cohort_by_device: dict[str, Cohort] = {}
        self._drop_reasons: dict[str, str] = {}
        self._reports: list[dict[str, Any]] = []
        self._acceptances: dict[str, Accepted] = {}
        self._device_by_digest: dict[str, str] = {}
        self._patience = Patience(self._job.deadline_s)
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
                session = sum_session(self._job.name, command.round, task, len(devices), form)
            except FedpruneError as error:
                self._drop_reasons |= dict.fromkeys(devices, one_line(str(error)))
                log.warning("round %d: no secure sum of %s: %s", command.round, ", ".join(devices), error)
                self._reports.append({"boards": len(devices), "summed": 0, "lost": {}})
                continue
            cohort = Cohort(session, devices)
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
            cohort.add_answer(device, message.step, message.content, self._traffic.monotonic())
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
            cohort.answer(event.device, self._traffic.monotonic())
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
        the server begins before devices have connected again. How long it waits for the others, the job's patience
        says (`fedprune.coordination.patience`), and while none has answered, the job's deadline.
        """
        if not self._cohorts and not self._drop_reasons:
            return None
        for cohort in self._cohorts:
            self._advance(cohort, now)
        if not all(cohort.is_over for cohort in self._cohorts):
            return None
        sums: list[dict[str, Any]] = []
        silent: dict[str, str] = {}
        answer_s: dict[str, dict[str, float]] = {}
        for cohort in self._cohorts:
            if cohort.total_digest:
                devices = cohort.collector.boards
                sums.append({"total": cohort.total_digest, "narrow": cohort.session.narrow, "devices": list(devices)})
                self._acceptances |= {name: cohort.acceptances[name] for name in devices}
            self._drop_reasons |= cohort.absence_reasons()
            report = cohort.report()
            log.info("round %d: %s", self._round, cohort_sum_line(report))
            self._reports.append(report)
            silent |= cohort.silent_devices
            answer_s |= cohort.answer_s
        false_cohorts = [list(cohort.collector.boards) for cohort in self._cohorts if cohort.has_false_shares]
        dropped = dict(sorted(self._drop_reasons.items()))
        event = on.Unmasked(self._round, sums, dropped, self._reports, false_cohorts, silent, answer_s)
        self._cohorts, self._cohort_by_device, self._drop_reasons = [], {}, {}
        for device in self._acceptances:
            self._resend_step(device, self._round)
        return event

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _advance(self, cohort: Cohort, now: float) -> None:
        """End a cohort's step, if its answers are in or its time is up, and begin the next one."""
        cohort.step_began_at = cohort.step_began_at or now
        cohort.take_results()
        if cohort.is_over or cohort.pending_work:
            return
        is_reconnecting = cohort.step == "session" and now < cohort.step_began_at + _RECONNECT_S
        # A set's order is random, so the search meets a device that is waited for early, if many are.
        is_waiting = is_reconnecting or any(self._waits_for(name, cohort, now) for name in cohort.awaited)
        has_enough = cohort.step == "survivors" and cohort.collector.is_ready
        if cohort.awaited and is_waiting and not has_enough:
            return
        if cohort.answered and not has_enough:
            silent = [name for name in cohort.awaited if self._state.devices[name].online]
            cohort.silent_devices |= dict.fromkeys(silent, cohort.step_name)
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

    def _waits_for(self, device: str, cohort: Cohort, now: float) -> bool:
        """Whether a step still waits for a device's answer."""
        job_device, limit_s = self._state.devices[device], self._job.deadline_s
        # A vector that is announced waits for its turn, by no fault of the device.
        is_uploading = cohort.step == "delivery" and device in cohort.announced_digests
        if cohort.answered and not is_uploading:
            # What kept the first answer may have kept all: the others have as long again.
            first_s = min(cohort.answer_s[name][cohort.step_name] for name in cohort.answered)
            limit_s = max(2 * first_s, self._patience.limit_s(job_device, cohort.step_name))
        return job_device.online and now < cohort.step_began_at + limit_s

    def _begin_step(self, cohort: Cohort, step: str, messages: Mapping[str, bytes]) -> None:
        """Begin a step by sending its message to each device."""
        cohort.step, cohort.messages, cohort.step_began_at = step, dict(messages), 0.0
        cohort.answered, cohort.awaited = set(), messages.keys() - cohort.drop_reasons.keys()
        for device in cohort.messages:
            self._send(cohort, device)

    def _send(self, cohort: Cohort, device: str) -> None:
        task, content = self._state.tasks.get(device), cohort.messages.get(device)
        if task is None or content is None:
            return
        message = SecureStep.of(self._job.name, self._round, task.attempt, cohort.sum_id, cohort.step, content)
        self._traffic.outbox.send(device, message, self._job.name)

    def _drop_device(self, cohort: Cohort, device: str, reason: str) -> None:
        log.warning("round %d: %s drops out of the secure sum: %s", self._round, device, reason)
        cohort.drop(device, reason)

    def _is_current(self, device: str, round_: int, attempt: int) -> bool:
        task = self._state.tasks.get(device)
        return task is not None and (round_, attempt) == (self._round, task.attempt)

    def _cohort_of(self, device: str) -> Cohort | None:
        """The cohort of a device, if its sum is unfinished."""
        cohort = self._cohort_by_device.get(device)
        return None if cohort is None or cohort.is_over else cohort

    def _add_vector(self, cohort: Cohort, device: str, digest: str) -> None:
        """Add a masked vector to the sum, and delete it."""
        try:
            cohort.collector.add_masked(device, self._store.read(digest))
        finally:
            self._store.delete(digest)

    def _unmask(self, cohort: Cohort) -> str:
        return self._store.put(cohort.collector.total().to_bytes()).sha256
