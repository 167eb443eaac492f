"""Checks of settings: what passes comes back as it is, what doesn't is named, and no message gets long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import validation
from fedprune.core.errors import ConfigError

pytestmark = pytest.mark.board


@given(st.integers(-10, 10) | st.floats(-10, 10, allow_nan=False), st.booleans(), st.booleans())
def test_numbers_pass_where_they_are_in_range(value: float, above: bool, below: bool) -> None:
    low, high = -3, 4.5
    fits = low <= value <= high and not (above and value == low) and not (below and value == high)
    if fits:
        number = validation.check_number("a", value, low, high, above=above, below=below)
        assert number == value
        assert type(number) is float
    else:
        with pytest.raises(ConfigError, match=r"^a: expected a number "):
            validation.check_number("a", value, low, high, above=above, below=below)
