"""Checks of settings: what passes comes back as it is, what doesn't is named, and no message gets long."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.validation import restored

pytestmark = pytest.mark.board


@given(st.integers(-10, 10) | st.floats(-10, 10, allow_nan=False), st.booleans(), st.booleans())
def test_numbers_pass_where_they_are_in_range(value: float, above: bool, below: bool) -> None:
    low, high = -3, 4.5
    fits = low <= value <= high and not (above and value == low) and not (below and value == high)
    if fits:
        found = validation.number("a", value, low, high, above=above, below=below)
        assert found == value
        assert type(found) is float
    else:
        with pytest.raises(ConfigError, match=r"^a: expected a number "):
            validation.number("a", value, low, high, above=above, below=below)


@dataclass(frozen=True)
class Inner:
    name: str
    share: float | None


@dataclass(frozen=True)
class Outer:
    count: int
    inner: tuple[Inner, ...]
    more: Inner | None = None


@given(st.integers(-(2**63) + 1, 2**63 - 1), st.lists(st.builds(Inner, st.text(), st.none() | st.floats(-1e9, 1e9))))
def test_a_dataclass_is_restored_from_its_json(count: int, inner: list[Inner]) -> None:
    for whole in (Outer(count, tuple(inner)), Outer(count, (), inner[0] if inner else None)):
        assert restored(Outer, json.loads(json.dumps(asdict(whole))) | {"newer": 1}) == whole
