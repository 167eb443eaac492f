"""Handles operators' orders in the server: takes each from the queue, carries it out or hands it on, and answers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import FedpruneError, ProtocolError, ReleaseError
from fedprune.releases.release import MANIFEST, Release
from fedprune.wire.fleet_messages import MAX_MANIFEST_BYTES
from fedprune.wire.topics import check_topic_name
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.enrollment.approval import approve, deny, revoke
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.rollouts import RolloutTerms, start_rollout, take_back
from fedprune_server.ota.rollouts import request_action as order_rollout
from fedprune_server.ota.store import RolloutStore
from fedprune_server.web.auth.roles import is_accepted
from fedprune_server.web.state.details import board_crashes, device_details, job_coverage
from fedprune_server.web.state.order_queue import EXPIRED, Order, OrderAnswer, OrderQueue, answer_of
from fedprune_server.web.state.publisher import StatusPublisher

log = logging.getLogger("fedprune.server")

# Orders that are taken in one turn: each may read a database or a ranking, while boards wait for the loop.
_MAX_ORDERS = 20

# Coverage is computed from all devices, so at most this often for a job, however many operators look at it.
COVERAGE_INTERVAL_S = 5.0


# The kinds of these orders: each reads or writes the identity or the rollouts, which takes the database's lock.
ADMIN_ORDERS = frozenset(
    {"approve", "deny", "revoke", "rollout_start", "rollout_stop", "rollout_pause", "rollout_resume", "rollout_back"}
)

# Orders that may wait. The console refuses further ones at 100 waiting, so that more are not an operator's.
MAX_WAITING_ORDERS = 100
_MAX_DIGITS = 10


# Orders about members run one after the other on a thread with database connections of its own: reading a release takes
# seconds. The server's loop notices their changes in the databases, as it notices those of the command line.
class AdminExecutor:
    """Carries out the orders in `ADMIN_ORDERS`.

    Args:
        releases: A folder whose subfolders are releases that can be rolled out; None for no releases.
        answer: Takes the answer to each order; called on the executor's thread.
    """

    def __init__(
        self,
        state: Path,
        releases: Path | None,
        answer: Callable[[OrderAnswer], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state, self._answer = state, answer
        self._clock = clock
        self._releases = releases
        self._orders: queue.Queue[Order | None] = queue.Queue(MAX_WAITING_ORDERS)
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, order: Order) -> None:
        """Carry an order out soon; raises `ProtocolError` if too many are waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fedprune-admin", daemon=True)
            self._thread.start()
        try:
            self._orders.put_nowait(order)
        except queue.Full:
            raise ProtocolError(f"{MAX_WAITING_ORDERS} orders are waiting to be carried out") from None

    def release_names(self) -> tuple[str, ...]:
        """Names of releases that can be rolled out, by their folders' time, newest first."""
        if self._releases is None:
            return ()
        try:
            folders = [path for path in self._releases.iterdir() if _is_release_folder(path)]
            folders.sort(key=lambda p: p.stat().st_mtime, reverse=True)
        except OSError:
            return ()
        return tuple(p.name for p in folders[:200])

    def close(self) -> None:
        """End after the order that is being carried out."""
        self._is_closed = True
        with suppress(queue.Full):
            self._orders.put_nowait(None)
        if self._thread is not None:
            self._thread.join(10.0)

    def carry_out(self, order: Order) -> str:
        """Carry an order out; returns the result for people, or raises `FedpruneError`."""
        device, key = order.device or "", order.key
        if order.kind == "rollout_start":
            if order.release not in self.release_names() or self._releases is None:
                raise ReleaseError(
                    f"no release {order.release}", expected=", ".join(self.release_names()) or "none is there",
                    hint="It is a folder in the folder `console_releases` of [server].",
                )  # fmt: skip
            started = start_rollout(
                self._state, self._releases / order.release, RolloutTerms(order.groups), order.devices or None
            )
            return (
                f"rollout {started.number} of release {started.release.number} to {len(started.rollout.boards)} boards"
            )
        if order.kind.startswith("rollout_"):
            return self._rollout(order, f"by {order.operator}" + (f": {order.reason}" if order.reason else ""))
        with IdentityFolder(self._state) as identity:
            if order.kind == "approve":
                return approve(identity, device, key or "")
            return deny(identity, device, key) if order.kind == "deny" else revoke(identity, device)

    def _rollout(self, order: Order, reason: str) -> str:
        if order.kind == "rollout_back":
            left_release = order.release or ""
            if not left_release.isdecimal() or len(left_release) > _MAX_DIGITS:
                raise ReleaseError("release that boards leave", expected="its number", got=order.release)
            highest = self._highest_prepared()
            return take_back(self._state, reason, release=int(left_release), above=highest).way_back_text()
        with RolloutStore(self._state) as store:
            return order_rollout(store, order.kind.removeprefix("rollout_"), reason)

    def _highest_prepared(self) -> int:
        """The highest number of a release that can be rolled out; 0 for none. A release that takes boards back must not
        get the number of a release that is only prepared."""
        highest = 0
        for folder in [self._releases / name for name in self.release_names()] if self._releases is not None else []:
            with suppress(FedpruneError, OSError), (folder / MANIFEST).open("rb") as file:
                highest = max(highest, Release.from_bytes(file.read(MAX_MANIFEST_BYTES + 1)).number)
        return highest

    def _run(self) -> None:
        while (order := self._orders.get()) is not None and not self._is_closed:
            if self._clock() > order.until:  # it waited here while others were carried out
                self._answer(OrderAnswer(order.number, ok=False, text=EXPIRED))
            else:
                self._answer(answer_of(order, self.carry_out))


def _is_release_folder(path: Path) -> bool:
    try:
        check_topic_name(path.name, "release")
    except ProtocolError:
        return False
    return path.is_dir() and not path.is_symlink()


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
