"""A board that announced its update and comes again before the update is at the server: with it, or without."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.state import DeviceTask, Progress
from support.fakes import asynchronous_shell, coordinator_shell, synchronous_shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board

BIRTH = on.DeviceBorn("a", 9, {"name": "toy"}, 10)


class BoardReturn:
    """A job in which the update of board a was being pulled when the board went away, and has come again.

    Attributes:
        first: What the board announced before it went.
        answers: What the server says when the board announces itself, usually on a new connection.
    """

    def __init__(self, shell: coordinator_shell.Shell, *, reconnects: bool = True) -> None:
        self.shell = shell
        shell.arrive()
        self.first = next(self._announcements())
        shell.feed(self.first)
        session = shell.state.devices["a"].session
        shell.inbox = [e for e in shell.inbox if not isinstance(e, on.UpdateStored)]  # its upload ends with it
        shell.feed(on.DeviceDied("a", session))
        self.answers = shell.coordinator.handle(BIRTH if reconnects else replace(BIRTH, session=session), shell.now)

    def _announcements(self) -> Iterator[on.UpdateAnnounced]:
        while True:
            event = self.shell.inbox.pop(0)
            if isinstance(event, on.UpdateAnnounced) and event.device == "a":
                yield event
            else:
                self.shell.feed(event)

    @property
    def offers_blob(self) -> list[do.SendOffer]:
        return [c for c in self.answers if isinstance(c, do.SendOffer)]

    @property
    def task(self) -> DeviceTask:
        return self.shell.state.tasks["a"]

    def announce(self, update: on.UpdateAnnounced) -> list[do.Command]:
        """What follows from an announcement; what it leads to waits."""
        return self.shell.coordinator.handle(update, self.shell.now)

    def store(self, update: on.UpdateAnnounced) -> list[do.Command]:
        return self.shell.feed(on.UpdateStored("a", update.round, update.attempt, str(update.weights["sha256"])))


@pytest.fixture(params=["synchronous", "asynchronous"])
def shell(request: pytest.FixtureRequest) -> coordinator_shell.Shell:
    return synchronous_shell.Shell(JOB) if request.param == "synchronous" else asynchronous_shell.Shell()


@pytest.fixture
def board_return(shell: coordinator_shell.Shell) -> BoardReturn:
    return BoardReturn(shell)


def pull_of(update: on.UpdateAnnounced) -> do.PullUpdate:
    return do.PullUpdate(update.device, update.round, update.attempt, update.weights)


def folds(commands: list[do.Command]) -> list[str | None]:
    return [c.contribution.weights for c in commands if isinstance(c, do.FoldUpdate)]


def test_a_board_that_comes_again_is_offered_its_round_once_more(board_return: BoardReturn) -> None:
    assert [(o.device, o.round, o.attempt, o.offer, o.was_announced) for o in board_return.offers_blob] == [
        ("a", board_return.first.round, board_return.first.attempt, board_return.task.offer, True)
    ]
    assert board_return.task.progress is Progress.PULLING


def test_a_board_that_stayed_connected_is_only_asked_for_the_update_that_it_announced(
    shell: coordinator_shell.Shell,
) -> None:
    """The server took it for gone, and its pull may have ended."""
    board_return = BoardReturn(shell, reconnects=False)
    assert pull_of(board_return.first) in board_return.answers
    assert not board_return.offers_blob
    assert folds(board_return.store(board_return.first)) == [board_return.first.weights["sha256"]]


def test_what_a_board_trains_once_more_replaces_what_it_has_lost(board_return: BoardReturn) -> None:
    second = replace(board_return.first, weights={"sha256": "second"}, steps=1)
    assert pull_of(second) in board_return.announce(second)
    assert folds(board_return.store(board_return.first)) == []
    assert folds(board_return.store(second)) == ["second"]
    assert board_return.task.steps == 1


def test_the_first_update_counts_where_it_has_arrived_all_the_same(board_return: BoardReturn) -> None:
    second = replace(board_return.first, weights={"sha256": "second"})
    assert folds(board_return.store(board_return.first)) == [board_return.first.weights["sha256"]]
    assert [type(c) for c in board_return.announce(second) if getattr(c, "device", "") == "a"] == [do.Cancel]
    assert board_return.task.weights == board_return.first.weights["sha256"]
    assert any(isinstance(c, do.Acknowledge) for c in board_return.announce(board_return.first))
