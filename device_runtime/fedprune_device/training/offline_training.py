"""Training without the server: on a schedule, the active model is trained further on the board's own samples.

No result is sent: the fleet learns from the same samples in its next round. An update that was finished before the
server went away waits as usual.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from fedprune.core import atomic_file
from fedprune.core.errors import StorageError
from fedprune.wire.messages import Offer
from fedprune_device.serving.predictor import GRAPH
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.evaluation import metrics_text
from fedprune_device.training.round_runner import RoundRunner, TrainedRound

_LOG = logging.getLogger("fedprune.device")

AWAY_S = 600.0  # seconds without a connection after which the server counts as away

_RECORD_FILE = "alone.json"


class OfflineTraining:
    """Decides when the board trains without its server, from which model, and whether the result may serve.

    `interval_s` is the number of seconds between one training of the active model and the next, 0 for never. What the
    board keeps between rounds belongs to rounds, so `runner` has a store of its own.
    """

    def __init__(
        self, store: DeviceStore, runner: RoundRunner, interval_s: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.runner = runner
        self._store, self._clock, self._interval_s = store, clock, interval_s
        self._last_contact: float | None = None
        self._last_try: float | None = None

    def note_contact(self, now: float) -> None:
        """Note that the server, or at least the broker, is there."""
        self._last_contact = now

    def due_offer(self, now: float, *, connected: bool) -> Offer | None:
        """The training that is due now, if any; called while nothing else is trained."""
        self._last_contact = now if self._last_contact is None else self._last_contact
        if not self._interval_s or not self._is_due(now, connected):
            return None
        self._last_try = now
        offer = self._offer()
        if offer is not None:
            _LOG.info("the server is away: training on, from round %d of job %s", offer.round, offer.job)
        return offer

    def may_serve(self, result: TrainedRound) -> bool:
        """Whether a result may serve: validation samples, if the board has some, don't show that it is worse."""
        before, after = (result.metrics.get(n) for n in ("loss_validation_before", "loss_validation"))
        return before is None or after is None or after < before

    def record_training(self, result: TrainedRound, *, serves: bool) -> None:
        """Note that a training is done, so that the next one waits for its time."""
        times = int(self._recorded_number("times")) + 1
        atomic_file.write_document(self._store.root / _RECORD_FILE, {"at": self._clock(), "times": times})
        served = "the new model" if serves else "the old model"
        _LOG.info("%s serves; trained offline %s", served, metrics_text(result.metrics))

    def _offer(self) -> Offer | None:
        """The last offer, from what serves instead of what was received; None where it can't be trained on."""
        task, record = self._store.task, self._store.slots.current()
        if task is None or record is None or task.offer.mask is not None:
            return None  # the mask says which weights are left out, and its blob is deleted once the offer is done
        offer = task.offer
        if (record.job, record.round, record.files[GRAPH]) != (offer.job, offer.round, offer.inference.sha256):
            return None  # the offer is newer than what serves: its blobs may still be arriving
        if not all(self._store.blobs.has(graph.sha256) for graph in offer.graphs):
            return None  # only the server can send the graphs
        weights = self._store.blobs.put(self._store.slots.weights(record))
        recipe = {**offer.recipe, "evaluate_every": 1}
        return replace(
            offer,
            weights=weights,
            recipe=recipe,
            codec=None,
            coded=None,
            drift=None,  # it is of the round that is over
            seed=offer.seed + 1 + int(self._recorded_number("times")),
        )

    def _is_due(self, now: float, connected: bool) -> bool:
        silent = 0.0 if self._last_contact is None else now - self._last_contact
        has_just_tried = self._last_try is not None and now - self._last_try < self._interval_s
        if silent < (self._interval_s if connected else AWAY_S) or has_just_tried:
            return False
        last_trained_at = max(self._store.slots.installed_at(), self._recorded_number("at"))
        # If the clock was set back, the seconds without the server, by a monotonic clock, are used instead.
        return (self._clock() - last_trained_at if last_trained_at <= self._clock() else silent) >= self._interval_s

    def _recorded_number(self, name: str) -> float:
        try:
            value = (atomic_file.read_document(self._store.root / _RECORD_FILE) or {}).get(name)
        except StorageError as error:
            _LOG.warning("%s: going on without it", error)
            return 0
        return value if isinstance(value, (int, float)) and 0 <= value < 2**53 else 0
