"""Finds the board's own TensorRT, and asks it for its abilities instead of judging by its version.

TensorRT kills the process that loads an engine if CUDA doesn't work, so CUDA is tried first.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedprune.core.errors import EngineError, error_reason
from fedprune_device.engines.cuda import Cuda, Gpu

# Versions whose refittable engines may compute something else, even before they take new weights
# (https://docs.nvidia.com/deeplearning/tensorrt/11.3.0/inference-library/refitting-engines.html).
MISCOMPUTES_WHEN_REFITTABLE = ("11.3.",)

# The version becomes a part of an engine's key and of messages to the server, so nothing else may be in it.
_VERSION = re.compile(r"\d{1,3}(\.\d{1,5}){1,4}(\.?[a-z0-9]{1,12})?")
# One failure may bring many errors, of which the last ones are kept.
_MAX_ERRORS = 8


@dataclass(frozen=True)
class Bindings:
    """A TensorRT that can be used: its Python module, CUDA's runtime library and the GPU."""

    trt: Any
    version: str
    cuda: Cuda
    device: Gpu

    @property
    def strongly_typed(self) -> bool:
        """Whether an engine's types are those of its graph: from TensorRT 10 on where asked for, in 11 always."""
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def can_refit(self) -> bool:
        """Whether engines can take new weights from an ONNX file here, and compute right when they can."""
        miscomputes = self.version.startswith(MISCOMPUTES_WHEN_REFITTABLE)
        return hasattr(self.trt, "OnnxParserRefitter") and hasattr(self.trt.BuilderFlag, "REFIT") and not miscomputes

    def describe(self) -> str:
        types = "types of the graph" if self.strongly_typed else "types of its own choice"
        return f"TensorRT {self.version}: {types}, {'takes' if self.can_refit else 'takes no'} new weights"


def find_tensorrt() -> Bindings:
    """Find CUDA and TensorRT on this board; raises `EngineError`, which names what is missing, damaged or too old."""
    cuda = Cuda()
    device = cuda.first_gpu()
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise EngineError(
            "TensorRT is not installed for this Python", hint="On a Jetson: apt install python3-libnvinfer."
        ) from error
    except Exception as error:
        raise EngineError(f"TensorRT can't be loaded ({error_reason(error)})") from error
    version = str(getattr(trt, "__version__", ""))
    if not _VERSION.fullmatch(version):
        raise EngineError("TensorRT doesn't say its version", got=repr(version[:40]))
    context = getattr(trt, "IExecutionContext", None)
    if not (hasattr(context, "execute_async_v3") and hasattr(trt, "OnnxParser") and hasattr(trt, "IBuilderConfig")):
        raise EngineError(f"TensorRT {version} is too old", expected="8.5 or newer")
    return Bindings(trt, version, cuda, device)


class TensorRTErrors:
    """TensorRT's last errors, the only place where it gives the reason of a failure."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def logger(self, trt: Any) -> Any:
        """A logger for TensorRT, which must live as long as the objects that were made with it."""
        errors = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                # An exception here would end the process, because TensorRT's own threads call this.
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    errors.add(msg)

        return Logger()

    def add(self, message: str) -> None:
        self.lines = [*self.lines, error_reason(Exception(message))][-_MAX_ERRORS:]

    @contextmanager
    def translate(self, message: str) -> Iterator[None]:
        """Turn errors of the bindings, such as a TypeError for an object of another library, into an `EngineError`."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(message, got=self.lines[-1] if self.lines else error_reason(error)) from error

    def error(self, message: str) -> EngineError:
        return EngineError(message, got=self.lines[-1] if self.lines else "no reason")
