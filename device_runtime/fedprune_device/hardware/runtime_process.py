"""Runs a second process that tries onnxruntime first, checks models with it and measures the board.

Some wheels contain instructions that some boards lack (1.21.0 on a Raspberry Pi 4:
https://github.com/microsoft/onnxruntime/issues/23957). They kill the process that loads them. Besides, the memory of a
measurement goes back to the system when the process ends, and isn't counted in the agent's peak.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from fedprune.core.closeable import Closeable
from fedprune.core.errors import FedpruneError, MissingExtraError, RuntimeUnavailableError
from fedprune.core.imports import program_code
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.session import onnxruntime_version
from fedprune_device.hardware.probe import probe, reference_net, reference_predictor
from fedprune_device.hardware.readings import memory, unreclaimable_memory
from fedprune_device.serving.model_slots import ModelSlots

_LOG = logging.getLogger(__name__)

# Generous, for small boards with slow cards: the limits only end a process that hangs.
_START_TIMEOUT_S = 120.0
_CHECK_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 1800.0
_NO_PROBE_HINT = "Start without the probe (`--no-probe`): then the profile's figures are used."


# The beginning of an answer, since libraries print lines of their own.
ANSWER_PREFIX = "fedprune: "

# A program that was asked to end is killed after this time.
_CLOSE_TIMEOUT_S = 5.0
# Bytes of the error output that are kept: the last lines name the error.
_MAX_ERROR_BYTES = 2**16
_READ_BYTES = 2**18
# A program without newlines, or that prints for ever, must not fill this process's memory or time.
_MAX_LINE_BYTES = 2**20
_MAX_STRAY_LINES = 1000


class StrayLinesError(Exception):
    """The program prints too many lines that are no answers."""


class LineProcess(Closeable):
    """A started program, which is killed when a call takes longer than its seconds: `timed_out` is true from then on.

    Raises `OSError` if it can't be started. One thread at a time may call it; any may call `kill`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.timed_out = False
        self._error_output = bytearray()
        self.process = subprocess.Popen(  # noqa: S603  # nosec B603  # words of the caller's own
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._in, self._out = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self._listener = threading.Thread(target=self._read_errors, daemon=True)
        self._listener.start()

    def send(self, data: bytes, seconds: float) -> None:
        """Write to the program; raises `OSError` if it has ended."""
        with self._time_limit(seconds):
            self._in.write(data)
            self._in.flush()

    def read_answer(self, seconds: float) -> Any:
        """The next answer. Raises `EOFError` if the program has ended, `StrayLinesError`, or `ValueError` or
        `RecursionError` if the answer is not JSON."""
        with self._time_limit(seconds):
            for _ in range(_MAX_STRAY_LINES):
                raw = self._out.readline(_MAX_LINE_BYTES)
                if not raw:
                    raise EOFError
                line = raw.decode("utf-8", "replace")
                if line.startswith(ANSWER_PREFIX):
                    return json.loads(line[len(ANSWER_PREFIX) :])
        raise StrayLinesError

    def wait_for_end(self) -> tuple[int, str]:
        """The exit status of a program that has ended, or is killed after 5 s; the end of its error output."""
        try:
            code = self.process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.process.wait()
        self._listener.join(_CLOSE_TIMEOUT_S)
        return code, self._error_output.decode("utf-8", "replace")

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        # Closing flushes data that the program never read, which blocks or fails.
        with suppress(OSError), self._time_limit(_CLOSE_TIMEOUT_S):
            self._in.close()
        self.wait_for_end()
        self._out.close()

    @contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(max(seconds, 0.0), self._kill_late_process)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill_late_process(self) -> None:
        self.timed_out = True
        self.kill()

    def _read_errors(self) -> None:
        """Read the error output, so that the program never blocks on it, and keep its end."""
        with cast(IO[bytes], self.process.stderr) as source:
            while chunk := os.read(source.fileno(), _READ_BYTES):
                self._error_output += chunk
                del self._error_output[:-_MAX_ERROR_BYTES]


class RuntimeProcess(Closeable):
    """A process that the first request starts, and a request after `close` again. Not for several threads."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._process: LineProcess | None = None
        self._version = ""
        self._memory_before = 0, 0

    def check(self) -> str:
        """Load onnxruntime and return its version; raises `RuntimeUnavailableError` if that crashes, fails or hangs."""
        if self._process is None:
            self._memory_before = memory()[0], memory()[1] + unreclaimable_memory()
            self._start()
        return self._version

    def check_model(self, serving: Path | None = None) -> None:
        """Check that a small graph and the active model in the folder `serving` compute correct results."""
        self._request({"check": None if serving is None else str(serving)}, _CHECK_TIMEOUT_S, "a small graph")

    def probe(
        self,
        threads: int = 1,
        seconds: float = 2.0,
        *,
        layer_seconds: float = 10.0,
        memory_file: Path | None = None,
        cuda: bool = False,
    ) -> ProbeReport:
        """Measure the board (`fedprune_device.hardware.probe.probe`).

        The available memory is this process's and the system's free memory from before the second process started.
        """
        settings = {"threads": threads, "seconds": seconds, "layer_seconds": layer_seconds, "cuda": cuda}
        file = None if memory_file is None else str(memory_file)
        try:
            request = {"probe": settings, "memory_file": file}
            report = self._request(request, _PROBE_TIMEOUT_S, "the probe", _NO_PROBE_HINT)
        except RuntimeUnavailableError as error:
            if not cuda:
                raise
            _LOG.warning("the probe of the GPU has failed (%s): measuring the processor", error)
            return self.probe(threads, seconds, layer_seconds=layer_seconds, memory_file=memory_file)
        total, available = self._memory_before
        measured = ProbeReport.from_dict(report)
        if measured.cpu_reason:
            _LOG.warning("the probe measured the processor instead of the GPU: %s", measured.cpu_reason)
        return replace(measured, memory_total=total, memory_available=min(available, total))

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _start(self) -> LineProcess:
        command = [self._python, "-c", program_code(f"from {__name__} import serve; serve()")]
        try:
            process = self._process = LineProcess(command)
        except OSError as error:
            raise RuntimeUnavailableError(f"can't start {self._python}: {error.strerror}") from error
        try:
            self._version = str(self._answer(process, _START_TIMEOUT_S).get("version", ""))[:200]
        except EOFError as error:
            code, reason = self._exit_reason(process)
            if process.timed_out:
                raise RuntimeUnavailableError(f"onnxruntime doesn't load within {_START_TIMEOUT_S:g} s") from error
            if code == MissingExtraError.exit_code:
                raise MissingExtraError(
                    "onnxruntime is not installed", hint="On a Jetson it is JetPack's onnxruntime-gpu.", extra="board"
                ) from error
            if code < 0:
                raise RuntimeUnavailableError(
                    f"onnxruntime kills the process that loads it (signal {-code})",
                    hint="This version uses instructions that this processor lacks. Install another one; on a "
                    "Raspberry Pi 4 anything but 1.21: pip install 'onnxruntime!=1.21.*'.",
                ) from error
            raise RuntimeUnavailableError(f"onnxruntime can't be loaded ({reason})") from error
        return process

    def _request(self, request: dict[str, Any], seconds: float, subject: str, hint: str = "") -> Any:
        self.check()
        process = self._process or self._start()
        try:
            process.send(json.dumps(request).encode() + b"\n", seconds)
            answer = self._answer(process, seconds)
        except (OSError, EOFError) as error:
            code, reason = self._exit_reason(process)
            if process.timed_out:
                raise RuntimeUnavailableError(f"{subject} isn't done within {seconds:g} s", hint=hint) from error
            if code < 0:
                reason = f"killed by signal {-code}"
                if -code == signal.SIGILL:
                    hint = "This version of onnxruntime uses instructions that this processor lacks."
            raise RuntimeUnavailableError(f"{subject} failed ({reason})", hint=hint) from error
        if "error" in answer:
            raise RuntimeUnavailableError(f"{subject} failed ({answer['error']})", hint=hint)
        return answer.get("answer")

    def _answer(self, process: LineProcess, seconds: float) -> Any:
        try:
            return process.read_answer(seconds)
        except StrayLinesError as error:
            self.close()
            raise RuntimeUnavailableError("onnxruntime's process prints too much that is no answer") from error

    def _exit_reason(self, process: LineProcess) -> tuple[int, str]:
        """The exit status, and the last line of the error output."""
        code, text = process.wait_for_end()
        self.close()
        return code, (text.strip().splitlines() or ["no message"])[-1][:300]


def check_runtime(python: str = sys.executable) -> str:
    """Load onnxruntime in a process of its own, and return its version; see `RuntimeProcess.check`."""
    with RuntimeProcess(python) as runtime:
        return runtime.check()


def serve() -> None:
    """The other side of `RuntimeProcess`: one request per line of standard input, one answer per line."""
    try:
        loaded = onnxruntime_version()
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.exit_code))
    _print_answer({"version": loaded})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "probe" in request:
                file = request["memory_file"]
                report = probe(**request["probe"], memory_file=None if file is None else Path(file), runtime=loaded)
                _print_answer({"answer": report.to_dict()})
            else:
                _check_model(request["check"])
                _print_answer({"answer": None})
        except FedpruneError as error:
            _print_answer({"error": str(error)})


def _print_answer(answer: dict[str, Any]) -> None:
    print(ANSWER_PREFIX + json.dumps(answer), flush=True)


def _check_model(serving: str | None) -> None:
    reference = reference_net()
    with reference_predictor({n: np.full(s, 0.01, np.float32) for n, s in reference["tensors"].items()}) as predictor:
        predictor.check(reference["classes"])
    if serving is not None:
        slots = ModelSlots(Path(serving))
        if slots.current() is not None:
            predictor, record = slots.open()
            predictor.check(record.classes)
