"""Carries sensors' messages from the home's broker to the board's local interface."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from functools import partial
from secrets import token_hex
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, shape_text
from fedprune.core.text import quantity
from fedprune.model.lengths import Shape, shape_from_json
from fedprune.wire.link import BrokerLink, tls_context
from fedprune.wire.queues import ConnectionDown, ConnectionUp, Event, Inbox, RetainedMessage
from fedprune_device.client import Board, BoardError
from fedprune_device.data.table_windows import column_layout, steps_and_order
from fedprune_device.sensors.config import SensorConfig
from fedprune_device.sensors.sample_collector import DropCounts, SampleCollector

_LOG = logging.getLogger("fedprune.device")

_INBOX_BYTES = 4 * 2**20
# A clock that also runs while the machine sleeps, so that values from before are old; Linux has it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_MAX_WAIT_S = 1.0  # for a message, so that a signal ends the program soon
_BOARD_TIMEOUT_S = 5.0
_MAX_WAITING = 64  # samples that wait while the board restarts
# Seconds to the first line of the log, soon enough for whoever watches, and most seconds between two lines later on.
_FIRST_REPORT_S, _MAX_REPORT_S = 10.0, 3600.0
_NO_SHAPE = (
    "the board has no model yet that says what a sample is, and the server sends one only to boards with samples. Set "
    "steps, the rows of a sample, in the settings (docs/board-data.md#sensors)"
)


class _Layout(NamedTuple):
    """How rows of the channels become the model's input."""

    steps: int
    channels_first: bool
    rank: int


def run_sensors(config: SensorConfig, stopping: threading.Event, *, patient: bool = False) -> None:
    """Hand samples to the board until `stopping` is set.

    A `patient` program waits for a broker that can't be reached; otherwise that is a `BrokerError`. Raises
    `ConfigError` if the board's model takes another number of channels.
    """
    drops = DropCounts()
    collector = SampleCollector(config, drops)
    link = BrokerLink(
        config.broker,
        f"fedprune-sensors-{token_hex(4)}",  # two clients of one name would disconnect each other
        tls=partial(tls_context, config.ca),
        inbox=Inbox[Event](_INBOX_BYTES),
        marks_retained=True,
    )
    link.subscribe(config.subscriptions)
    with link:
        link.start(patient=patient)
        bridge = _Bridge(config, collector, drops)
        try:
            bridge.run(link, stopping)
        finally:
            bridge.report()


class _Bridge:
    """Takes messages as they come, a row at each period, and hands samples in; all in one thread."""

    def __init__(self, config: SensorConfig, collector: SampleCollector, drops: DropCounts) -> None:
        self._config, self._collector, self._drops = config, collector, drops
        self._board = Board(config.board, timeout=_BOARD_TIMEOUT_S, tries=1)
        self._layout = None if config.sample_shape is None else self._layout_of(config.sample_shape)
        self._model_shape: Shape | None = None
        self._problem = ""  # what keeps samples from the board, if anything does
        self._waiting: deque[tuple[npt.NDArray[np.float32], str | int | None]] = deque()
        self._added = 0

    def run(self, link: BrokerLink, stopping: threading.Event) -> None:
        next_row = _now() + self._config.period_s
        report_interval_s = _FIRST_REPORT_S
        next_report = _now() + report_interval_s
        while not stopping.is_set():
            item = link.get(max(0.0, min(next_row - _now(), _MAX_WAIT_S)))
            now = _now()
            if isinstance(item, tuple):
                self._collector.receive(*item, now, is_retained=isinstance(item, RetainedMessage))
            elif isinstance(item, ConnectionUp):
                _LOG.info("connected to the sensors' broker at %s", link.url)
            elif isinstance(item, ConnectionDown):
                _LOG.warning("the connection to the sensors' broker at %s ended: %s", link.url, item.reason)
            if now >= next_row:
                missed = int((now - next_row) // self._config.period_s)
                if missed:  # the machine slept, or the board took long to answer
                    self._collector.drop_rows()
                next_row += (missed + 1) * self._config.period_s
                self._take_rows(now)
            if now >= next_report:
                self.report()
                report_interval_s = min(6 * report_interval_s, _MAX_REPORT_S)
                next_report = now + report_interval_s

    def report(self) -> None:
        """Log what was handed in and what was left out since the last report."""
        drops, added = self._drops.take(), self._added
        self._added = 0
        text = f"{quantity(added, 'sample')} handed to the board{f'; left out: {drops}' if drops else ''}"
        text += f"; {self._problem}" if self._problem else ""
        _LOG.log(logging.WARNING if drops or self._problem else logging.INFO, "sensors: %s", text)

    def _take_rows(self, now: float) -> None:
        # The next round's model may take another shape, but none in the middle of a sample.
        if self._layout is None or self._collector.is_between_samples:
            self._follow_model()
        if self._layout is None:
            self._drops.add("times at which nothing said what a sample is")
            return
        for sample in self._collector.collect(now, self._layout.steps):
            rows = np.array(sample.rows, np.float32)[None]
            arrange = column_layout(0, rows.shape[2], self._layout.channels_first, self._layout.rank)
            self._waiting.append((np.asarray(arrange(rows)[0], np.float32), sample.label))
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft()
            self._drops.add("samples while the board couldn't be reached")
        self._hand_in()

    def _hand_in(self) -> None:
        while self._waiting:
            try:
                answer = self._board.add(*self._waiting[0])
                self._problem = ""
                if answer.get("duplicate"):  # held values in all rows, such as a room's at night
                    self._drops.add("samples that equal an earlier one")
                else:
                    self._added += 1
            except BoardError as error:
                if error.status in (0, 503):  # it restarts, or is busy: the next period tries again
                    self._note_problem(str(error))
                    return
                reason = f"{error.what}, expected {error.expected}" if error.expected else error.what
                self._drops.add(f"samples that the board refused: {reason[:200]}")
            self._waiting.popleft()

    def _follow_model(self) -> None:
        """Take the layout of the board's model, if it answers and has one; warn if the settings say another."""
        try:
            sizes = self._board.status()["input"]
        except (BoardError, KeyError) as error:
            self._note_problem(str(error))
            return
        self._note_problem(_NO_SHAPE if sizes is None and self._layout is None else "")
        if sizes is None or (shape := shape_from_json(sizes)) == self._model_shape:
            return
        layout, stated_shape = self._layout_of(shape), self._config.sample_shape
        if stated_shape is not None and layout != self._layout_of(stated_shape):
            _LOG.warning(
                "sensors: the board's model takes %s, but steps and layout in the settings say %s: samples have the "
                "model's shape from now on, and the board leaves earlier ones out. Correct the settings",
                shape_text(*shape),
                shape_text(*stated_shape),
            )
        self._layout, self._model_shape = layout, shape

    def _note_problem(self, text: str) -> None:
        """Log what keeps samples from the board when it begins, and again with each report while it lasts."""
        if text and text != self._problem:
            _LOG.warning("sensors: %s", text)
        self._problem = text

    def _layout_of(self, shape: Shape) -> _Layout:
        channels = len(self._config.channels)
        steps, channels_first = steps_and_order(shape, channels, self._config.has_channels_first)
        if not steps:
            raise ConfigError(
                "channels of the sensors",
                expected=f"as many as the board's model takes: {shape_text(*shape)}",
                got=channels,
                hint="The order of [[channels]] is that of the model's channels.",
            )
        return _Layout(steps, channels_first, len(shape))


def _now() -> float:
    return time.clock_gettime(_CLOCK)
