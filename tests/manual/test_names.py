"""The check of names counts what says nothing to a reader, and names each place where a limit is broken."""

from pathlib import Path

import pytest

from support.names import Limits, NameCounts, breaches, count_names

ENGINE = """
class Plan:
    @property
    def settled(self): ...
    def moved(self): ...
    async def _told_again(self): ...
    def held(self) -> bool: ...
    def need(self, whole, *, parts=()): ...

# Because a broker closes idle connections after a minute.
def found(value):
    _whole = [own for own in value]  # noqa: C416
    return _whole
"""

WIRE = """
class Plan: ...
def _hidden(): ...
def send(chunk): ...
"""

NO_LIMIT = Limits(100, 1000)


@pytest.fixture
def counts(tmp_path: Path) -> NameCounts:
    for name, text in {"engine/plan.py": ENGINE, "wire/plan.py": WIRE, "wire/note.txt": "found = 1"}.items():
        path = tmp_path / "server" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return count_names(tmp_path, ["server"])


def test_it_counts_functions_variables_names_and_comments(counts: NameCounts) -> None:
    assert counts.functions == 8
    assert [p.split()[-1] for p in counts.participles] == ["found", "moved", "_hidden"]
    assert sorted(p.split()[-1] for p in counts.fillers) == ["_whole", "own", "parts", "whole"]
    assert counts.shared_names == {"Plan": [Path("server/engine/plan.py"), Path("server/wire/plan.py")]}
    assert counts.comments.total() == 1
    assert counts.lines == ENGINE.count("\n") + WIRE.count("\n")


@pytest.mark.parametrize(
    ("limits", "places"),
    [
        (Limits(30, 1000), ["server/engine/plan.py:11:", "server/engine/plan.py:5:", "server/wire/plan.py:3:"]),
        (Limits(100, 100), ["server/engine/plan.py:8:", "server/engine/plan.py:12:"]),
        (Limits(100, 1000, shared_names=0), ["Plan: server/engine/plan.py, server/wire/plan.py"]),
        (Limits(100, 1000, min_comments_per_1000=100), ["server/wire/plan.py: 0 in 4 lines"]),
    ],
    ids=["participles", "fillers", "shared names", "comments"],
)
def test_a_broken_limit_is_named_with_its_places(counts: NameCounts, limits: Limits, places: list[str]) -> None:
    lines = list(breaches("the server", counts, limits))
    assert lines[0].startswith("the server:")
    assert all(any(line.strip().startswith(place) for line in lines[2:]) for place in places), lines


def test_a_tree_within_its_limits_is_silent(counts: NameCounts) -> None:
    assert not list(breaches("the server", counts, NO_LIMIT))
    assert not list(breaches("the server", counts, Limits(37.5, 300, shared_names=1, min_comments_per_1000=10)))
