"""Child processes that end with their parent, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess  # nosec B404  # lists of words, never a shell
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fedprune.core.errors import FedpruneError

_PR_SET_PDEATHSIG = 1
_PATIENCE_S = 5.0
_LAST_WORDS = 400

_prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)


def reap(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Wait for a child that was asked to end; kill it if it takes longer."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    process.kill()  # nothing to one that has ended
    process.wait()


class ChildDiedError(FedpruneError):
    """A child process ended before its work was done."""


class Children:
    """Processes that are started together and ended together.

    Use it as a context: leaving it ends them all, first politely, then not.
    """

    def __init__(self) -> None:
        self._processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid for name, (process, _) in self._processes.items()}

    def start(self, name: str, command: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        """Start a process.

        Args:
            name: For people.
            command: Program and arguments.
            output: File that takes what it prints.
            environment: Variables beside this process's.
        """
        with output.open("ab") as stream:
            process = subprocess.Popen(  # noqa: S603  # nosec B603  # our own modules, in this Python
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                # Ctrl-C in the terminal is for the parent alone, which then ends its children.
                start_new_session=True,
                preexec_fn=partial(signal_at_parents_end, signal.SIGTERM),
            )
        self._processes[name] = (process, output)

    def check(self) -> None:
        """Look whether all are alive.

        Raises:
            ChildDiedError: One has ended; the message has its last words.
        """
        for name, (process, output) in self._processes.items():
            code = process.poll()
            if code is not None:
                words = output.read_text(errors="replace").strip()[-_LAST_WORDS:]
                raise ChildDiedError(
                    f"{name} has ended with exit code {code}", got=words or "no output", hint=f"See {output}."
                )

    def stop(self) -> None:
        """End them all; may be called twice."""
        for process, _ in self._processes.values():
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    process.terminate()
        for process, _ in self._processes.values():
            reap(process, _PATIENCE_S)
        self._processes.clear()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def replies_to_parent() -> BinaryIO:
    """Standard output for a helper's words alone: whatever a library prints goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def begin_helper(parent: int) -> None:
    """Make this process a helper of another one: it ends with it, and leaves Ctrl-C to it.

    Args:
        parent: The other one's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_at_parents_end(signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def signal_at_parents_end(number: signal.Signals) -> None:
    """Ask the kernel to send this process a signal when its parent is gone, even after kill -9 (Linux alone can).

    Also runs in a child before its program, so it may do no more than call the kernel.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
