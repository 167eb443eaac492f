"""Carries out operators' orders about members and releases, with the functions that the command line uses.

Orders run one after the other on a thread with database connections of its own: reading a release takes seconds.
The server's loop notices their changes in the databases, as it notices those of the command line.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import FedpruneError, ProtocolError, ReleaseError
from fedprune.releases.release import MANIFEST, Release
from fedprune.wire.fleet_messages import MAX_MANIFEST_BYTES
from fedprune.wire.topics import check_topic_name
from fedprune_server.enrollment.approval import approve, deny, revoke
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.rollouts import RolloutTerms, start_rollout, take_back
from fedprune_server.ota.rollouts import request_action as order_rollout
from fedprune_server.ota.store import RolloutStore
from fedprune_server.web.state.order_queue import EXPIRED, Order, OrderAnswer, answer_of

# The kinds of these orders: each reads or writes the identity or the rollouts, which takes the database's lock.
ADMIN_ORDERS = frozenset(
    {"approve", "deny", "revoke", "rollout_start", "rollout_stop", "rollout_pause", "rollout_resume", "rollout_back"}
)

# Orders that may wait. The console refuses further ones at 100 waiting, so that more are not an operator's.
MAX_WAITING_ORDERS = 100
_MAX_DIGITS = 10


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
            if order.kind == "deny":
                return deny(identity, device, key)
            return revoke(identity, device)

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
            if order.is_expired(self._clock()):  # it waited here while others were carried out
                self._answer(OrderAnswer(order.number, ok=False, text=EXPIRED))
            else:
                self._answer(answer_of(order, self.carry_out))


def _is_release_folder(path: Path) -> bool:
    try:
        check_topic_name(path.name, "release")
    except ProtocolError:
        return False
    return path.is_dir() and not path.is_symlink()
