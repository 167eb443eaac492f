"""The times of forms: what is measured, what is left out where time ends, and what is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fedprune.planning.probe_report import MOST_SHAPES, FormTimes, Shape
from fedprune.runtime.blocks import block_size
from fedprune_device.hardware import convolution_timing
from fedprune_device.hardware.convolution_timing import measure_forms, remembered_forms

pytestmark = pytest.mark.board


def test_forms_are_measured_on_this_machine() -> None:
    table = measure_forms(seconds=0.0)

    ((shape, times),) = table.rows
    names = {name for name, _ in times}
    assert shape.kernel == 3
    assert names >= {"forward.plain", "input.flipped", "input.transposed", "kernel.taps", "kernel.products"}
    assert ("forward.blocks" in names) == bool(block_size())
    assert FormTimes.from_dict(json.loads(json.dumps(table.to_dict()))).rows[0][0] == shape


@pytest.mark.slow
@pytest.mark.once
def test_a_board_with_time_measures_every_shape() -> None:
    ticks = itertools.count()

    table = measure_forms(seconds=1e9, clock=lambda: float(next(ticks)), block=0)

    assert 15 <= len(table.rows) <= MOST_SHAPES
    assert all(not name.endswith(".blocks") for _, times in table.rows for name, _ in times)
    assert len(json.dumps(measure_forms(seconds=1e9, clock=lambda: float(next(ticks))).to_dict())) < 10_000


def test_a_slow_board_stops_after_the_shape_that_it_has_begun() -> None:
    ticks = itertools.count()

    table = measure_forms(seconds=100.0, clock=lambda: float(next(ticks)), block=0)

    # A graph takes four ticks here, or twice as many; a shape has up to seven.
    assert 1 < len(table.rows) < 15
    assert next(ticks) <= 100 + 8 * 7


def test_blocks_that_are_not_there_leave_standard_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    files = convolution_timing._files()
    broken = {name: b"nothing" if "/16/" in name else raw for name, raw in files.items()}
    monkeypatch.setattr(convolution_timing, "_files", lambda: broken)

    ((_, times),) = measure_forms(seconds=0.0, block=16).rows

    assert times
    assert all(not name.endswith("blocks") for name, _ in times)


def test_a_table_is_measured_again_only_where_something_changed(tmp_path: Path) -> None:
    table, asked = FormTimes(((Shape(3, 1, 8, 8, 64), (("forward.plain", 1e-3),)),)), list[str]()

    def make() -> FormTimes:
        asked.append("now")
        return table

    path = tmp_path / "form_times.json"
    assert remembered_forms(path, "board", make) == remembered_forms(path, "board", make) == table
    assert len(asked) == 1
    remembered_forms(path, "another board", make)
    path.write_text('{"about": 1}')
    remembered_forms(path, "another board", make)
    assert len(asked) == 3
    assert remembered_forms(tmp_path / "none" / "x.json", "board", make) == table
