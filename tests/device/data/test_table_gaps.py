from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedprune.core.errors import DataError
from fedprune_device.data.labels import Targets
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_table import open_table
from fedprune_device.data.table_options import TableOptions
from fedprune_device.data.table_windows import TableFile

pytestmark = pytest.mark.board

ALL = SplitShares(0.0)
BEGIN = datetime(2024, 3, 30, 22, 0, tzinfo=timezone.utc)


def table(path: Path, times: list[Any], numbers: Any = None, name: str = "time", **options: Any) -> TableFile:
    """A table of times and one column `a`, by default of the rows' numbers."""
    numbers = range(len(times)) if numbers is None else numbers
    path.write_text(f"{name},a\n" + "".join(f"{t},{n}\n" for t, n in zip(times, numbers, strict=True)))
    return TableFile(path, ALL, 10**6, options=TableOptions(**options))


def windows(source: TableFile, steps: int) -> Any:
    return np.asarray(source.snapshot((1, steps)).x_train)[:, 0]


@given(data=st.data())
def test_no_window_spans_a_gap_or_goes_back_in_time(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = data.draw(st.lists(st.sampled_from([1.0] * 8 + [0.5, 1.4, 1.6, 7.0, -3.0, 0.0]), min_size=5, max_size=120))
    assume(max(steps) > 0)  # a file whose newest row comes first is turned round
    times = np.cumsum([1e9, *steps])
    source = table(tmp_path_factory.mktemp("gaps") / "a.csv", times.tolist(), step=1.0)
    span = data.draw(st.integers(1, 4))
    expected = []
    for first in range(len(times) - span + 1):
        rows = range(first, first + span)
        if all(0 <= times[row + 1] - times[row] <= 1.5 for row in rows[:-1]):
            expected.append(list(rows))
    if expected:
        assert windows(source, span).astype(int).tolist() == expected
    else:
        with pytest.raises(DataError):
            windows(source, span)


@given(data=st.data(), missing=st.sampled_from(["hold", "drop"]))
def test_no_window_has_a_missing_number_and_none_is_held_over_a_gap(
    data: st.DataObject, missing: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count, span = data.draw(st.integers(5, 60)), data.draw(st.integers(1, 4))
    gaps = data.draw(st.sets(st.integers(1, count - 1), max_size=6))
    empty = data.draw(st.sets(st.integers(0, count - 1), max_size=12))
    times = np.arange(count) + np.array([10 * sum(gap <= row for gap in gaps) for row in range(count)])
    cells = ["" if row in empty else str(row) for row in range(count)]
    source = table(tmp_path_factory.mktemp("empty") / "a.csv", times.tolist(), cells, missing=missing, step=1.0)
    rows: list[float] = []  # what each row holds
    for row in range(count):
        held = rows[-1] if missing == "hold" and row not in gaps and rows else NAN
        rows.append(held if row in empty else float(row))
    expected = [
        rows[first : first + span]
        for first in range(count - span + 1)
        if not gaps.intersection(range(first + 1, first + span)) and not any(map(np.isnan, rows[first : first + span]))
    ]
    if expected:
        assert windows(source, span).tolist() == expected
    else:
        with pytest.raises(DataError):
            windows(source, span)


def local(seconds: float, form: str) -> str:
    return (BEGIN + timedelta(seconds=seconds)).strftime(form)


FORMATS = {
    "iso": lambda s: (BEGIN + timedelta(seconds=s)).isoformat(),
    "z": lambda s: local(s, "%Y-%m-%dT%H:%M:%S.%fZ"),
    "space": lambda s: local(s, "%Y-%m-%d %H:%M:%S"),
    "offset": lambda s: (BEGIN + timedelta(seconds=s)).astimezone(timezone(timedelta(hours=2))).isoformat(),
    "european": lambda s: local(s, "%d.%m.%Y %H:%M:%S"),
    "american": lambda s: local(s, "%m/%d/%Y %I:%M:%S %p"),
    "short year": lambda s: local(s, "%d/%m/%y %H:%M:%S"),
    "named month": lambda s: local(s, "%d-%b-%Y %H:%M:%S"),
    "mail": lambda s: local(s, "%a %d %b %Y %H:%M:%S GMT"),
    "zone": lambda s: local(s, "%Y-%m-%d %H:%M:%S UTC"),
    "compact": lambda s: local(s, "%Y%m%dT%H%M%S"),
    "seconds": lambda s: str(BEGIN.timestamp() + s),
    "milliseconds": lambda s: str(round(1000 * (BEGIN.timestamp() + s))),
    "nanoseconds": lambda s: str(10**9 * round(BEGIN.timestamp() + s)),
    "since the start": str,
    "duration": lambda s: str(timedelta(seconds=s)),
}


@pytest.mark.parametrize("form", FORMATS)
def test_times_are_read_in_the_forms_of_loggers(tmp_path: Path, form: str) -> None:
    at = [60 * n for n in range(40)] + [60 * n + 9000 for n in range(100)]
    table(tmp_path / "a.csv", [FORMATS[form](s) for s in at])
    with open_table(tmp_path / "a.csv", ()) as opened:
        times = np.concatenate([block.times for block in opened.blocks if block.times is not None])
        assert "column 1" in opened.notes()[-1]
    np.testing.assert_allclose(times - times[0], at, atol=1e-6)
    if form not in ("since the start", "duration"):
        assert times[0] == pytest.approx(BEGIN.timestamp(), abs=1e-6)


def test_a_date_and_a_time_are_one_moment_and_an_index_without_a_name_may_be_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Date,Time,a\n30.03.2024,23:59:30,1\n31.03.2024,00:00:30,2\n")
    with open_table(path, ()) as opened:
        (block,) = opened.blocks
        assert np.diff(block.times) == [60]
    for names, columns in (("Datum;Uhrzeit;a", "1 and 2"), ("fecha;hora;a", "1 and 2"), ("Uhrzeit;Date;a", "2 and 1")):
        cells = ["30.03.2024;23:59", "31.03.2024;00:00"]
        cells = [";".join(reversed(row.split(";"))) for row in cells] if columns == "2 and 1" else cells
        path.write_text("\n".join([names, *(f"{row};{n}" for n, row in enumerate(cells))]))
        for options in (TableOptions(), TableOptions(columns=("a",))):
            with open_table(path, (), options) as opened:
                (block,) = opened.blocks
                assert np.diff(block.times) == [60]
                assert block.numbers.tolist() == [[0], [1]]
                assert f"column {columns}" in opened.notes()[-1]
    path.write_text(",a\n2024-03-30 23:59:30,1\n2024-03-31 00:00:30,2\n")
    with open_table(path, ()) as opened:
        (block,) = opened.blocks
        assert np.diff(block.times) == [60]
    path.write_text(",a\n0,1\n7,2\n")  # numbers of rows
    with open_table(path, ()) as opened:
        (block,) = opened.blocks
        assert block.times is None


def test_what_cannot_be_read_as_times_is_said(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", ["noon", "evening", "night"] * 9)
    assert "evenly spaced" in source.notes[0]
    assert len(windows(source, 3)) == 25
    with pytest.raises(DataError, match=r"row 3, column 1.*time as in the rows before"):
        table(tmp_path / "a.csv", ["2024-01-01", "2024-01-02", "01/03/2024"])
    (tmp_path / "a.csv").write_text("time;a\n" + "".join(f"1706700000,{n};{n}\n" for n in range(9)))
    assert "read as seconds" in TableFile(tmp_path / "a.csv", ALL, 99).notes[-1]
    with pytest.raises(DataError, match="column of times"):
        table(tmp_path / "a.csv", [1, 2], name="b", step=1.0)


def test_the_newest_row_first_is_read_from_the_end(tmp_path: Path) -> None:
    at = [*range(20), *range(50, 70)]
    source = table(tmp_path / "a.csv", at[::-1], at[::-1])
    found = windows(source, 2)
    assert (np.diff(found) == 1).all()
    assert found.tolist() == [[n, n + 1] for n in at[:-1] if n + 1 in at]
    assert any("newest" in note for note in source.notes)


def test_copies_of_rows_are_left_out_and_other_rows_of_one_time_stay(tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", [0, 1, 1, 2, 3, 9, 10], [5, 6, 6, 7, 8, 3, 4])
    assert windows(source, 2).tolist() == [[5, 6], [6, 7], [7, 8], [3, 4]]
    assert any("1 row" in note and "left out" in note for note in source.notes)
    source = table(tmp_path / "a.csv", [0, 1, 1, 1, 2], [5, 6, 6, 7, 8])
    assert windows(source, 2).tolist() == [[5, 6], [6, 6], [6, 7], [7, 8]]
    assert any("2 rows" in note and "all stay" in note for note in source.notes)


def test_the_step_may_be_given(tmp_path: Path) -> None:
    at = [0, 1, 2, 20, 21, 22]
    assert len(windows(table(tmp_path / "a.csv", at), 3)) == 2
    assert len(windows(table(tmp_path / "a.csv", at, step=15.0), 3)) == 4
    with pytest.raises(DataError, match="--step"):
        windows(table(tmp_path / "a.csv", at, step=0.1), 3)


@pytest.mark.once
def test_timestamps_of_parquet_are_times(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    seconds = np.array([0, 60, 120, 9000, 9060, 9120])
    path = tmp_path / "a.parquet"
    for kind, factor in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        for name in ("Timestamp", "__index_level_0__"):
            stamps = pa.array((1_711_836_000 + seconds) * factor, pa.timestamp(kind, "UTC"))
            pq.write_table(pa.table({"a": np.arange(6.0), name: stamps}), path)
            assert windows(TableFile(path, ALL, 99), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    pq.write_table(pa.table({"a": np.arange(6.0), "date": pa.array([1, 2, 3, 9, 10, 11], pa.date32())}), path)
    assert windows(TableFile(path, ALL, 99), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


NAN = float("nan")
GAPPY = [NAN, 1.0, 2.0, NAN, NAN, 5.0, 6.0, NAN, 8.0, 9.0]
AT = [0, 1, 2, 3, 4, 5, 6, 17, 18, 19]  # a gap before the eighth row


@pytest.mark.parametrize("word", ["", "NaN", "unavailable", "Unknown", "NULL", "n/a"])
@pytest.mark.parametrize("kind", [".csv", pytest.param(".parquet", marks=pytest.mark.once)])
def test_a_missing_number_is_treated_as_the_options_say(tmp_path: Path, word: str, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    if kind == ".csv":
        path.write_text("time,a\n" + "".join(f"{t},{word if n != n else n}\n" for t, n in zip(AT, GAPPY, strict=True)))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"time": AT, "a": pa.array([None if n != n else n for n in GAPPY])}), path)

    def found(missing: str) -> Any:
        source = TableFile(path, ALL, 99, options=TableOptions(missing))
        out = windows(source, 2).tolist()
        assert any(f"--missing {missing}" in note and "4 missing" in note for note in source.notes)
        return out

    with pytest.raises(DataError, match=r"row 1, column 2.*--missing hold, mean or drop"):
        TableFile(path, ALL, 99)
    assert found("drop") == [[1, 2], [5, 6], [8, 9]]
    assert found("hold") == [[1, 2], [2, 2], [2, 2], [2, 5], [5, 6], [8, 9]]
    mean = np.float32(np.nanmean(GAPPY))
    filled = [mean if n != n else n for n in GAPPY]
    np.testing.assert_allclose(found("mean"), [filled[n : n + 2] for n in range(9) if n != 6], rtol=1e-6)


def test_the_mean_is_that_of_the_training_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.csv", np.random.default_rng(0).standard_normal(400).round(3)
    cells = ["" if n % 7 == 3 else str(number) for n, number in enumerate(rows)]
    path.write_text("a,b\n" + "".join(f"{cell},{n}\n" for n, cell in enumerate(cells)))
    data = TableFile(path, SplitShares(0.4), 999, options=TableOptions("mean")).snapshot((2, 5))
    trained = np.asarray(data.x_train)
    rows_of = {int(n) for n in trained[:, 1].ravel()}
    mean = np.mean([rows[n] for n in rows_of if cells[n]])
    for x in (trained, np.asarray(data.x_test)):
        for value, n in zip(x[:, 0].ravel(), x[:, 1].ravel().astype(int), strict=True):
            assert value == pytest.approx(rows[n] if cells[n] else mean, rel=1e-5)


def test_a_column_without_a_number_has_no_mean(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n" + "1,\n" * 20)
    source = TableFile(tmp_path / "a.csv", ALL, 99, options=TableOptions("mean"))
    with pytest.raises(DataError, match="column 2"):
        source.snapshot((2, 4))


def test_a_class_is_never_filled(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,class\n1,0\n2,\n3,1\n4,\n5,0\n")
    for missing in ("hold", "mean", "drop"):
        data = TableFile(path, ALL, 99, options=TableOptions(missing)).snapshot((1, 2), Targets("cross_entropy", 2))
        assert np.asarray(data.x_train)[:, 0].tolist() == [[2, 3], [4, 5]]
        assert data.y_train.tolist() == [1, 0]
