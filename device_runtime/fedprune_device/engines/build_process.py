"""Runs the child process that builds an engine: starts it with a request, polls it, and kills it at its time-out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.errors import EngineError, error_reason
from fedprune.core.imports import module_code
from fedprune_device.engines.engine_cache import EngineCache

# Bytes at the end of a child's output that are read: only the last line counts, and TensorRT writes many before it.
_MAX_TAIL_BYTES = 4096


@dataclass(frozen=True)
class BuildRequest:
    """The request to a child process.

    `folder` holds graph, weights and `x.npy`, the inputs of the check, and gets the result. `base` is the engine that
    gets new weights, None to build one. The child ends with the process `parent`.
    """

    folder: Path
    plan: str
    refittable: bool = False
    timings: Path | None = None
    base: Path | None = None
    parent: int = field(default_factory=os.getpid)

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> BuildRequest:
        body = json.loads(text)
        paths = {n: None if body[n] is None else Path(body[n]) for n in ("timings", "base")}
        return cls(Path(body["folder"]), body["plan"], body["refittable"], **paths, parent=body["parent"])


@dataclass(frozen=True)
class BuildResult:
    """The result of a child process: its seconds, its median seconds per sample, and its outputs for the check."""

    seconds: float
    latency_s: float
    outputs: npt.NDArray[Any]


class BuildProcess:
    """A child process that builds an engine; raises `EngineError` if it can't be started."""

    def __init__(
        self, cache: EngineCache, request: BuildRequest, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._clock = request.folder, clock
        self._timeout_s, self._deadline = timeout_s, clock() + timeout_s
        self._out, self._err = cache.work / "out.txt", cache.work / "err.txt"
        command = [sys.executable, "-c", module_code("fedprune_device.engines")]
        request_file = cache.work / "order.json"
        with storage_errors(f"can't write {cache.work}"):
            request_file.write_text(request.to_json())
            with request_file.open() as stdin, self._out.open("wb") as out, self._err.open("wb") as err:
                try:
                    # A group of its own, so that all that TensorRT starts ends with it.
                    self._child = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=err, start_new_session=True)  # noqa: S603  # nosec B603  # our own module, in this Python
                except OSError as error:
                    raise EngineError(f"can't start {sys.executable}: {error.strerror}") from error

    @property
    def progress(self) -> str:
        return _last_line(self._out)

    def poll(self) -> BuildResult | None:
        """The result, None until it is done; raises `EngineError` if the child failed, was killed, or took too long."""
        code = self._child.poll()
        if code is None:
            if self._clock() < self._deadline:
                return None
            self.stop()
            raise EngineError(
                "the engine wasn't built in time",
                expected=f"at most {self._timeout_s:g} s",
                hint="Give the plan a longer timeout_s, or a lower level.",
            )
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else str(-code)
            hint = "Memory ran out: give the plan a smaller pool_bytes or batch." if -code == signal.SIGKILL else ""
            raise EngineError(f"the process that makes the engine was ended by {name}", hint=hint)
        if code:
            raise EngineError(_last_line(self._err) or f"making the engine failed ({code})")
        return self._read_result()

    def stop(self) -> None:
        if self._child.poll() is None:  # before it is waited for, its process number isn't reused
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def _read_result(self) -> BuildResult:
        try:
            report = json.loads(_last_line(self._out))
            seconds, latency = float(report["seconds"]), float(report["latency_s"])
            if not (math.isfinite(seconds) and math.isfinite(latency)):
                raise ValueError("times are not finite")
            answers = np.load(self._folder / "answers.npy", allow_pickle=False)
        except (ValueError, KeyError, TypeError, OSError, EOFError, RecursionError, OverflowError) as error:
            raise EngineError(
                f"the process that makes the engine left nothing that can be read ({error_reason(error)})"
            ) from error
        return BuildResult(seconds, latency, answers)


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MAX_TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return error_reason(Exception(lines[-1])) if lines else ""
