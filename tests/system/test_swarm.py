"""The benchmark `benchmarks/swarm` with sixty devices: nothing is lost or counted twice, and it would notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.swarm import audit, run
from support.processes.machine import find_mosquitto

pytestmark = [pytest.mark.soak, pytest.mark.system, pytest.mark.mosquitto]

DEVICES, ROUNDS = 60, 2


@pytest.fixture(scope="module", params=[False, True], ids=["unsigned", "signed"])
def swarm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, Path, dict[str, Any]]:
    """The benchmark's modules, the folder of a run, and what it found."""
    find_mosquitto()
    folder = tmp_path_factory.mktemp("swarm")
    return audit, run, folder, run.measure(run.Size(DEVICES, ROUNDS, limit_s=120, signed=request.param), folder)


def test_a_swarm_s_updates_all_count_once(swarm: tuple[Any, Any, Path, dict[str, Any]]) -> None:
    *_, found = swarm
    assert found["audit"]["faults"] == []
    assert [r["counted"] for r in found["audit"]["rounds"]] == [DEVICES] * ROUNDS
    assert [r["accepted"] for r in found["rounds"]] == [DEVICES] * ROUNDS
    assert found["audit"]["events"]["UpdateStored"] == DEVICES * ROUNDS
    assert found["rounds"][0]["latency"]["call off"]["count"] > 0
    assert found["rounds"][0]["unanswered"] == 0
    assert found["rejected_messages"] == 0


def test_its_audit_would_notice(swarm: tuple[Any, Any, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    audit, run, folder, _ = swarm
    ledger, mean = run.ledger_of(folder), audit.mean

    def faults(expected: Callable[..., Any] = mean, **rows: Any) -> str:
        monkeypatch.setattr(audit, "mean", expected)
        return "\n".join(audit.audit(folder, ledger | rows, ROUNDS, 0)["faults"])

    name = "board-00007"
    part = ledger[name]["parts"]["2"]
    assert faults() == ""
    assert "counts" in faults(lambda w, parts, r, s: mean(w, parts[:-1], r, s))  # one too many in the model
    assert "counts" in faults(lambda w, parts, r, s: mean(w, [*parts, parts[7]], r, s))  # one lost
    assert "1 count unaccepted" in faults(**{name: _with(ledger[name], {**part, "accepted": []})})
    assert "not those of the log" in faults(**{name: _with(ledger[name], {**part, "weights": "0" * 64})})
    assert "knows 60 devices, 60 of the fleet's 61" in faults(**{"board-00060": ledger[name]})


def _with(row: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return {**row, "parts": {**row["parts"], "2": part}}
