import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune.runtime.tensorrt_config import ENGINE_PLAN_FORMAT, MAX_BATCH, TOLERANCES, EnginePlan

pytestmark = pytest.mark.board

PLANS = st.builds(
    EnginePlan,
    graph=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,59}\.onnx", fullmatch=True),
    precision=st.sampled_from(sorted(TOLERANCES)),
    batch=st.lists(st.integers(1, MAX_BATCH), min_size=3, max_size=3).map(lambda n: tuple(sorted(n))),
    pool_bytes=st.integers(2**20, 2**36),
    timeout_s=st.floats(1, 86_400),
    level=st.integers(0, 5),
    refit=st.booleans(),
)


@given(PLANS)
def test_a_plan_reads_back(plan: EnginePlan) -> None:
    assert EnginePlan.from_json(plan.to_json().encode()) == plan


@given(PLANS, PLANS)
def test_plans_that_differ_have_other_digests(first: EnginePlan, second: EnginePlan) -> None:
    assert (first.digest == second.digest) == (first == second)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("graph", "../inference.onnx"),
        ("graph", 3),
        ("batch", [1, 2]),
        ("batch", [0, 1, 2]),
        ("batch", [1, 1, MAX_BATCH + 1]),
        ("script", "print()"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    raw = json.dumps({"format": ENGINE_PLAN_FORMAT, field: value}).encode()
    with pytest.raises(ConfigError, match=rf"plan\.json: .*{field}"):
        EnginePlan.from_json(raw, "plan.json")
