"""A packed object is the one that was packed, and takes little memory."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import Device, State

pytestmark = pytest.mark.board

NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
VALUES = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(), st.lists, max_leaves=5)
BODIES = st.dictionaries(st.text(max_size=5), VALUES, max_size=5)


@given(BODIES, BODIES)
def test_it_is_what_was_packed(body: dict[str, Any], other: dict[str, Any]) -> None:
    packed = PackedJson(body)
    assert dict(packed) == body
    assert packed == body
    assert body == packed
    assert len(packed) == len(body)
    same = json.dumps(body, sort_keys=True) == json.dumps(other, sort_keys=True)  # 0 and 0.0 differ
    assert (packed == PackedJson(other)) == same
    assert {packed: 1}[PackedJson(dict(reversed(body.items())))] == 1
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # noqa: S301
        assert again == packed


def test_a_device_packs_its_plan_and_its_probe() -> None:
    plan = {"widths": [1, 2], "limits": [{"name": f"limit {i}", "value": i / 7} for i in range(20)]}
    state = State(model="m")
    state.devices["a"] = Device(1, True, {"name": "x"}, {"train_rate": 1e9}, 10, plan=plan)
    device = state.devices["a"]
    assert device.plan == plan
    assert isinstance(device.plan, PackedJson)
    assert isinstance(device.probe, PackedJson)
    assert len(device.plan.raw) < 600
    assert device.to_dict()["plan"] == plan
    assert type(device.to_dict()["probe"]) is dict
    again = State.from_json(state.to_json())
    assert again.devices["a"] == device
    assert again.to_json() == state.to_json()


def test_devices_of_one_kind_share_their_profile_after_a_start() -> None:
    kinds = {"a": {"name": "pi", "cores": 4}, "b": {"name": "pi", "cores": 4}, "c": {"name": "pi", "cores": 2}}
    state = State(model="m")
    for name, profile in kinds.items():
        state.devices[name] = Device(1, True, profile, None, 5)
    again = State.from_json(state.to_json())
    assert again == state
    assert again.devices["a"].profile is again.devices["b"].profile
