import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.wire.fleet_messages import Reconnect
from fedprune.wire.messages import Birth, BoardWarning, parse_message
from fedprune_device.agent.births import BIRTH_INTERVAL_S, WARNINGS_INTERVAL_S, BirthBuilder
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore
from fedprune_device.network.connection import ANSWER_TIMEOUT_S, SLOW_ANSWER_S, BoardConnection, MessageChannel
from support.fakes.inbox import Inbox

pytestmark = pytest.mark.board


def births(profile: str, engine: Callable[[], str] = lambda: "", **options: Any) -> BirthBuilder:
    data: Any = SimpleNamespace(samples=3)
    link: Any = None
    return BirthBuilder(BoardConnection(link, MessageChannel("d", "site")), data, profile, None, engine, **options)


def test_the_server_hears_what_predicts_and_when_that_changes() -> None:
    status = ["onnxruntime (an engine is being made)"]
    greeting = births("jetson-thor", lambda: status[0])
    assert greeting.build(1, None, 0.0).software.endswith("predicts with onnxruntime (an engine is being made)")
    assert not greeting.is_outdated(BIRTH_INTERVAL_S)
    status[0] = "TensorRT 10.3.0, float32"
    assert not greeting.is_outdated(BIRTH_INTERVAL_S - 1)
    assert greeting.is_outdated(BIRTH_INTERVAL_S)
    greeting.build(1, None, BIRTH_INTERVAL_S)
    assert not greeting.is_outdated(3 * BIRTH_INTERVAL_S)


def test_an_idle_board_s_births_load_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # an import would fail
    assert "onnxruntime 1.23.2, Python" in births("jetson-thor", runtime="1.23.2").build(1, None, 0.0).software


def test_new_warnings_are_in_a_later_birth_and_repeated_ones_cause_none() -> None:
    warnings: list[BoardWarning] = [{"at": 1, "text": "hot"}]
    greeting = births("raspberry-pi-5", warnings=lambda: tuple(warnings))
    assert [w["text"] for w in greeting.build(1, None, 0.0).warnings] == ["hot"]
    warnings[0] = {"at": 2, "text": "hot"}
    assert not greeting.is_outdated(WARNINGS_INTERVAL_S)
    warnings.append({"at": 3, "text": "the disk is full"})
    assert [greeting.is_outdated(WARNINGS_INTERVAL_S + late) for late in (-1, 0)] == [False, True]


@pytest.mark.parametrize(
    ("samples", "answered", "reasons"),
    [
        (0, True, ["no samples to train on"]),
        (0, False, ["no samples to train on"]),
        (3, True, []),
        (3, False, ["slow", "the broker drops"]),
    ],
)
def test_a_board_that_gets_no_answer_says_why_that_may_be(
    caplog: pytest.LogCaptureFixture, samples: int, answered: bool, reasons: list[str]
) -> None:
    """A slow server comes before a broken broker, and nothing that destroys an identity follows from silence."""
    caplog.set_level(logging.INFO, "fedprune.device")
    link: Any = Inbox()
    now = [0.0]
    connection = BoardConnection(link, MessageChannel("d", "site"), lambda: now[0])
    connection.send(Birth("d", 1, "raspberry-pi-5", samples, "fedprune"))
    if answered:
        link.waiting.append((connection.topics.down("d"), Reconnect(0.0).to_bytes()))
    for now[0] in (1.0, SLOW_ANSWER_S, ANSWER_TIMEOUT_S, 3 * ANSWER_TIMEOUT_S):
        connection.receive()
    lines = [record.getMessage() for record in caplog.records]
    assert [reason in line for reason, line in zip(reasons, lines, strict=True)] == [True] * len(reasons)
    assert not any("new-key" in line or "revoked" in line for line in lines)


@pytest.mark.parametrize(("has_record", "expected"), [(True, "slot b with release 12"), (False, "slot b")])
def test_a_board_with_a_launcher_says_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_record: bool, expected: str
) -> None:
    (tmp_path / "state").mkdir()
    if has_record:
        SlotStore(tmp_path).write_record("b", SlotRecord(12, "0.2.0", "m:f", {}))
    monkeypatch.setenv("FEDPRUNE_ROOT", str(tmp_path))
    monkeypatch.setenv("FEDPRUNE_SLOT", "b")
    birth = births("jetson-thor", lambda: "x" * 500).build(1, None, 0.0)
    assert f", {expected}, predicts with x" in birth.software
    assert isinstance(parse_message(birth.to_bytes()), Birth)
