"""An onnxruntime with a GPU that can fail, on a machine without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime


class CudaRuntime:
    """An onnxruntime that says it computes with CUDA, where it computes on the CPU."""

    def __init__(self, *, offers: bool = True, accepts: bool = True, loads: bool = True) -> None:
        self._offers, self._accepts, self._loads = offers, accepts, loads
        self.fails = self.loses = False
        self.before_failing: Callable[[], object] = lambda: None
        self.opened: list[str] = []
        self.runs: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    @property
    def OrtValue(self) -> Any:  # noqa: N802
        return self

    def ortvalue_from_numpy(self, array: Any, device: str, number: int) -> Any:
        assert (device, number) == ("cuda", 0)
        real = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        double = self

        class Value(onnxruntime.OrtValue):
            def numpy(self) -> Any:
                if double.loses:
                    raise RuntimeError("CUDA failure 700: illegal address")
                return np.array(super().numpy())

        return Value(real._ortvalue, array)

    def get_available_providers(self) -> list[str]:
        return [*(["CUDAExecutionProvider"] if self._offers else []), "CPUExecutionProvider"]

    def InferenceSession(self, model: Any, options: Any, providers: list[Any], **more: Any) -> Any:  # noqa: N802
        names = [p if isinstance(p, str) else p[0] for p in providers]
        wants = "CUDAExecutionProvider" in names
        if wants and not self._accepts:
            raise RuntimeError("CUDA failure 35: driver too old")
        real = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], **more)
        on_cuda, double = wants and self._loads, self
        self.opened.append("cuda" if on_cuda else "cpu")

        class Inside:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def get_providers(self) -> list[str]:
                return ["CUDAExecutionProvider"] * on_cuda + ["CPUExecutionProvider"]

            def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
                self._begin()
                return real.run(names, feeds)

            def run_with_iobinding(self, binding: Any) -> None:
                self._begin()
                real.run_with_iobinding(binding)

            def _begin(self) -> None:
                double.runs.append("cuda" if on_cuda else "cpu")
                if on_cuda and double.fails:
                    double.before_failing()
                    raise RuntimeError("CUDA failure 2: out of memory")

        return Inside()
