"""Rounds that ask more devices than they need: they close with enough, and the slow ones have their day."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fedprune.coordination import events as on
from fedprune.coordination.stragglers import ENOUGH_UPDATES, MAX_MISSED_ROUNDS
from support.fakes.timed_shell import Board, Timed, announced_shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


def fleet(count: int, slow: int = 0) -> dict[str, Board]:
    """Boards d0, d1 ... of which the first are slow."""
    return {f"d{i}": Board(seconds=60.0 + i if i < slow else 10.0 - i / 100) for i in range(count)}


def shell_of(boards: dict[str, Board], **settings: object) -> Timed:
    values = {"devices": len(boards), "rounds": 6, "participation": 0.5, "over_selection": 0.4, **settings}
    return announced_shell(replace(JOB, **values), boards)  # type: ignore[arg-type]


def test_more_are_asked_and_the_round_closes_with_enough() -> None:
    shell = shell_of(fleet(10, slow=3))
    shell.run(rounds=1)
    asked = {n for _, n, _ in shell.offered}
    assert len(asked) == 7
    counted = shell.counted_devices()[0]
    assert len(counted) == 5
    # The five that were quickest: the slow ones that were asked were not among them.
    assert set(counted) == set(sorted(asked, key=lambda n: shell.boards[n].seconds)[:5])
    assert shell.reasons(1) == dict.fromkeys(asked - set(counted), ENOUGH_UPDATES)
    assert sorted(n for n, r, why in shell.cancellations if why == ENOUGH_UPDATES) == sorted(asked - set(counted))
    assert shell.now < 60


@pytest.mark.parametrize(("seconds", "counts_in"), [(60.0, [4, 8, 12]), (1000.0, [])])
def test_who_is_let_go_again_and_again_is_waited_for_up_to_the_deadline(seconds: float, counts_in: list[int]) -> None:
    shell = shell_of({**fleet(4), "d0": Board(seconds)}, rounds=12, participation=0.75, over_selection=0.4)
    shell.run()
    assert [i for i, c in enumerate(shell.counted_devices(), 1) if "d0" in c] == counts_in
    ends = [0.0, *(summary["at"] for summary in shell.state.history)]
    long_rounds = [i for i, (begin, end) in enumerate(pairwise(ends), 1) if end - begin > 50]
    assert long_rounds == [4, 8, 12]  # cut, cut, cut, waited for
    assert MAX_MISSED_ROUNDS == 3


def test_an_update_on_the_disk_counts_though_enough_are_in() -> None:
    shell = shell_of(fleet(4), participation=0.5, over_selection=1.0)
    while shell.inbox:
        shell.step()
    for _, _, event in [late for late in sorted(shell.later) if isinstance(late[2], on.UpdateAnnounced)][:3]:
        shell.feed(event)
    stored, shell.inbox = shell.inbox, []
    for event in stored:  # all three before the first is checked
        shell.feed(event)
    shell.run(rounds=1)
    assert len(shell.counted_devices()[0]) == 3
