"""The benchmark `benchmarks/regions` with 120 boards: two aggregators' models are those of one server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.paths import ROOT
from support.processes.machine import find_mosquitto

# At every push `test_aggregators.py` compares models of aggregators with those of one server, also with a bucket.
pytestmark = [pytest.mark.soak, pytest.mark.system, pytest.mark.mosquitto, pytest.mark.soak]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    find_mosquitto()
    pytest.importorskip("moto")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks.regions import run

        size = run.Size(120, turns=3, rounds=2, participation=0.5, arrivals=200, moto=True, limit_s=60)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
            patch.setenv(name, "")  # `measure` sets them, and what it sets ends with this test
        yield run.measure(size, tmp_path_factory.mktemp("regions"))


def test_two_aggregators_make_the_models_of_one_server(found: dict[str, Any]) -> None:
    assert found["audit"]["faults"] == []
    assert [r["counted"] for r in found["audit"]["rounds"]] == [20, 20]
    assert len(set(found["models"])) == 2
    assert found["models"] == found["one_server"]


def test_every_board_connected_and_every_update_was_put_into_the_bucket(found: dict[str, Any]) -> None:
    assert found["members"] == dict.fromkeys(("north", "south"), 120 + 2)
    assert found["uploads"]["failed"] == 0
    assert found["uploads"]["bytes"] > 40 * 100_000
    assert [p["phase"] for p in found["phases"][1::3]] == ["round", "no round", "round"]
