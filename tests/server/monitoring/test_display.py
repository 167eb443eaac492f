"""What people see of a running job."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.coordination import Phase
from fedprune_server.monitoring.display import LiveTable, RoundLines, make_display, round_line
from fedprune_server.monitoring.situation import WatchedJob
from fedprune_server.observation.observer import RoundEnded, ServerEnding
from fedprune_server.observation.snapshot import DeviceSnapshot, JobSnapshot, LazyMapping
from support.fakes.shown_jobs import show

ROW = DeviceSnapshot(
    name="pi", profile="raspberry-pi-4b", density=0.5, parameters=12_345, bytes_down=2_500_000, bytes_up=1_250_000,
    seconds=12.34, metrics={"accuracy": 0.875}, activity="train 3/10",
)  # fmt: skip
SNAPSHOT = JobSnapshot(
    name="leaves", round=2, rounds=10, phase=Phase.TRAINING, now=1000.0, closes_at=1041.6, bytes_down=2_500_000,
    bytes_up=1_250_000, history=({"metrics": {"accuracy": 0.75, "samples": 100.0}},), devices={"pi": ROW},
)  # fmt: skip
SUMMARY = {
    "round": 2,
    "model": "0123456789abcdef",
    "metrics": {"accuracy": 0.75, "samples": 100.0},
    "devices": {"pi": {"progress": "folded"}, "nano": {"progress": "refused"}},
}
LINE = round_line(SUMMARY, SNAPSHOT)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _draws_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def test_rounds_that_were_seen_tell_how_long_the_rest_takes(caplog: pytest.LogCaptureFixture) -> None:
    lines = RoundLines()
    with caplog.at_level(logging.INFO, "fedprune.server"):
        for number, now in ((2, 100.0), (3, 130.0), (4, 160.0), (5, 190.0), (10, 220.0)):
            show(lines, RoundEnded({**SUMMARY, "round": number}), at=now, snapshot=SNAPSHOT, is_paused=number == 5)
    ends = [r.getMessage().partition(", model 0123456789ab")[2] for r in caplog.records]
    assert ends == ["", ", about 4 min left", ", about 3 min left", "", ""]


def test_a_job_whose_limit_was_lowered_below_its_round_is_in_no_round_of_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    stream, snapshot = Terminal(), replace(SNAPSHOT, round=280, rounds=20)
    show(make_display(stream), ServerEnding(), snapshot=snapshot)
    line = round_line({**SUMMARY, "round": 280}, snapshot)
    for text in (stream.getvalue(), line, WatchedJob(snapshot=snapshot, folder=Path()).round_text):
        assert "280, over the job's limit of 20" in text


def test_on_a_terminal_there_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    display = make_display(stream)
    assert isinstance(display, LiveTable)
    show(display, snapshot=SNAPSHOT)
    logging.getLogger("fedprune.server").warning("device nano takes no part")
    show(display, ServerEnding(), snapshot=SNAPSHOT)
    for text in ("leaves: round 2 of 10", "raspberry-pi-4b", "12,345", "train 3/10", "device nano takes no part"):
        assert text in stream.getvalue()


def test_a_closed_table_gives_logging_back() -> None:
    logger = logging.getLogger("fedprune")
    before = (logger.handlers[:], logger.propagate)
    show(LiveTable(Terminal()), ServerEnding(), snapshot=SNAPSHOT)
    assert (logger.handlers[:], logger.propagate) == before


def test_the_table_is_not_drawn_at_every_message() -> None:
    drawn: list[int] = []

    def devices() -> dict[str, DeviceSnapshot]:
        drawn.append(1)
        return {"pi": ROW}

    display = LiveTable(Terminal())
    for _ in range(100):
        show(display, snapshot=SNAPSHOT, devices=LazyMapping(devices))
    show(display, ServerEnding(), snapshot=SNAPSHOT)
    assert len(drawn) == 1


@pytest.mark.parametrize("text", ["refused: expected [n], got [/tmp]", "[bold red]", "[/]", "[link=file:///x]a[/link]"])
def test_brackets_in_a_devices_words_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    display = make_display(stream)
    show(display, snapshot=SNAPSHOT, devices={"pi": replace(ROW, activity=text)})
    show(display, ServerEnding(), snapshot=SNAPSHOT)
    assert text in stream.getvalue()
