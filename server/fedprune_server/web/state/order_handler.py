"""Handles operators' orders in the server: takes each from the queue, carries it out or hands it on, and answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedprune.core.errors import ProtocolError
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.web.auth.roles import is_accepted
from fedprune_server.web.state.admin_executor import ADMIN_ORDERS, AdminExecutor
from fedprune_server.web.state.details import board_crashes, device_details, job_coverage
from fedprune_server.web.state.order_queue import Order, OrderAnswer, OrderQueue, answer_of
from fedprune_server.web.state.publisher import StatusPublisher

log = logging.getLogger("fedprune.server")

# Orders that are taken in one turn: each may read a database or a ranking, while boards wait for the loop.
_MAX_ORDERS = 20

# Coverage is computed from all devices, so at most this often for a job, however many operators look at it.
COVERAGE_INTERVAL_S = 5.0


class OrderHandler:
    """Carries out orders on the thread of the server's loop; those about members and releases go to `executor`."""

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
        self._unsaved_answers: list[OrderAnswer] = []
        self._coverage_times: dict[str, float] = {}

    def turn(self) -> None:
        for answer in self._unsaved_answers:
            self._queue.answer(answer)
        self._unsaved_answers.clear()
        for order in self._queue.take(_MAX_ORDERS):
            answer = answer_of(order, self._carry_out)
            # A pause is saved when the loop's turn ends. It is answered in the next: before, a crash could undo it.
            if answer.ok and order.kind in ("pause", "resume"):
                self._unsaved_answers.append(answer)
            elif not answer.ok or order.kind not in ADMIN_ORDERS:  # the executor answers its orders itself
                self._queue.answer(answer)
        self._queue.flush()

    def close(self) -> None:
        """End after the order under way, and write the answers, which the next start couldn't give."""
        if self._executor is not None:
            self._executor.close()
        self._queue.flush()

    def _carry_out(self, order: Order) -> str:
        if not is_accepted(order.kind, self._allowed):
            raise ProtocolError("this server takes no such orders from its console")
        if order.kind in ADMIN_ORDERS:
            if self._executor is None:
                raise ProtocolError("this server has no identity: every device may join, and there are no releases")
            self._executor.submit(order)
            return ""
        if order.kind == "coverage":
            self._add_coverage(self._runner(order.job or ""))
            return "coverage"
        if order.kind in ("pause", "resume"):
            runner, is_pause = self._runner(order.job or ""), order.kind == "pause"
            if not runner.pause(is_pause):
                return f"job {order.job} is {'paused already' if is_pause else 'not paused'}"
            text = f"job {order.job} {'is paused' if is_pause else 'goes on'}"
            log.info("%s, as %s ordered", text, order.operator)
            return text
        name = order.device or ""
        # The job that has a device, or had it last; the first job if none had it.
        runner = self._runners[self._publisher.job_of(name) or next(iter(self._runners))]
        if name not in runner.state.devices and not runner.registry.is_admitted(name):
            raise ProtocolError(f"no such device takes part: {name}")
        if order.kind == "look":
            self._publisher.queue(device_details(runner, name, self._clock()), board_crashes(self._folder, name))
            return name
        if not self._quarantine.release(name):
            raise ProtocolError(f"{name} is not in quarantine")
        self._publisher.mark_changed([name])
        return f"{name} is out of quarantine"

    def _runner(self, job: str) -> JobRunner:
        if job not in self._runners:
            raise ProtocolError("no such job", expected=", ".join(self._runners), got=job)
        return self._runners[job]

    def _add_coverage(self, runner: JobRunner) -> None:
        """Publish a job's coverage soon, unless it was a moment ago."""
        name, now = runner.job.name, self._clock()
        if now - self._coverage_times.get(name, -COVERAGE_INTERVAL_S) >= COVERAGE_INTERVAL_S:
            self._coverage_times[name] = now
            self._publisher.queue(job_coverage(runner, now))
