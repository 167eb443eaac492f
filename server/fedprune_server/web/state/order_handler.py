"""The server's side of operators' orders: takes them, carries them out or hands them on, and answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedprune.core.errors import FedpruneError, ProtocolError, reason
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.web.auth.roles import LOOKS
from fedprune_server.web.state.admin_executor import KINDS, AdminExecutor
from fedprune_server.web.state.crashes import board_crashes
from fedprune_server.web.state.details import coverage, details
from fedprune_server.web.state.order_queue import Answer, Order, OrderQueue
from fedprune_server.web.state.publisher import StatusPublisher

log = logging.getLogger("fedprune.server")

_ORDERS = 20
"""Orders that are taken at a time."""

COVERED_S = 5.0
"""Coverage takes a look at all devices, so it is computed at most this often."""


class OrderHandler:
    """Carries out orders on the thread of the server's loop; those about members and releases go to `executor`.

    Args:
        folder: The state folder, which has boards' crashes.
    """

    def __init__(
        self,
        queue: OrderQueue,
        publisher: StatusPublisher,
        runners: Mapping[str, JobRunner],
        quarantine: Quarantine,
        folder: Path,
        executor: AdminExecutor | None,
        *,
        allowed: str = "all",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue, self._publisher, self._runners, self._quarantine = queue, publisher, runners, quarantine
        self._folder, self._executor, self._allowed, self._clock = folder, executor, allowed, clock
        self._unsaved: list[Answer] = []
        self._covered: dict[str, float] = {}

    def turn(self) -> None:
        for answer in self._unsaved:
            self._queue.answer(answer)
        self._unsaved.clear()
        for order in self._queue.take(_ORDERS):
            self._take(order)
        self._queue.flush()

    def close(self) -> None:
        """End once the order under way is done, and answer what was carried out: the next start would call the rest
        interrupted."""
        if self._executor is not None:
            self._executor.close()
        self._queue.flush()

    def _take(self, order: Order) -> None:
        try:
            if self._allowed == "none" or (self._allowed == "look" and order.order not in LOOKS):
                raise ProtocolError("this server takes no such orders from its console")
            if order.order in KINDS:
                if self._executor is None:
                    raise ProtocolError("this server has no identity: every device may join, and there are no releases")
                self._executor.submit(order)
                return
            text = self._carry_out(order)
        except FedpruneError as error:
            self._queue.answer(Answer(order.number, False, str(error)))
            return
        except Exception as error:  # noqa: BLE001 - the orders that were taken with it must be carried out, too
            log.error("an order of the console failed: %s: %s", type(error).__name__, reason(error))
            self._queue.answer(Answer(order.number, False, "it failed; see the server's log"))
            return
        if order.order in ("pause", "resume"):  # saved as the loop's next turn ends, and not done before that
            self._unsaved.append(Answer(order.number, True, text))
        else:
            self._queue.answer(Answer(order.number, True, text))

    def _carry_out(self, order: Order) -> str:
        if order.order == "coverage":
            self._add_coverage(self._runner(order.job or ""))
            return "coverage"
        if order.order in ("pause", "resume"):
            runner, pause = self._runner(order.job or ""), order.order == "pause"
            if not runner.pause(pause):
                return f"job {order.job} is {'paused already' if pause else 'not paused'}"
            text = f"job {order.job} {'is paused' if pause else 'goes on'}"
            log.info("%s, as %s ordered", text, order.operator)
            return text
        name = order.device or ""
        runner = self._runner_with(name)
        if order.order == "look":
            self._publisher.add(details(runner, name, self._clock()), board_crashes(self._folder, name))
            return name
        if not self._quarantine.release(name):
            raise ProtocolError(f"{name} is not in quarantine")
        self._publisher.changed([name])
        return f"{name} is out of quarantine"

    def _runner(self, job: str) -> JobRunner:
        if job not in self._runners:
            raise ProtocolError("no such job", expected=", ".join(self._runners), got=job)
        return self._runners[job]

    def _runner_with(self, device: str) -> JobRunner:
        """The job that has a device or had it last; the first one where none had."""
        runner = self._runners[self._publisher.job_of(device) or next(iter(self._runners))]
        if device not in runner.state.devices and not runner.registry.admitted(device):
            raise ProtocolError(f"no such device takes part: {device}")
        return runner

    def _add_coverage(self, runner: JobRunner) -> None:
        """Publish a job's coverage soon, unless it was a moment ago."""
        name, now = runner.job.name, self._clock()
        if now - self._covered.get(name, -COVERED_S) >= COVERED_S:
            self._covered[name] = now
            self._publisher.add(coverage(runner, now))
