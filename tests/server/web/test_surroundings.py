"""What a feed looks up beside jobs: what couldn't be read is looked at again."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fedprune.core.errors import StorageError
from fedprune_server.web.state import surroundings
from fedprune_server.web.state.surroundings import ReleaseWatch, Seen, SurroundingsPoller
from support.waiting import until


class Busy:
    """Rollouts of which there are none, behind a disk that fails once."""

    fails = 1

    def version(self) -> int:
        return 7

    def entries(self) -> list[Any]:
        self.fails -= 1
        if self.fails == 0:
            raise StorageError("busy")
        return []


def test_rollouts_that_could_not_be_read_are_looked_at_again() -> None:
    store: Any = Busy()
    watch = ReleaseWatch(store)
    with pytest.raises(StorageError):
        watch.look()
    assert watch.look() == ()
    assert watch.look() is None


class Slow:
    """Approvals, on a disk that takes its time."""

    def __init__(self) -> None:
        self.ready, self.looks = threading.Event(), 0

    def look(self) -> set[str]:
        self.ready.wait(30)
        self.looks += 1
        return {f"board-{self.looks}"}


class Failing:
    """Releases that can't be read at first."""

    fails = 1

    def look(self) -> tuple[()]:
        self.fails -= 1
        if self.fails >= 0:
            raise StorageError("busy")
        return ()

    def moved(self) -> set[str]:
        return {"moved"}


class Changing:
    """Releases of which there is news once, and never again."""

    looks = 0

    def look(self) -> tuple[dict[str, Any], ...] | None:
        self.looks += 1
        return ({"number": 1},) if self.looks == 1 else None

    def moved(self) -> set[str]:
        return set()


class Unnamed:
    """A clerk whose disk fails at first."""

    fails = 1

    def names(self) -> tuple[str, ...]:
        self.fails -= 1
        if self.fails >= 0:
            raise StorageError("busy")
        return ("release-2",)


def test_rollouts_are_told_though_what_was_looked_at_behind_them_failed() -> None:
    clerk: Any = Unnamed()
    releases: Any = Changing()
    poller = SurroundingsPoller(None, releases, clerk.names)
    with pytest.raises(StorageError, match="busy"):
        poller.look()
    assert poller.look() == Seen(frozenset(), ({"number": 1},), ("release-2",))
    assert poller.look() == Seen(frozenset(), None, ("release-2",))


def test_a_look_that_is_under_way_at_the_end_opens_nothing_more() -> None:
    begun = threading.Event()

    class Interrupted:
        def look(self) -> set[str]:
            begun.set()
            poller._over.wait(30)
            return set()

    members: Any = Interrupted()
    releases: Any = Changing()
    poller = SurroundingsPoller(members, releases)
    poller.start()
    assert begun.wait(30)
    poller.close()
    assert releases.looks == 0
    assert not any(t.name == "fedprune-surroundings" for t in threading.enumerate())


def test_nobody_waits_for_a_disk_and_what_has_changed_is_told_though_a_look_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(surroundings, "SWEEP_S", 0.01)
    slow: Any = Slow()
    failing: Any = Failing()
    poller = SurroundingsPoller(slow, failing)

    def heard() -> Seen | None:
        return until(poller.seen)

    poller.start()
    try:
        assert poller.seen() is None  # at once, while the disk is busy
        slow.ready.set()
        with pytest.raises(StorageError, match="busy"):
            heard()
        assert heard() == Seen(frozenset({"board-1", "board-2", "moved"}), (), ())
    finally:
        slow.ready.set()
        poller.close()
    assert not any(t.name == "fedprune-surroundings" for t in threading.enumerate())
