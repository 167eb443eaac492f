"""The thread that carries out a job's heavy commands in order, next to the daemon's loop."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.output.log_lines import log_context

HeavyCommand = do.Score | do.Extract | do.FoldUpdate | do.Close | do.Evaluate
CommandResult = on.Event | BaseException


class CommandExecutor(Protocol):
    """Carries out heavy commands, as `fedprune_server.executor.worker.Worker` does."""

    def execute(self, command: HeavyCommand) -> on.Event: ...

    def expect(self, commands: Sequence[do.Command]) -> None:
        """Begin what can be done ahead of commands, some of which will be carried out next."""


class BackgroundExecutor:
    """Runs commands on a worker in a thread of its own.

    Results come in the order of the commands, and each is available before the next command begins. The daemon relies
    on that: with a round's last result it deletes what earlier rounds needed, so no earlier command may still run.
    """

    def __init__(self, worker: CommandExecutor) -> None:
        self._worker = worker
        self._orders: queue.Queue[HeavyCommand | None] = queue.Queue()
        self._results: queue.Queue[CommandResult] = queue.Queue()
        self.pending_count = 0
        # A daemon thread: a process that ends doesn't wait for a long evaluation; it will be repeated.
        log_subject = contextvars.copy_context()  # with the subject of log lines, such as the job
        self._thread = threading.Thread(
            target=log_subject.run, args=(self._run,), name="fedprune-executor", daemon=True
        )
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a result is awaited."""
        return self.pending_count > 0

    @property
    def has_result(self) -> bool:
        """Whether `collect` has a result."""
        return not self._results.empty()

    def expect(self, commands: Sequence[do.Command]) -> None:
        self._worker.expect(commands)

    def submit(self, command: HeavyCommand) -> None:
        self.pending_count += 1
        self._orders.put(command)

    def collect(self) -> on.Event | None:
        """The next result, if there is one. Raises `FedpruneError` if a command failed, and not because of a device."""
        try:
            result = self._results.get_nowait()
        except queue.Empty:
            return None
        self.pending_count -= 1
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self, patience_s: float = 5.0) -> None:
        """End the thread after the command that it works on; don't wait longer than `patience_s`."""
        self._orders.put(None)
        self._thread.join(patience_s)

    def _run(self) -> None:
        while (command := self._orders.get()) is not None:
            try:
                round_ = command.basis.round if isinstance(command, do.Extract) else command.round
                with log_context(round=round_, device=command_device(command)):
                    self._results.put(self._worker.execute(command))
            except Exception as error:  # noqa: BLE001, PERF203 - it is raised again where the loop collects it
                self._results.put(error)


def command_device(command: do.Command) -> str | None:
    """The device whose part a command is about, if it is one device's."""
    match command:
        case do.Extract():
            return command.part.device
        case do.FoldUpdate():
            return command.contribution.part.device
        case do.SendOffer() | do.PullUpdate():
            return command.device
    return None
