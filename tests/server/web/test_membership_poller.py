"""What the console looks up beside jobs: what couldn't be read is looked at again, and the loop waits for no disk."""

import threading
from typing import Any

import pytest

from fedprune.core.errors import StorageError
from fedprune_server.enrollment.store import APPROVED, MemberKey
from fedprune_server.web.state.membership_poller import MembershipPoller, PollResult
from support.waiting import until


class Memberships:
    """One board more at each look, on a disk that takes its time."""

    def __init__(self) -> None:
        self.ready, self.looks = threading.Event(), 0

    def version(self) -> str:
        assert self.ready.wait(30)
        self.looks += 1
        return str(self.looks)

    def devices(self) -> list[MemberKey]:
        return [MemberKey(f"board-{n + 1}", "", APPROVED, 0) for n in range(self.looks)]


class Rollouts:
    """Rollouts of which there are none, behind a disk that fails at first."""

    def __init__(self, failures: int = 1) -> None:
        self.failures, self.looks = failures, 0

    def change_count(self) -> int:
        self.looks += 1
        return 7

    def entries(self) -> list[Any]:
        self.failures -= 1
        if self.failures >= 0:
            raise StorageError("busy")
        return []


def test_rollouts_that_could_not_be_read_are_looked_at_again() -> None:
    rollouts: Any = Rollouts()
    poller = MembershipPoller(None, rollouts, lambda: ("release-2",))
    with pytest.raises(StorageError, match="busy"):
        poller.latest()
    assert poller.latest() == PollResult(frozenset(), (), ("release-2",))
    assert poller.latest() == PollResult(frozenset(), None, ("release-2",))


def test_nobody_waits_for_a_disk_and_what_has_changed_is_told_though_a_look_failed() -> None:
    slow: Any = Memberships()
    failing: Any = Rollouts()
    poller = MembershipPoller(slow, failing)
    poller.start()
    try:
        assert poller.latest() is None  # at once, while the disk is busy
        slow.ready.set()
        with pytest.raises(StorageError, match="busy"):
            until(poller.latest)
        poll = until(poller.latest)
        assert poll is not None
        assert (poll.changed_devices, poll.rollouts) == ({"board-1", "board-2"}, ())
    finally:
        poller.close()
    assert not any(t.name == "fedprune-members" for t in threading.enumerate())


def test_a_look_that_is_under_way_at_the_end_opens_nothing_more() -> None:
    rollouts: Any = Rollouts()
    poller = MembershipPoller(None, rollouts)
    poller.close()
    assert poller.latest() == PollResult(frozenset(), None, ())
    assert rollouts.looks == 0
