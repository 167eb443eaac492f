"""The processes of `fedprune-server demo`: starts them, notices when one fails, and ends them all."""

from __future__ import annotations

import os
import signal
import subprocess  # nosec B404  # lists of words, never a shell
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedprune.core.errors import ExitCode
from fedprune.core.parent_death import set_parent_death_signal
from fedprune_server.process.child_process import ChildDiedError, wait_or_kill

STOP_S = 5.0
# Characters of a dead board's output that its error shows: a traceback's end, which names the cause.
_MAX_OUTPUT_SHOWN = 400


class DemoProcesses:
    """Some processes. Leaving the context ends them all: SIGTERM, then SIGKILL after `stop_s` seconds."""

    def __init__(self, stop_s: float = STOP_S) -> None:
        self._stop_s = stop_s
        self._processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def start(self, name: str, command: Sequence[str], output: Path, **environment: str) -> None:
        """Start a process; `output` is the file for what it prints, `environment` are further variables."""
        with output.open("ab") as stream:
            process = subprocess.Popen(  # noqa: S603  # nosec B603  # our own modules, in this Python
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C in the terminal is for the demo, which then ends its boards
                # A demo that is killed with SIGKILL can't end its boards itself.
                preexec_fn=partial(set_parent_death_signal, signal.SIGTERM),
            )
        self._processes[name] = (process, output)

    def check(self, *, may_end: bool = False) -> None:
        """Raise `ChildDiedError`, with its last output, if a process has ended; with `may_end`, if it has failed."""
        for name, (process, output) in self._processes.items():
            code = process.poll()
            if code is not None and not (may_end and code == 0):
                output_end = output.read_text(errors="replace").strip()[-_MAX_OUTPUT_SHOWN:]
                message = f"{name} has ended with exit code {code}"
                error = ChildDiedError(message, got=output_end or "no output", hint=f"See {output}.")
                if code in {*ExitCode} - {ExitCode.OK}:
                    error.exit_code = ExitCode(code)
                raise error

    def wait(self) -> None:
        """Wait until all have ended. Raises `ChildDiedError` if one has failed."""
        for process, _ in self._processes.values():
            process.wait()
        self.check(may_end=True)

    def __enter__(self) -> DemoProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        started = [process for process, _ in self._processes.values()]
        for process in started:
            process.terminate()  # does nothing to one that has ended
        kill_at = time.monotonic() + self._stop_s
        for process in started:
            wait_or_kill(process, max(0.0, kill_at - time.monotonic()))
