"""Members' keys in a few bytes each are what a dictionary would be."""

from __future__ import annotations

import gc
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from fedprune_server.enrollment.member_keys import MemberKeys

NAMES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=6)
MEMBERS = st.dictionaries(NAMES, st.binary(max_size=3).map(bytes.hex), max_size=12)


@given(MEMBERS, MEMBERS, st.lists(NAMES))
def test_they_are_a_mapping(members: dict[str, str], others: dict[str, str], names: list[str]) -> None:
    found, other = MemberKeys(members.items()), MemberKeys(others.items())
    assert (dict(found), len(found), list(found)) == (members, len(members), list(members))
    for name in [*names, *others, *members]:
        assert (name in found) is (name in members)
        assert found.get(name) == members.get(name)
    assert found.lacking(other) == [n for n in members if others.get(n) != members[n]]
    assert found.lacking(found) == []


def test_a_member_takes_70_bytes() -> None:
    """A name of 11 characters, a key of 32 bytes; with a dictionary it is 220, and 300 with a set of the names."""
    gc.collect()
    tracemalloc.start()
    try:
        found = MemberKeys((f"board-{i:05}", f"{i:064x}") for i in range(20_000))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 20_000
    assert 44 < size / 20_000 < 75
