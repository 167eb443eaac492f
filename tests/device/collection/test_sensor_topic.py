from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, DataError
from fedprune_device.client import Board, BoardError
from fedprune_device.collection.collector import Collector
from fedprune_device.collection.sensor_topic import SensorOptions, SensorTopic
from fedprune_device.collection.windows import MESSAGE_BYTES, Message, Windows, label_of
from support.fakes.local_board import LocalBoard

pytestmark = pytest.mark.board

TOPIC, LABELS = "hall/motor", "hall/state"


@pytest.mark.parametrize(
    ("payload", "kind", "channels", "rows"),
    [
        (b"21.5", "json", None, [[21.5]]),
        (b"[1, 2, 3]", "json", None, [[1, 2, 3]]),
        (b"[1, 2, 3, 4]", "json", 2, [[1, 2], [3, 4]]),
        (b"[[1, 2], [3, 4]]", "json", None, [[1, 2], [3, 4]]),
        (b'{"x": [1, 2], "unit": "g"}', "json", None, [[1, 2]]),
        (np.array([1.5, 2], "<f4").tobytes(), "float32", None, [[1.5, 2]]),
        (np.array([1.5, 2], "<f4").tobytes(), "float32", 1, [[1.5], [2]]),
        (np.array([-32768, 16384], "<i2").tobytes(), "int16", None, [[-1, 0.5]]),
    ],
)
def test_a_message_is_rows(payload: bytes, kind: str, channels: int | None, rows: list[list[float]]) -> None:
    found = Message.parse(payload, kind, channels)
    assert found.rows.tolist() == rows
    assert found.label is None


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"", "json"), (b"bee", "json"), (b"[]", "json"), (b"[[1], [1, 2]]", "json"), (b"[[[1]]]", "json"),
        (b'["a"]', "json"), (b"[true]", "json"), (b"[NaN]", "json"), (b"[1e400]", "json"), (b"{}", "json"),
        (b"[1e39]", "json"), (b"[" * 100_000, "json"), (b"[1]" + b" " * MESSAGE_BYTES, "json"),
        (b"[" + b"9" * 400 + b"]", "json"), (b'{"x": [1], "label": 1.5}', "json"), (b'{"x": [1], "label": ""}', "json"),
        (b"", "float32"), (b"123", "float32"), (np.array([np.inf], "<f4").tobytes(), "float32"), (b"1", "int16"),
    ],
)  # fmt: skip
def test_a_malformed_message_is_refused(payload: bytes, kind: str) -> None:
    with pytest.raises(DataError):
        Message.parse(payload, kind)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(1, 9), st.booleans())
def test_windows_are_the_rows_in_order_of_arrival(sizes: list[int], steps: int, first: bool) -> None:
    rows = np.arange(2 * sum(sizes), dtype=np.float32).reshape(-1, 2)
    shape = (2, steps) if first else (steps, 2)
    windows, found, at = Windows(), [], 0
    for size in sizes:
        found += [w.x for w in windows.add(Message(rows[at : at + size]), shape, 0.0)]
        at += size
    whole = len(rows) // steps * steps
    wanted = rows[:whole].reshape(-1, steps, 2)
    assert len(found) == len(wanted)
    for x, want in zip(found, wanted, strict=True):
        assert x.shape == shape
        assert (x == (want.T if first or steps == 2 else want)).all()


def test_no_window_spans_a_gap_or_another_number_of_channels() -> None:
    windows, one = Windows(), Message(np.ones((2, 1), np.float32))
    assert not list(windows.add(one, (3,), 0.0))
    windows.clear()
    assert not list(windows.add(one, (3,), 1.0))
    (found,) = windows.add(one, (3,), 2.0)
    assert (found.begin, found.end) == (1.0, 2.0)
    with pytest.raises(DataError):
        list(windows.add(one, (2, 3), 0.0))
    assert len(list(windows.add(Message(np.ones((1, 3), np.float32)), (3,), 0.0))) == 1


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [(b"2", (2, None)), (b'"bee"', ("bee", None)), (b"bee\n", ("bee", None)), (b'{"label": 1, "time": 5}', (1, 5))],
)
def test_a_label_is_a_number_or_a_name(payload: bytes, wanted: tuple[object, object]) -> None:
    assert label_of(payload) == wanted


@pytest.mark.parametrize("payload", [b"", b"1.5", b"[1]", b"{}", b'{"label": 1, "time": "now"}', b"a" * 300, b"\0"])
def test_a_message_that_is_no_label_is_refused(payload: bytes) -> None:
    with pytest.raises(DataError):
        label_of(payload)


