import itertools
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.secure_aggregation.session import SecureSumSession

pytestmark = pytest.mark.board


def member_names(count: int) -> tuple[str, ...]:
    return tuple(f"b{i}" for i in range(count))


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 1000))
@settings(deadline=None)
def test_neighbours_are_mutual_and_as_many_as_the_degree(count: int, half: int, seed: int) -> None:
    session = SecureSumSession(b"x", 2 * half, half + 1, 1, 0)
    if count <= session.threshold:
        with pytest.raises(ProtocolError, match=f"expected more than {session.threshold}, got {count}"):
            session.neighbours(member_names(count), Random(seed))
        return
    graph = session.neighbours(member_names(count), Random(seed))
    assert set(graph) == set(member_names(count))
    for name, around in graph.items():
        assert len(around) == min(2 * half, count - 1)
        assert list(around) == sorted(set(around) - {name})
        assert all(name in graph[neighbour] for neighbour in around)


def test_the_graph_stays_connected_until_as_many_boards_as_its_degree_are_removed() -> None:
    """All sets of removed boards, of a circle of 9 with 4 neighbours each."""
    graph = SecureSumSession(b"x", 4, 3, 1, 0).neighbours(member_names(9), Random(1))
    for removed in itertools.combinations(graph, 3):
        assert _connected(graph, set(graph) - set(removed))
    assert not all(_connected(graph, set(graph) - set(removed)) for removed in itertools.combinations(graph, 4))


def _connected(graph: dict[str, tuple[str, ...]], left: set[str]) -> bool:
    reached, waiting = set(), [min(left)]
    while waiting:
        board = waiting.pop()
        reached.add(board)
        waiting += [n for n in graph[board] if n in left and n not in reached]
    return reached == left


def test_a_chosen_degree_grows_slowly_and_holds_what_it_promises() -> None:
    degrees = [SecureSumSession.choose(b"x", boards, 1, 0).degree for boards in (100, 1000, 10_000)]
    assert degrees == sorted(degrees)
    assert degrees[2] < 4 * degrees[0]
    session, random = SecureSumSession.choose(b"x", 100, 1, 0), Random(3)
    for _ in range(200):
        graph = session.neighbours(member_names(100), random)
        absent = set(random.sample(member_names(100), 20))
        assert all(len(set(around) - absent) >= session.threshold for around in graph.values())


def test_no_degree_is_enough_where_half_may_drop_out() -> None:
    with pytest.raises(ConfigError, match="50 may drop out"):
        SecureSumSession.choose(b"x", 100, 1, 0, dropping=0.5)
    with pytest.raises(ConfigError, match="collude"):
        SecureSumSession.choose(b"x", 100, 1, 0, colluding=0.6)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"context": b""}, "bytes of the context"),
        ({"degree": 5}, "an even number"),
        ({"threshold": 2}, "threshold.*from 3 to 4"),
        ({"narrow": -1}, "narrow numbers"),
        ({"wide": True}, "wide numbers"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], problem: str) -> None:
    good = {"context": b"x", "degree": 4, "threshold": 3, "narrow": 1, "wide": 1}
    SecureSumSession(**good)
    with pytest.raises(ProtocolError, match=problem):
        SecureSumSession(**{**good, **change})


def test_any_other_setting_is_another_session() -> None:
    first = SecureSumSession(b"x", 4, 3, 1, 1)
    variants = [(b"y", 4, 3, 1, 1), (b"x", 6, 4, 1, 1), (b"x", 4, 4, 1, 1), (b"x", 4, 3, 2, 1), (b"x", 4, 3, 1, 2)]
    assert len({first.digest, *(SecureSumSession(*variant).digest for variant in variants)}) == 6
