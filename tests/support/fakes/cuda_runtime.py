"""An onnxruntime with a GPU that can fail, on a machine without one."""

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime


class Options:
    """Options of a run."""

    graph = ""

    def add_run_config_entry(self, key: str, value: str) -> None:
        assert key == "gpu_graph_id"
        self.graph = value


class CudaRuntime:
    """An onnxruntime that says it computes with CUDA, where it computes on the CPU."""

    def __init__(self, *, offers: bool = True, accepts: bool = True, loads: bool = True) -> None:
        self._offers, self._accepts, self._loads = offers, accepts, loads
        self.refusal, self.failure = "CUDA failure 35: driver too old", "CUDA failure 2: out of memory"
        self.fails = self.loses = self.unpartitioned = self.unrecordable = False
        self.recordings: dict[tuple[Any, str], Any] = {}
        self.replays = 0
        self.records = threading.Event()
        """While a run is recorded, the GPU refuses all others."""
        self.places = 10_000
        """How many more arrays have room in the GPU's memory."""
        self.values = weakref.WeakSet[Any]()
        """The arrays in it."""
        self.before_failing: Callable[[], object] = lambda: None
        self.opened: list[str] = []
        self.runs: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    RunOptions = Options

    @property
    def OrtValue(self) -> Any:  # noqa: N802
        return self

    def ortvalue_from_numpy(self, array: Any, device: str, number: int) -> Any:
        assert (device, number) == ("cuda", 0)
        self.places -= 1
        if self.places < 0:
            raise RuntimeError("CUDA failure 2: out of memory")
        array = array.copy()  # as into a GPU's memory
        real = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        double = self

        class Value(onnxruntime.OrtValue):
            def numpy(self) -> Any:
                if double.loses:
                    raise RuntimeError("CUDA failure 700: illegal address")
                return np.array(super().numpy())

        value = Value(real._ortvalue, array)
        self.values.add(value)
        return value

    def get_available_providers(self) -> list[str]:
        return [*(["CUDAExecutionProvider"] if self._offers else []), "CPUExecutionProvider"]

    def InferenceSession(self, model: Any, options: Any, providers: list[Any], **arguments: Any) -> Any:  # noqa: N802
        names = [p if isinstance(p, str) else p[0] for p in providers]
        wants = "CUDAExecutionProvider" in names
        if wants and not self._accepts:
            raise RuntimeError(self.refusal)
        real = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], **arguments)
        on_cuda, double = wants and self._loads, self
        records = any(not isinstance(p, str) and "enable_cuda_graph" in p[1] for p in providers)
        if records and self.unpartitioned:
            raise RuntimeError("not all compute graph nodes have been partitioned to the CUDAExecutionProvider")
        self.opened.append("cuda" if on_cuda else "cpu")

        class Inside:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def get_providers(self) -> list[str]:
                return ["CUDAExecutionProvider"] * on_cuda + ["CPUExecutionProvider"]

            def run(self, names: list[str], feeds: dict[str, Any], options: Options | None = None) -> Any:
                self._begin()
                assert not records or (options is not None and options.graph == "-1"), "it would be recorded"
                return real.run(names, feeds)

            def run_with_iobinding(self, binding: Any, options: Options | None = None) -> None:
                self._begin()
                if options is not None and options.graph != "-1":
                    if double.unrecordable:
                        raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
                    key = (self, options.graph)
                    if key not in double.recordings:
                        double.records.set()
                        time.sleep(0.002)  # others may try
                        double.records.clear()
                    recorded = double.recordings.setdefault(key, binding)
                    assert recorded is binding, "what was recorded reads and writes other addresses"
                    double.replays += 1
                real.run_with_iobinding(binding)

            def _begin(self) -> None:
                double.runs.append("cuda" if on_cuda else "cpu")
                if on_cuda and double.records.is_set():
                    raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
                if on_cuda and double.fails:
                    double.before_failing()
                    raise RuntimeError(double.failure)

        return Inside()