def sensor(board: Board, clock: Callable[[], float], every: float = 0.0, **options: Any) -> SensorTopic:
    collector = Collector(board, every, clock)
    return SensorTopic(f"mqtt://localhost/{TOPIC}", SensorOptions(label_topic=LABELS, **options), collector)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("mqtt://localhost", {}), ("mqtt://localhost/a/+/b", {}), ("mqtt://localhost/#", {}), ("mqtt://:1/a", {}),
        ("mqtt://localhost/a", {"label_topic": "a"}), ("mqtt://192.168.1.9/a", {}),
    ],
)  # fmt: skip
def test_an_address_that_makes_no_sense_is_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SensorTopic(url, SensorOptions(**options), Collector(Board("unix:/none")))


def test_windows_are_labelled_by_their_message_the_newest_label_or_the_time(served: LocalBoard) -> None:
    topic = sensor(served.board, lambda: 0.0)
    for number in range(4):
        label = {"label": "cat"} if number == 0 else {}
        topic.take(TOPIC, json.dumps({"x": [number] * 6, **label}).encode(), 100.0 + number)
    topic.take(LABELS, b"bee", 110.0)
    topic.take(LABELS, b'{"label": 0, "time": 101}', 111.0)
    topic.take(LABELS, b'{"label": 0, "time": 50}', 112.0)
    counts = served.board.samples()
    assert {row["name"]: row["kept"] for row in counts["classes"].values()} == {"ant": 1, "bee": 1, "cat": 1}
    assert counts["unlabelled"] == 1
    assert topic._collector.counts == {"kept": 4, "labelled": 2, "label left out": 1}
    assert np.load(io.BytesIO(served.board.sample(served.board.unlabelled()[0])))[0] == 2


def test_a_malformed_message_is_skipped_with_one_line_a_minute(
    served: LocalBoard, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    topic = sensor(served.board, lambda: now[0], channels=1)
    topic.take(TOPIC, b"[1, 2, 3]", 0.0)
    for second in range(119):
        now[0] = float(second)
        topic.take(TOPIC, b"[1, 2", float(second))
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2
    assert "a message isn't JSON" in lines[0]
    assert "60 such" in lines[1]
    topic.take(TOPIC, b"[4, 5, 6]", 0.0)  # the rows before the gap are dropped
    topic.take(TOPIC, b"[7, 8, 9]", 0.0)
    assert topic._collector.counts == {"malformed messages": 119, "kept": 1}
    assert served.samples is not None
    assert served.samples.read(served.board.unlabelled()[0]).tolist() == [4, 5, 6, 7, 8, 9]


def test_a_flood_is_bounded_by_the_pace_and_the_boards_room(served: LocalBoard) -> None:
    now = [0.0]
    topic = sensor(served.board, lambda: now[0], every=1.0)
    for number in range(3000):
        now[0] = number / 100
        topic.take(TOPIC, json.dumps([number] * 6).encode(), now[0])
    counts = topic._collector.counts
    assert counts["kept"] == 30
    assert counts["passed over"] == 2970
    assert served.board.samples()["unlabelled"] == 25  # a quarter of a hundred
    assert served.board.samples()["unlabelled_dropped"] == 5


def test_a_board_that_restarts_or_has_no_model_yet_costs_samples_only(local: LocalBoard) -> None:
    now = [0.0]
    topic = sensor(local.board, lambda: now[0])
    topic.take(TOPIC, b"[1, 2, 3, 4, 5, 6]", 0.0)
    counts = topic._collector.counts
    assert counts == {"not stored": 1, "messages before a model": 1}
    with local.serving():
        now[0] += 10
        topic.take(TOPIC, b"[1, 2, 3, 4, 5, 6]", 0.0)
        assert counts["messages before a model"] == 2
        local.install(1)
        local.model.look()
        now[0] += 10
        topic.take(TOPIC, b"[1, 2, 3, 4, 5, 6]", 0.0)
        assert counts["kept"] == 1
    topic.take(TOPIC, b"[2, 2, 3, 4, 5, 6]", 0.0)
    assert counts["not stored"] == 2


def test_a_board_that_takes_no_samples_ends_the_source(local: LocalBoard) -> None:
    local.install(1)
    with local.serving(takes=False), pytest.raises(ConfigError, match="takes no samples"):
        sensor(local.board, lambda: 0.0).take(TOPIC, b"[1, 2, 3, 4, 5, 6]", 0.0)


def test_a_label_that_the_board_refuses_is_counted(served: LocalBoard) -> None:
    topic = sensor(served.board, lambda: 0.0)
    topic.take(TOPIC, b"[1, 2, 3, 4, 5, 6]", 0.0)
    topic.take(LABELS, b"dog", 0.0)
    topic.take(TOPIC, b'{"x": [1, 2, 3, 4, 5, 7], "label": "dog"}', 0.0)
    assert topic._collector.counts == {"kept": 1, "label left out": 1, "left out": 1}
    with pytest.raises(BoardError):
        served.board.label("0" * 32, "bee")
