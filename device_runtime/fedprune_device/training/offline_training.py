"""Training while the server is away: what serves is trained on, on the board's own samples, on a schedule.

Nothing of it is sent. The server knows nothing of such training and asked for nothing: what a fleet learns from are the
samples, which stay, and which the first round after it takes. An update that was finished before waits as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from fedprune.core import durable
from fedprune.core.errors import FedpruneError, StorageError
from fedprune.wire.offer import Offer
from fedprune_device.data.sample_source import SampleSource
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.serving.reduced_precision import ReducedPrecision
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.graph_choice import GraphChoice
from fedprune_device.training.round_runner import DamagedBlobError, RoundResult, RoundRunner, TrainerCache
from fedprune_device.training.trainer import TrainingStoppedError
from fedprune_device.training.training_thread import TrainingThread

_LOG = logging.getLogger("fedprune.device")

AWAY_S = 600.0
"""A server that the board has no connection to for so long is away."""

_RECORD = "alone.json"


class OfflineTraining:
    """Trains alone when it is time to.

    Args:
        device: The device's name.
        store: Its state directory.
        data: Its samples.
        threads: Threads for training.
        every: Seconds between one training of what serves, in a round or alone, and the next; 0 for never.
        care: Lets training wait while the board is too hot.
        clock: Seconds since 1970.
        cuda: Whether it trains on an NVIDIA GPU, if that works.
        lowering: Lowers what serves.
    """

    def __init__(
        self,
        device: str,
        store: DeviceStore,
        data: SampleSource,
        threads: int = 1,
        every: float = 0.0,
        care: ThermalGuard | None = None,
        clock: Callable[[], float] = time.time,
        *,
        cuda: bool = False,
        lowering: ReducedPrecision | None = None,
    ) -> None:
        self._store, self._care, self._clock, self._every = store, care, clock, every
        # What the board keeps of its own is of rounds: here it begins with what serves, and leaves nothing.
        trainer = TrainerCache(threads, cuda=cuda)
        self._bench = RoundRunner(device, store.blobs, store.slots, data, trainer, lowering=lowering)
        self._thread: TrainingThread | None = None
        self._heard: float | None = None
        self._tried: float | None = None

    @property
    def running(self) -> bool:
        """Whether it is training."""
        return self._thread is not None and self._thread.alive

    @property
    def status(self) -> tuple[Offer, tuple[str, int, int]] | None:
        """What it is at, if it is: the offer that it goes on from, and phase, units done and units in all."""
        return None if self._thread is None else (self._thread.offer, self._thread.status)

    def heard(self, now: float) -> None:
        """The server, or at least the broker, is there."""
        self._heard = now

    def stop(self) -> None:
        """End before the next training step."""
        if self._thread is not None:
            self._thread.stop()

    def join(self, timeout: float) -> None:
        """Wait for its end, but no longer than `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)

    def turn(self, now: float, *, connected: bool, idle: bool) -> bool:
        """Begin to train, if it is time to.

        Args:
            now: Seconds that only grow.
            connected: Whether there is a connection to the broker.
            idle: Whether nothing else is to be trained.

        Returns:
            Whether a training has just ended.

        Raises:
            StorageError: The disk fails or is full.
        """
        self._heard = now if self._heard is None else self._heard
        if self._thread is not None and not self._thread.alive:
            thread, self._thread = self._thread, None
            error = thread.error
            if thread.made is not None and not thread.stopped:
                try:
                    self._commit(thread.made)
                except Exception as failed:  # noqa: BLE001 - logged below; the old model serves on
                    error = failed
            if isinstance(error, FedpruneError) and not isinstance(error, TrainingStoppedError):
                _LOG.warning("training alone failed: %s", error)
            elif error is not None and not isinstance(error, TrainingStoppedError):
                _LOG.error("training alone failed: unexpected error", exc_info=error)
            if isinstance(error, DamagedBlobError) and not thread.stopped:
                self._store.blobs.delete(error.sha256)  # a stopped thread's blob may be downloaded again for an offer
            return True
        if self._every and idle and self._thread is None and self._due(now, connected):
            self._tried = now
            offer = self._offer()
            if offer is not None:
                _LOG.info("the server is away: training on, from round %d of job %s", offer.round, offer.job)
                self._thread = TrainingThread(self._bench, offer, 0.0, self._care)
        return False

    def _commit(self, made: RoundResult) -> None:
        """Let the result serve unless validation samples say that it is worse."""
        before, after = (made.metrics.get(n) for n in ("loss_validation_before", "loss_validation"))
        better = before is None or after is None or after < before
        if better:
            self._bench.commit(made)
        times = int(self._number("times")) + 1
        durable.write_document(self._store.root / _RECORD, {"at": self._clock(), "times": times})
        shown = ", ".join(f"{k} {v:.4g}" for k, v in sorted(made.metrics.items()))
        _LOG.info("trained alone; %s serves (%s)", "the new model" if better else "the old model", shown)

    def _offer(self) -> Offer | None:
        """The last offer, from what serves instead of what was received; None where it can't be trained on."""
        task, record = self._store.task, self._store.slots.current()
        if task is None or record is None or task.offer.mask is not None:
            return None  # where single weights are left out, only the offer that is gone says which
        offer = task.offer
        if (record.job, record.round, record.inference) != (offer.job, offer.round, offer.inference.sha256):
            return None  # it is another one's, which is still being pulled
        if not all(self._store.blobs.has(graph.sha256) for graph in offer.graphs):
            return None  # graphs come from the server
        offer = GraphChoice().suited(offer)
        weights = self._store.blobs.put(self._store.slots.weights(record))
        recipe = {**offer.recipe, "evaluate_every": 1}
        return replace(
            offer,
            weights=weights,
            recipe=recipe,
            codec=None,
            coded=None,
            seed=offer.seed + 1 + int(self._number("times")),
        )

    def _due(self, now: float, connected: bool) -> bool:
        silent = 0.0 if self._heard is None else now - self._heard
        if silent < (self._every if connected else AWAY_S) or (
            self._tried is not None and now - self._tried < self._every
        ):
            return False
        at = max(self._store.slots.installed_at(), self._number("at"))
        # Where the clock has been set back, the time without the server has to do.
        return (self._clock() - at if at <= self._clock() else silent) >= self._every

    def _number(self, name: str) -> float:
        try:
            found = (durable.read_document(self._store.root / _RECORD) or {}).get(name)
        except StorageError as error:
            _LOG.warning("%s: going on without it", error)
            return 0
        return found if isinstance(found, (int, float)) and 0 <= found < 2**53 else 0
