"""The thread that trains, while the loop goes on receiving messages (onnxruntime releases the interpreter lock)."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from fedprune.wire.messages import Offer
from fedprune_device.hardware.readings import restart_peak
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.training.round_runner import RoundResult, RoundRunner

NICENESS = 19
"""Everything else on the board, predictions above all, has priority over training."""


class TrainingThread:
    """Carries out one offer, beginning at once. The loop commits or drops the result.

    `status` is phase, units done and units in all. `offline`: no server has requested it.
    """

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
        self.result: RoundResult | None = None
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._guard = guard
        self._download_seconds = download_seconds
        self._thread = threading.Thread(target=self._run, name="fedprune-training", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop, so that its result is dropped."""
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait for its end, but no longer than `timeout` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        # Linux counts niceness by thread; those that onnxruntime starts for this one inherit it.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        restart_peak()
        try:
            self.result = self.runner.make(
                self.offer, download_seconds=self._download_seconds, report=self._report, stop=self._ended
            )
        except Exception as error:  # noqa: BLE001 - it is handed to the loop, which reports it
            self.error = error

    def _ended(self) -> bool:
        """Asked between two steps, which is where training may wait."""
        return self._stop.is_set() if self._guard is None else self._guard.pause(self._stop.is_set)

    def _report(self, phase: str, done: int, total: int) -> None:
        self.status = (phase, done, total)
