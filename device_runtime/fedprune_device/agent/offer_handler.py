"""A board's work for its server: download an offer's blobs, train, commit the result, announce the update.

Anything that must not be lost is on the disk before it is announced to the server, and is sent again until the server
has answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import replace

from fedprune.core.errors import FedpruneError, TrainingError
from fedprune.model.recipe import Recipe
from fedprune.planning.profile import HardwareProfile
from fedprune.wire import messages
from fedprune.wire.chunk import Chunk
from fedprune_device.hardware import allocator
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.network.downloader import Downloader
from fedprune_device.network.offer_checks import attempt_of, check_offer, fits_disk, is_same_work, job_and_round
from fedprune_device.network.secure_update import SecureUpdate
from fedprune_device.network.update_sender import UpdateSender
from fedprune_device.network.uplink import Uplink
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.evaluation import metrics_text
from fedprune_device.training.offline_training import OfflineTraining
from fedprune_device.training.round_runner import DamagedBlobError, RoundRunner, TrainedRound
from fedprune_device.training.training_task import TrainingStoppedError
from fedprune_device.training.training_thread import TrainingThread

_LOG = logging.getLogger("fedprune.device")

# Damaged blobs of one offer that are pulled again before the offer is refused: a disk that fails would never end.
_MAX_DAMAGED_BLOBS = 3
_MAX_RECENT_OFFERS = 32  # offers remembered, to recognise repetitions: of a few jobs, several attempts each


class OfferHandler:
    """Handles the accepted offer until the server has its update, and training offline.

    One thread at a time trains. Its result changes nothing until `turn` commits it. Without a hardware profile only the
    disk limits what is accepted.
    """

    def __init__(
        self,
        store: DeviceStore,
        downloader: Downloader,
        uplink: Uplink,
        sender: UpdateSender,
        runner: RoundRunner,
        offline: OfflineTraining,
        secure: SecureUpdate,
        *,
        profile: HardwareProfile | None = None,
        guard: ThermalGuard | None = None,
    ) -> None:
        self._store, self._downloader, self._uplink, self._sender = store, downloader, uplink, sender
        self._runner, self._offline, self._secure = runner, offline, secure
        self._profile, self._guard = profile, guard
        self._download_seconds: float | None = None  # the download's seconds, when an offer waits for the worker
        self._worker: TrainingThread | None = None
        self._recent_offers: list[messages.Offer] = []
        self._damaged_blobs = 0

    @property
    def is_working(self) -> bool:
        return self._worker is not None or self._downloader.offer is not None or self._sender.is_uploading

    @property
    def is_quiet(self) -> bool:
        """Whether a restart would cost nothing: no download, no training, and no update that waits."""
        task, pending = self._store.task, self._store.pending
        is_idle = self._worker is None and not self._is_busy and pending is None and not self._secure.is_waiting
        return is_idle and (task is None or task.done)

    @property
    def current_work(self) -> messages.Offer | messages.UpdateAnnouncement | None:
        task = self._store.task
        return task.offer if task is not None and not task.done else self._store.pending

    # Messages of the server

    def on_connect(self, now: float) -> None:
        """The board has connected: treat every offer as new, and request all missing blobs again."""
        self._recent_offers.clear()
        self._secure.resend_now(now)
        self._downloader.on_connect(now)

    def on_hello(self, now: float) -> None:
        """The server has (re)started, perhaps with a lost state.

        Treat every offer as new, and repeat overdue requests.
        """
        self._recent_offers.clear()
        self._secure.resend_now(now)
        self._downloader.repeat_requests(now)

    def note_contact(self, now: float) -> None:
        self._offline.note_contact(now)

    def on_offer(self, offer: messages.Offer, now: float) -> None:
        offer = self._runner.lowering.needed_graphs(offer)
        task = self._store.task
        if self._uplink.repeat_refusal(offer):
            return
        if task is not None and not task.done and task.offer == offer:
            self._sender.announce_soon(now)  # a pending update should be announced at once
            self._secure.resend_now(now)
            self._uplink.repeat_progress()
            return
        if offer in self._recent_offers:
            return  # it came late, or twice
        # Anything else is new, whatever its number: a server that lost its state begins again at its first round.
        # A masked update that a restart has left is of no use: the secrets that its sum needs are gone.
        has_update = offer.secure is None and task is not None and self._store.pending_for(task.offer) is not None
        can_continue = has_update or self._secure.is_waiting or self._is_busy
        if task is not None and is_same_work(task.offer, offer) and can_continue:
            _LOG.info(
                "round %d of job %s, attempt %d: the same work, continuing", offer.round, offer.job, offer.attempt
            )
            self._renumber(offer, now)
        else:
            self._start(offer, now)
        self._recent_offers = [*self._recent_offers, offer][-_MAX_RECENT_OFFERS:]

    def on_secure_step(self, message: messages.SecureStep, now: float) -> None:
        """Take a step of a secure sum; if the server breaks its rules, the board refuses to take part."""
        task, previous_sum = self._store.task, self._secure.sum_id
        if task is None or task.done or attempt_of(task.offer) != attempt_of(message):
            return
        try:
            if not self._secure.is_waiting and not self._is_busy:
                raise TrainingError("the update that was to be masked is gone: this board has restarted")
            masked_update = self._secure.receive(message, now)
            if self._secure.sum_id != previous_sum:
                # The stored update is masked for the sum before: in this one its masks would not cancel out.
                self._store.forget_update()
            if masked_update is not None:
                self._store.keep_update(masked_update)
                self._sender.announce_soon(now)
        except FedpruneError as error:
            self._refuse(task.offer, error)

    def on_chunk(self, chunk: Chunk, now: float) -> None:
        """Store a chunk of a requested blob."""
        self._step_download(lambda: self._downloader.on_chunk(chunk, now))

    def on_blob_not_found(self, sha256: str, now: float) -> None:
        self._step_download(lambda: self._downloader.on_blob_not_found(sha256, now))

    def on_accepted(self, message: messages.Accepted) -> None:
        task, pending = self._store.task, self._store.pending
        accepted_round = job_and_round(message)
        if pending is None or job_and_round(pending) != accepted_round or pending.weights.sha256 != message.weights:
            return
        _LOG.info("round %d of job %s: the server has the update", message.round, message.job)
        if task is not None and job_and_round(task.offer) == accepted_round:
            self._store.finish_offer()
            self._secure.drop()
        self._store.forget_update()
        self._delete_unused_blobs()

    def on_cancelled(self, message: messages.Cancelled) -> None:
        task, pending = self._store.task, self._store.pending
        cancelled_attempt = attempt_of(message)
        # A cancelled offer may come again under the same number: a server that waits for devices does that.
        self._recent_offers = [o for o in self._recent_offers if attempt_of(o) != cancelled_attempt]
        if pending is not None and attempt_of(pending) == cancelled_attempt:
            self._store.forget_update()
        if task is not None and not task.done and attempt_of(task.offer) == cancelled_attempt:
            _LOG.info("round %d of job %s is cancelled: %s", message.round, message.job, message.reason)
            self._stop_work()
            self._store.finish_offer()
        self._delete_unused_blobs()

    def on_finished(self, message: messages.Finished) -> None:
        task, pending = self._store.task, self._store.pending
        _LOG.info("job %s is finished", message.job)
        self._recent_offers.clear()
        self._uplink.forget_refusal()
        if pending is not None and pending.job == message.job:
            self._store.forget_update()
        if task is not None and task.offer.job == message.job:
            self._stop_work()
            self._store.drop_offer()
            self._delete_unused_blobs()
        else:
            self._store.local_states.delete_job(message.job)

    # What is to be done

    def resume(self, now: float) -> None:
        """Go on where the last process stopped."""
        self._delete_unused_blobs()
        task = self._store.task
        if task is None or task.done:
            return
        if self._store.pending_for(task.offer) is None:
            _LOG.info("continuing with round %d of job %s", task.offer.round, task.offer.job)
            offer = task.offer
            try:
                self._store.privacy.check(Recipe.from_dict(offer.recipe))  # the owner's policy may be stricter by now
                self._downloader.begin(offer, now, is_connected=False)
            except FedpruneError as error:
                self._refuse(task.offer, error)

    def turn(self, now: float, *, connected: bool) -> None:
        download_seconds = self._step_download(lambda: self._downloader.turn(now))
        if download_seconds is not None:
            self._download_seconds = download_seconds
            self._delete_unused_blobs()
        if self._worker is not None and not self._worker.is_alive:
            worker, self._worker = self._worker, None
            self._handle_result(worker, now)
            del worker  # frees the round's arrays before the heap is trimmed
            allocator.trim_heap()
            self._delete_unused_blobs()
        if self._worker is None:
            self._train(now, connected=connected)
        self._secure.turn(now)
        self._sender.continue_upload(self._store.pending, now)
        if self._store.pending is not None:
            self._sender.announce(self._store.pending, now)

    def report_progress(self, now: float) -> bool:
        if self._downloader.offer is not None:
            self._uplink.report_progress(self._downloader.offer, ("download", *self._downloader.progress), now)
        elif self._worker is not None and self._worker.offline:
            self._uplink.status.set_working(self._worker.offer, self._worker.status, alone=True)
        elif self._worker is not None and not self._worker.is_stopped:
            self._uplink.report_progress(self._worker.offer, self._worker.status, now)
        elif self._store.pending is None:
            self._uplink.status.set_idle()
            return True
        return False

    def end(self, timeout: float) -> None:
        """Stop everything, and wait for the end of each thread, but no longer than `timeout` seconds."""
        self._stop_work()
        if self._worker is not None:
            self._worker.join(timeout)
        self._downloader.join(timeout)
        self._sender.stop_upload(timeout)

    @property
    def _is_busy(self) -> bool:
        training = self._worker is not None and not self._worker.is_stopped and not self._worker.offline
        return training or self._downloader.offer is not None or self._download_seconds is not None

    def _renumber(self, offer: messages.Offer, now: float) -> None:
        """Continue the current work, or the waiting update, for another attempt at the same offer."""
        pending = self._store.pending_for(offer)
        if self._secure.is_waiting:
            self._store.forget_update()  # it is masked for another sum
            self._secure.renumber(offer.attempt, now)
        elif pending is not None:
            self._store.keep_update(replace(pending, attempt=offer.attempt))
        self._store.accept(offer)
        self._downloader.renumber(offer)
        if self._worker is not None and not self._worker.offline:
            self._worker.offer = offer
        self._sender.announce_soon(now)

    def _start(self, offer: messages.Offer, now: float) -> None:
        try:
            self._secure.check(offer)
            check_offer(offer, self._store, self._profile)
            pending = self._store.pending
            if pending is not None and pending.job == offer.job and pending.round >= offer.round:
                self._store.forget_update()  # it answers an offer that the server no longer knows of
            self._store.accept(offer)
            self._stop_work()
            self._damaged_blobs = 0
            self._delete_unused_blobs()
            if self._store.pending is not None or not fits_disk(offer, self._store):
                self._store.drop_donor()  # a pending update takes as much disk space as a weights file
                self._delete_unused_blobs()
            _LOG.info("round %d of job %s, attempt %d: accepted", offer.round, offer.job, offer.attempt)
            self._download(offer, now)
        except FedpruneError as error:
            self._refuse(offer, error)

    def _download(self, offer: messages.Offer, now: float) -> None:
        # After a damaged blob, plain weights are fetched instead of encoded ones.
        self._downloader.begin(offer, now, without_codec=self._damaged_blobs > 0)

    def _step_download(self, step: Callable[[], float | None]) -> float | None:
        """Take a step of the download; an offer whose blobs can't be had is refused."""
        offer = self._downloader.offer
        try:
            return step()
        except FedpruneError as error:
            if offer is None:
                raise
            self._refuse(offer, error)
        return None

    def _train(self, now: float, *, connected: bool) -> None:
        task = self._store.task
        if self._download_seconds is not None and task is not None:
            seconds, self._download_seconds = self._download_seconds, None
            _LOG.info("round %d of job %s: training", task.offer.round, task.offer.job)
            self._worker = TrainingThread(self._runner, task.offer, seconds, self._guard)
        elif self._downloader.is_fetching_from_web:
            return
        elif (offer := self._offline.due_offer(now, connected=connected)) is not None:
            self._worker = TrainingThread(self._offline.runner, offer, guard=self._guard, offline=True)

    def _handle_result(self, worker: TrainingThread, now: float) -> None:
        """Commit a worker's result, or handle its error. A stopped worker's result is dropped: its job may be over."""
        task = self._store.task
        is_current = worker.offline or (task is not None and not task.done and task.offer == worker.offer)
        if worker.is_stopped or not is_current:
            return
        error = worker.error
        if worker.result is not None:
            try:
                self._commit(worker, worker.result, now)
            except Exception as commit_error:  # noqa: BLE001 - reported below; the old model serves on
                error = commit_error
        if error is None or isinstance(error, TrainingStoppedError):
            return
        if worker.offline:
            self._offline_failed(error)
        else:
            self._round_failed(worker.offer, error, now)

    def _commit(self, worker: TrainingThread, result: TrainedRound, now: float) -> None:
        """Commit a worker's result: the one place where it changes the board's state."""
        offer = worker.offer
        if worker.offline:
            is_better = self._offline.may_serve(result)
            if is_better:
                worker.runner.commit(result)
            self._offline.record_training(result, serves=is_better)
            return
        update = replace(worker.runner.commit(result), attempt=offer.attempt)
        if offer.secure is None:
            self._store.keep_update(update)
            self._sender.announce_soon(now)
        else:
            self._secure.keep(offer, update, now)
        _LOG.info("round %d of job %s: trained %s", offer.round, offer.job, metrics_text(update.metrics))

    def _round_failed(self, offer: messages.Offer, error: BaseException, now: float) -> None:
        if isinstance(error, DamagedBlobError) and self._damaged_blobs < _MAX_DAMAGED_BLOBS:
            self._damaged_blobs += 1
            _LOG.warning("%s: pulling it again", error)
            try:
                self._store.blobs.delete(error.sha256)
                self._download(offer, now)
            except FedpruneError as failed:
                self._refuse(offer, failed)
            return
        self._refuse(offer, error)

    def _offline_failed(self, error: BaseException) -> None:
        if isinstance(error, FedpruneError):
            _LOG.warning("offline training failed: %s", error)
        else:
            _LOG.error("offline training failed: unexpected error", exc_info=error)
        if isinstance(error, DamagedBlobError):
            self._store.blobs.delete(error.sha256)

    def _stop_work(self) -> None:
        """Stop all work for the current offer."""
        self._downloader.stop()
        self._secure.drop()
        self._download_seconds = None
        if self._worker is not None:
            self._worker.stop()

    def _delete_unused_blobs(self) -> None:
        # Nothing refers yet to the blobs that a running worker has just written; those of a stopped one are dropped.
        if self._worker is None or self._worker.is_stopped:
            self._store.delete_unneeded_blobs()

    def _refuse(self, offer: messages.Offer, error: BaseException) -> None:
        self._uplink.refuse(offer, error)
        task = self._store.task
        if task is not None and task.offer == offer:
            self._stop_work()
            self._store.finish_offer()
            self._delete_unused_blobs()
