"""The thread in which a device trains, so that its loop can go on listening (onnxruntime releases the interpreter)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from fedprune.wire.offer import Offer
from fedprune_device.hardware.process_memory import restart_peak
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.training.round_runner import Report, RoundResult

NICENESS = 19
"""Whatever else the board does, predictions first of all, comes before training."""


class Bench(Protocol):
    """Trains what an offer asks for."""

    def make(self, offer: Offer, *, download_seconds: float, report: Report, stop: Callable[[], bool]) -> RoundResult:
        """See `fedprune_device.training.round_runner.RoundRunner.make`."""


class TrainingThread:
    """Carries out one offer, beginning at once. What it returns is committed by the loop, or dropped.

    Args:
        bench: What carries it out.
        offer: The offer; its blobs are in the store.
        download_seconds: How long they took to arrive.
        care: Lets it wait between steps while the board needs that.

    Attributes:
        offer: The offer.
        status: Phase, units done and units in all.
        made: The result, if training succeeded.
        error: What went wrong, if something did.
    """

    def __init__(self, bench: Bench, offer: Offer, download_seconds: float, care: ThermalGuard | None = None) -> None:
        self.offer = offer
        self.status: tuple[str, int, int] = ("train", 0, 0)
        self.made: RoundResult | None = None
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._bench = bench
        self._care = care
        self._download_seconds = download_seconds
        self._thread = threading.Thread(target=self._run, name="fedprune-training", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it is still at it."""
        return self._thread.is_alive()

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop, so that nobody waits for what it makes."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Let it end before its next training step."""
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
            self.made = self._bench.make(
                self.offer, download_seconds=self._download_seconds, report=self._report, stop=self._ended
            )
        except Exception as error:  # noqa: BLE001 - it is handed to the loop, which reports it
            self.error = error

    def _ended(self) -> bool:
        """Asked between two steps, which is where training may wait."""
        return self._stop.is_set() if self._care is None else self._care.pause(self._stop.is_set)

    def _report(self, phase: str, done: int, total: int) -> None:
        self.status = (phase, done, total)
