"""Carries out an offer in a thread of low priority, so that the board's loop goes on and predictions come first."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import partial

from fedprune.wire.messages import Offer
from fedprune_device.hardware.readings import reset_peak_memory
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.training.round_runner import RoundRunner, TrainedRound

NICENESS = 19  # everything else on the board, predictions above all, has priority over training


class TrainingThread:
    """Carries out one offer in a thread, whose result the loop commits or drops. `status`: phase, units done, units in
    all."""

    def __init__(
        self,
        runner: RoundRunner,
        offer: Offer,
        download_seconds: float = 0.0,
        guard: ThermalGuard | None = None,
        *,
        offline: bool = False,
    ) -> None:
        self.runner, self.offer, self.offline = runner, offer, offline
        self.status: tuple[str, int, int] = ("train", 0, 0)
        self.result: TrainedRound | None = None
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._guard = guard
        self._download_seconds = download_seconds
        self._thread = threading.Thread(target=self._run, name="fedprune-training", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called, so that its result is dropped."""
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait for its end, for at most `timeout` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        # Linux counts niceness by thread; those that onnxruntime starts for this one inherit it.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        reset_peak_memory()
        # Called between two steps, where a hot board pauses until it has cooled down.
        should_stop = self._stop.is_set if self._guard is None else partial(self._guard.pause, self._stop.is_set)
        try:
            self.result = self.runner.carry_out(
                self.offer, download_seconds=self._download_seconds, report=self._report, stop=should_stop
            )
        except Exception as error:  # noqa: BLE001 - it is handed to the loop, which reports it
            self.error = error

    def _report(self, phase: str, done: int, total: int) -> None:
        self.status = (phase, done, total)
