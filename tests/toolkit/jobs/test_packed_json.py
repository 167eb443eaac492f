"""A packed object is the one that was packed, and takes little memory."""

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.packed_json import PackedJson

pytestmark = pytest.mark.board

NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
VALUES = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(), st.lists, max_leaves=5)
BODIES = st.dictionaries(st.text(max_size=5), VALUES, max_size=5)


@given(BODIES, BODIES)
def test_it_is_what_was_packed(body: dict[str, Any], second_body: dict[str, Any]) -> None:
    packed = PackedJson(body)
    assert dict(packed) == body
    assert packed == body
    assert body == packed
    assert len(packed) == len(body)
    same = json.dumps(body, sort_keys=True) == json.dumps(second_body, sort_keys=True)  # 0 and 0.0 differ
    assert (packed == PackedJson(second_body)) == same
    assert {packed: 1}[PackedJson(dict(reversed(body.items())))] == 1
    for duplicate in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # noqa: S301
        assert duplicate == packed
