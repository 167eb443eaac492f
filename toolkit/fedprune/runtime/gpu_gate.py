"""Keeps all threads of this process from the GPU while one of them records a run.

While onnxruntime records a run as a CUDA graph, CUDA refuses other threads' calls that might wait for the GPU, such as
an allocation, and the recording breaks, too (`cudaStreamCaptureModeGlobal`,
https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__STREAM.html). A board predicts while it trains: without
this its predictions or its training would leave the GPU.

The end of a session of onnxruntime, which frees its memory, passes the gate by: it happens wherever the last reference
goes, where nothing may wait. It can break a recording; training then goes on unrecorded, or on the processor.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class GpuGate:
    """Lets threads use a GPU at once, but for one that records."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self._waiting_recorders = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Wait for a recording to end, and for those that wait for a turn; none begins before this ends.

        Never within another `use` or a recording of the same thread, which would wait for itself.
        """
        with self._condition:
            # Otherwise a thread that predicts batch after batch would be back before the recording wakes up.
            self._condition.wait_for(lambda: not self._waiting_recorders)
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                self._condition.notify_all()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Wait until nobody uses the GPU, and keep others out."""
        with self._condition:  # `use` waits for this lock
            self._waiting_recorders += 1
            try:
                self._condition.wait_for(lambda: not self._users)
            finally:
                self._waiting_recorders -= 1
                self._condition.notify_all()  # they wait for this lock, too, hence for the recording's end
            yield


GPU_GATE = GpuGate()
