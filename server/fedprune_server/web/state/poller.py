"""Who looks up what a feed needs beside jobs: files and databases, read on a thread of its own.

Somebody else may write to these databases just then, and a disk may be slow: the server's loop waits for neither.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

from fedprune.core.errors import FedpruneError, StorageError, reason
from fedprune_server.web.state.admin_executor import Clerk
from fedprune_server.web.state.surroundings import Members, ReleaseWatch

SWEEP_S = 2.0
"""So long it rests between two looks."""

_END_S = 35.0
"""So long it waits at its end for a database, which waits at each of three steps for who writes to it: 10 s at most."""


@dataclass(frozen=True)
class Seen:
    """What a look found.

    Attributes:
        changed: Devices of which something else is true than before.
        rollouts: Rows of `publisher_messages.ROLLOUT`; None where nothing has changed.
        releases: Names of releases that may be rolled out.
    """

    changed: frozenset[str]
    rollouts: tuple[dict[str, Any], ...] | None
    releases: tuple[str, ...]


class Lookout:
    """Looks at who is let in and what becomes of releases; until it is started, when it is asked.

    Args:
        members: Who is let in; None for everybody.
        releases: What becomes of releases; None where none are given out.
        clerk: Knows which releases there are; None for a server without an identity.
    """

    def __init__(
        self, members: Members | None = None, releases: ReleaseWatch | None = None, clerk: Clerk | None = None
    ) -> None:
        self.members, self.releases, self._clerk = members, releases, clerk
        self._changed: set[str] = set()
        self._rollouts: tuple[dict[str, Any], ...] | None = None
        self._found: queue.Queue[Seen | FedpruneError] = queue.Queue(1)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look every few seconds from now on, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="fedprune-lookout", daemon=True)
        self._thread.start()

    def seen(self) -> Seen | None:
        """What the latest look found; None where there has been none since the last call.

        Raises:
            StorageError: The disk fails.
        """
        if self._thread is None:
            return self.look()
        try:
            found = self._found.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, FedpruneError):
            raise found
        return found

    def look(self) -> Seen:
        """Look, on this thread.

        Raises:
            StorageError: The disk fails; what has changed is told by the next look that doesn't.
        """
        if self.members is not None and not self._over.is_set():
            self._changed |= self.members.look()
        names: tuple[str, ...] = ()
        if self.releases is not None and not self._over.is_set():  # else its database may be closed by now
            found = self.releases.look()
            self._rollouts = self._rollouts if found is None else found
            self._changed |= self.releases.moved()
            names = () if self._clerk is None else self._clerk.names()
        changed, self._changed = frozenset(self._changed), set()
        rollouts, self._rollouts = self._rollouts, None
        return Seen(changed, rollouts, names)

    def close(self) -> None:
        """End; a look that is under way opens no other database after the one that it reads."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._over.is_set():
            found: Seen | FedpruneError
            try:
                found = self.look()
            except FedpruneError as error:
                found = error
            except Exception as error:  # noqa: BLE001 - it must not end the thread that looks
                found = StorageError(f"who is let in, and rollouts: {type(error).__name__}: {reason(error)}")
            while not self._over.is_set():  # nothing is looked at again before this has been heard
                try:
                    self._found.put(found, timeout=SWEEP_S)
                    break
                except queue.Full:
                    continue
            self._over.wait(SWEEP_S)
