"""A device's state directory, whose files survive a power cut.

lock            one process at a time
identity/       keys and certificate (`network.membership`)
claim           a claim that is not used yet (`network.membership`)
device.json     whose directory it is (`storage.directory_owner`)
session.json    number of the last connection
offer.json      the last offer that was accepted, and whether it is done
pending.json    an update that the server has not acknowledged
blobs/          weights and graphs by digest, finished or partly pulled
serving/        the model that serves predictions (`serving.model_slots`)
engines/        TensorRT engines (`engines.engine_cache`)
samples/        samples from applications (`data.sample_store`)
images.index    digests of the files of a folder of samples (`data.sample_folder`)
layer_times.json  the probe's measurements of layers
privacy.json    how much noise was drawn for private updates (`privacy.budget`)
own/            what the board keeps of its own from round to round (`storage.local_state`)
crash.json      how the last run ended, if the server hasn't heard of it (`telemetry.crash_reports`); with it
                running.json and fault.txt
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import atomic_file
from fedprune.core.closeable import Closeable
from fedprune.core.disk import file_lock, storage_errors
from fedprune.core.errors import FedpruneError, PrivacyError, ProtocolError, StorageError
from fedprune.core.validation import is_whole
from fedprune.model.recipe import Recipe
from fedprune.wire import messages
from fedprune.wire.messages import Offer
from fedprune_device.privacy.budget import BoardPrivacyBudget
from fedprune_device.privacy.policy import PrivacyPolicy
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_store import FolderStateStore

_LOG = logging.getLogger("fedprune.device")

_MAX_TIME_MS = 2**53  # later than any correct clock, in ms: a wrong clock must not use up the session numbers


@dataclass(frozen=True)
class AcceptedOffer:
    """The last offer. `donor` is the digest of earlier weights of which leaves may be reused."""

    offer: Offer
    done: bool = False
    donor: str = ""


class DeviceStore(Closeable):
    """The state directory of one device; raises `StorageError` if another process or device has it."""

    def __init__(
        self, root: Path, clock: Callable[[], float] = time.time, *, owner: DirectoryOwner | None = None
    ) -> None:
        if owner is not None:
            owner.check(root)  # before anything is written into another device's
        with storage_errors(f"can't write {root}"):
            root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self._clock = clock
        with ExitStack() as stack:
            hint = "Stop it, or give this one a --state of its own."
            stack.enter_context(file_lock(root / "lock", f"another fedprune-device uses {root}", hint))
            atomic_file.remove_partial_files(root)
            self.blobs = BlobStore(root / "blobs")
            self.slots = ModelSlots(root / "serving")
            self.slots.prepare()
            self.local_states = FolderStateStore(root / "own")
            self.local_states.prepare()
            self.privacy = BoardPrivacyBudget(root)
            number = (self._read("session.json") or {}).get("number", 0)
            self.session = number if is_whole(number) else 0
            self.task = self._load_task()
            # Load the board's local state of the current job, even if a crash interrupted a change of jobs.
            try:
                if self.task is not None:
                    self.local_states.switch_to_job(self.task.offer.job)
            except StorageError as error:  # a full disk must not keep a board from starting; the next offer reports it
                _LOG.warning("%s", error)
            self.pending = self._load_pending()
            self._lock_stack = stack.pop_all()

    def close(self) -> None:
        self._lock_stack.close()

    def apply_policy(self, policy: PrivacyPolicy | None) -> None:
        """Apply the owner's privacy policy to every job, and drop a pending update that doesn't meet it."""
        self.privacy.policy = policy
        if policy is None or self.pending is None:
            return
        task = self.task
        try:
            if task is None or self.pending_for(task.offer) is None:
                raise PrivacyError("it may be without noise")
            # Its privacy cost has been counted already, whether it is sent or not.
            replace(policy, most_epsilon=0.0).check(Recipe.from_dict(task.offer.recipe), 0.0)
        except FedpruneError as error:
            _LOG.warning("the pending update is dropped, because the board's owner requires more privacy: %s", error)
            self.forget_update()

    def next_session(self) -> int:
        """A number for a new connection, larger than every earlier one, on disk before it is used.

        It is the time in milliseconds if that is larger, so that a board whose directory was deleted is accepted again.
        If it can't be written, only this process has it.
        """
        number = max(self.session + 1, int(min(1000 * self._clock(), _MAX_TIME_MS)))
        try:
            atomic_file.write_document(self.root / "session.json", {"number": number})
        except StorageError as error:
            _LOG.warning("can't keep the session number: %s", error)
            number = self.session + 1
        self.session = number
        return number

    def accept(self, offer: Offer) -> None:
        """Make an offer current, and set the local state of other jobs aside. On errors the old offer stays."""
        if self._is_of_another_run(offer):
            self.local_states.clear()
        self.local_states.switch_to_job(offer.job, "" if self.task is None else self.task.offer.job)
        previous_task = self.task
        donor = ""
        if previous_task is not None and offer.coded is None:
            last_weights = previous_task.offer.weights.sha256
            is_donor = last_weights != offer.weights.sha256 and self.blobs.has(last_weights)
            donor = last_weights if is_donor else previous_task.donor
        self._write_task(AcceptedOffer(offer, donor=donor))

    def drop_donor(self) -> None:
        """Give up the earlier weights, because there is no room for both them and the offer's."""
        if self.task is not None and self.task.donor:
            self._write_task(replace(self.task, donor=""))

    def finish_offer(self) -> None:
        if self.task is not None and not self.task.done:
            self._write_task(replace(self.task, done=True))

    def drop_offer(self) -> None:
        """Forget the current offer and the local state of its job, which has ended. The job's last model still
        serves."""
        atomic_file.remove_durably(self.root / "offer.json")
        self.local_states.clear()
        self.task = None

    def keep_update(self, update: messages.UpdateAnnouncement) -> None:
        if not self.blobs.has(update.weights.sha256):
            raise StorageError("an update's weights are missing from the store")
        atomic_file.write_document(self.root / "pending.json", {"message": _message_body(update)})
        self.pending = update

    def forget_update(self) -> None:
        atomic_file.remove_durably(self.root / "pending.json")
        self.pending = None

    def pending_for(self, offer: Offer) -> messages.UpdateAnnouncement | None:
        pending = self.pending
        return pending if pending is not None and (pending.job, pending.round) == (offer.job, offer.round) else None

    def delete_unneeded_blobs(self) -> int:
        """Delete blobs that neither offer nor pending update needs; returns how many. Failures are retried later."""
        count = 0
        try:
            for name in self._unneeded_blobs(self.task):
                self.blobs.delete(name)
                count += 1
        except StorageError as error:
            _LOG.warning("can't delete old files: %s", error)
        return count

    def reclaimable_bytes(self, offer: Offer) -> int:
        """Room that `delete_unneeded_blobs` would make if this offer were the current one."""
        partial = self.blobs.root / "partial"
        names = self._unneeded_blobs(AcceptedOffer(offer))
        paths = [path for name in names for path in (self.blobs.path(name), partial / name)]
        if self._is_of_another_run(offer):
            paths += self.local_states.paths()
        total = 0
        with storage_errors(f"can't read {self.blobs.root}"):
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    # A file that a model slot holds, too, stays on the disk.
                    total += 512 * status.st_blocks if status.st_nlink == 1 else 0
        return total

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def _is_of_another_run(self, offer: Offer) -> bool:
        current_offer = None if self.task is None else self.task.offer
        return current_offer is not None and current_offer.job == offer.job and current_offer.seed != offer.seed

    def _unneeded_blobs(self, task: AcceptedOffer | None) -> list[str]:
        needed = set()
        if task is not None:
            offer = task.offer
            needed = {graph.sha256 for graph in offer.graphs}
            if offer.weights_codec is not None or offer.weights.leaf_count > 1:
                needed.add(offer.weights.sha256)  # the next ones may come as the difference to these, or share leaves
            if not self.blobs.has(offer.weights.sha256):
                needed.add(task.donor)
            if not task.done:
                needed.update(r.sha256 for r in offer.blobs())
                needed.update({offer.held} if offer.held else ())
                needed.update(r.sha256 for r in offer.encoded)
        if self.pending is not None:
            needed.add(self.pending.weights.sha256)
        with storage_errors(f"can't read {self.blobs.root}"):
            unfinished = {p.name.split(".")[0] for p in (self.blobs.root / "partial").iterdir()}
        return sorted((unfinished | set(self.blobs.names())) - needed)

    def _write_task(self, task: AcceptedOffer) -> None:
        body = {"message": _message_body(task.offer), "done": task.done, "donor": task.donor}
        atomic_file.write_document(self.root / "offer.json", body)
        self.task = task

    def _load_task(self) -> AcceptedOffer | None:
        body = self._read("offer.json")
        offer = self._parse_message(body, Offer, "offer.json")
        if offer is None or body is None:
            return None
        donor = body.get("donor")
        return AcceptedOffer(offer, bool(body.get("done")), donor if isinstance(donor, str) else "")

    def _load_pending(self) -> messages.UpdateAnnouncement | None:
        body, kind = self._read("pending.json"), messages.UpdateAnnouncement
        update: messages.UpdateAnnouncement | None = self._parse_message(body, kind, "pending.json")
        if update is None:
            return None
        try:
            self.blobs.read(update.weights.sha256)
        except StorageError as error:
            # An update is useless without its weights. Training the stored offer again gives the same bits.
            _LOG.warning("the pending update is lost, its offer is trained again: %s", error)
            self.blobs.delete(update.weights.sha256)
            atomic_file.remove_durably(self.root / "pending.json")
            return None
        return update

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return atomic_file.read_document(self.root / name)
        except StorageError as error:
            _LOG.warning("%s: continuing without it", error)
            return None

    def _parse_message(self, body: dict[str, Any] | None, kind: type[Any], name: str) -> Any:
        if body is None:
            return None
        try:
            message = messages.parse_message(json.dumps(body.get("message")).encode())
        except ProtocolError as error:
            _LOG.warning("%s is damaged, continuing without it: %s", name, error)
            return None
        return message if isinstance(message, kind) else None


def _message_body(message: Offer | messages.UpdateAnnouncement) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(message.to_bytes())
    return body
