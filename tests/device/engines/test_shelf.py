from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_device import durable
from fedprune_device.engines.shelf import Record, Shelf

pytestmark = pytest.mark.board

SECONDS = st.none() | st.floats(0, sys.float_info.max)


@settings(max_examples=30)
@given(st.builds(Record, st.just("k"), SECONDS, SECONDS, st.booleans(), st.integers(0, 1000), st.text()))
def test_what_is_kept_is_known(record: Record) -> None:
    with tempfile.TemporaryDirectory() as root:
        Shelf(Path(root)).keep(record)
        assert Shelf(Path(root)).record("k") == record
        assert Shelf(Path(root)).record("other") == Record("other")


@pytest.mark.parametrize(
    "body",
    [
        *({"failures": value} for value in ("2", 1.5, True, -1, 10**400, math.nan, None)),
        *({name: value} for name in ("refit_s", "rebuild_s") for value in ("1", -1, True, math.nan, math.inf)),
        {"refits": 0},
        {"refits": None},
        {"reason": None},
        {"reason": 3},
        {"more": 1},
    ],
)
def test_a_record_of_other_types_is_not_known(tmp_path: Path, body: dict[str, Any]) -> None:
    durable.write_document(tmp_path / "record.json", {"key": "k", **body})
    assert Shelf(tmp_path).record("k") == Record("k")


@pytest.mark.parametrize("body", [{}, [], ["key"], "key", 1])
def test_what_is_no_record_is_not_known(tmp_path: Path, body: Any) -> None:
    durable.write_document(tmp_path / "record.json", body)
    assert Shelf(tmp_path).record("k") == Record("k")
