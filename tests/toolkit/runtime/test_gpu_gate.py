import threading
import time

import pytest

from fedprune.runtime.gpu_gate import GpuGate

pytestmark = pytest.mark.board


def test_a_recording_gets_its_turn_beside_a_thread_that_uses_the_gpu_without_a_pause() -> None:
    gate, used, ended, recorded = GpuGate(), threading.Event(), threading.Event(), threading.Event()

    def predict() -> None:
        while not ended.is_set():
            with gate.use():
                used.set()
                time.sleep(0.004)

    def record() -> None:
        with gate.record():
            recorded.set()

    threads = [threading.Thread(target=predict, daemon=True), threading.Thread(target=record, daemon=True)]
    threads[0].start()
    try:
        assert used.wait(30)
        threads[1].start()
        assert recorded.wait(10)
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
