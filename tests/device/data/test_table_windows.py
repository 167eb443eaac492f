import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import DataError
from fedprune.model.input_type import FLOATS
from fedprune.model.lengths import Lengths
from fedprune_device.data.labels import Targets
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_table import open_table
from fedprune_device.data.table_options import TableOptions
from fedprune_device.data.table_windows import TableFile

pytestmark = pytest.mark.board

ALL = SplitShares(0.0)


def series(rows: int, columns: int = 2) -> Any:
    return np.random.default_rng(0).standard_normal((rows, columns)).round(3).astype(np.float32)


def write(path: Path, names: list[str], rows: Any, delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        out = csv.writer(file, delimiter=delimiter)
        out.writerow(names)
        out.writerows([[str(v) for v in row] for row in rows])
    return path


KINDS = [".csv", pytest.param(".parquet", marks=pytest.mark.once)]  # an extra of boards


def parquet(path: Path, names: list[str], rows: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)}), path, row_group_size=50
    )
    return path


def window_starts(x: Any, rows: Any) -> list[int]:
    """The first row of each window [n, steps, ...], found in the table by its numbers."""
    return [int(np.flatnonzero((rows == one[0]).all(1))[0]) for one in np.asarray(x)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_windows_and_what_follows_them_are_samples(tmp_path: Path, kind: str, first: bool) -> None:
    rows, steps, horizon = series(300), 6, 3
    numbers = [[str(n), *map(float, row)] for n, row in enumerate(rows)]
    path = (write if kind == ".csv" else parquet)(tmp_path / f"a{kind}", ["time", "a", "b"], numbers)

    def layout(*sizes: int) -> tuple[int, ...]:
        return sizes[::-1] if first else sizes

    targets = Targets("mse", 2, layout(horizon, 2))
    data = TableFile(path, SplitShares(0.3, 0.2), 1000).snapshot(layout(steps, 2), targets)
    data.check(targets, layout(steps, 2), input_type=FLOATS)
    rows_by_split: dict[str, set[int]] = {}
    for split in ("train", "test", "val"):
        x, y = (np.asarray(getattr(data, f"{n}_{split}")) for n in "xy")
        x, y = (v.transpose(0, 2, 1) for v in (x, y)) if first else (x, y)
        begins = window_starts(x, rows)
        assert begins
        for begin, inputs, labels in zip(begins, x, y, strict=True):
            np.testing.assert_array_equal(inputs, rows[begin : begin + steps])
            np.testing.assert_array_equal(labels, rows[begin + steps : begin + steps + horizon])
        rows_by_split[split] = {row for b in begins for row in range(b, b + steps + horizon)}
    assert rows_by_split["train"].isdisjoint(rows_by_split["test"] | rows_by_split["val"])
    assert rows_by_split["test"].isdisjoint(rows_by_split["val"])
    counts = [len(data.x_train), len(data.x_test), len(data.x_val)]
    assert sum(counts) == 300 - (steps + horizon - 1) * 13  # 33.3 windows end to end: 8 blocks of 2, ... 1 of 6
    assert min(counts) > 20


def test_columns_to_predict_are_no_inputs(tmp_path: Path) -> None:
    rows = series(100, 3)
    path = write(tmp_path / "a.csv", ["a", "target_heat", "b"], rows)
    for shape, horizon in (((4,), 4), ((1,), 1), ((4, 1), 4), ((1, 4), 4)):
        data = TableFile(path, ALL, 1000).snapshot((5, 2), Targets("mse", shape[0], shape))
        x, y = np.asarray(data.x_train), np.asarray(data.y_train)
        assert y.shape[1:] == shape
        for begin, labels in zip(window_starts(x, rows[:, [0, 2]]), y, strict=True):
            np.testing.assert_array_equal(labels.ravel(), rows[begin + 5 : begin + 5 + horizon, 1])


@pytest.mark.parametrize("names", [(), ("still", "walk", "run")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_windows_class_is_that_of_its_last_row(tmp_path: Path, names: tuple[str, ...], kind: str) -> None:
    rows, classes = series(200), np.random.default_rng(1).integers(0, 3, 200)
    cells = [[names[c] if names else int(c), *map(float, row)] for c, row in zip(classes, rows, strict=True)]
    path = (write if kind == ".csv" else parquet)(tmp_path / f"a{kind}", ["class", "a", "b"], cells)
    targets = Targets("cross_entropy", 3)
    data = TableFile(path, ALL, 1000, names).snapshot((2, 7), targets)
    data.check(targets, (2, 7))
    begins = window_starts(np.asarray(data.x_train).transpose(0, 2, 1), rows)
    np.testing.assert_array_equal(data.y_train, classes[np.array(begins) + 6])


@pytest.mark.once
def test_a_few_bytes_that_unfold_to_billions_of_numbers_are_refused_unread(tmp_path: Path) -> None:
    parquet_module, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**20, np.int8)), pa.array([1.5], pa.float32()))
    parquet_module.write_table(pa.table({f"c{n}": column for n in range(300)}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**21
    with pytest.raises(DataError, match="unpacked"), open_table(tmp_path / "a.parquet", ()):
        pass


@given(draw=st.data())
def test_short_tables_have_test_samples_and_old_rows_keep_their_part_beside_new_ones(
    draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps, share = draw.draw(st.integers(1, 12)), draw.draw(st.floats(0.15, 0.5))
    few = draw.draw(st.integers(8 * steps, 30 * steps))
    rows = draw.draw(st.integers(few, 90 * steps))
    path = write(tmp_path_factory.mktemp("short") / "a.csv", ["a"], [[0]])
    table = TableFile(path, SplitShares(share), 10**6)

    def parts(count: int) -> list[set[float]]:
        write(path, ["a"], [[n] for n in range(count)])
        samples = table.snapshot((steps, 1))
        assert table.samples == samples.samples
        return [{float(v) for v in np.asarray(x)[:, 0, 0]} for x in (samples.x_train, samples.x_test)]

    (train, test), (later_train, later_test) = parts(few), parts(rows)
    assert test
    assert train <= later_train
    assert test <= later_test
    assert later_train.isdisjoint(later_test)


def test_errors_name_the_file_and_quote_nothing_of_it(tmp_path: Path) -> None:
    for text in ("a,b\n1,secret\n", "secret,secret\n", "a,class\n1,secret\n", "734.5,secret\n1\n", "734.5,12\n", ""):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError) as caught:
            TableFile(tmp_path / "a.csv", ALL, 99).snapshot((3, 2), Targets("mse", 2, (2,)))
        assert str(caught.value).startswith(str(tmp_path / "a.csv"))
        assert "secret" not in str(caught.value)
        assert "734.5" not in str(caught.value)


def test_a_model_that_no_window_fits_is_refused(tmp_path: Path) -> None:
    table = TableFile(write(tmp_path / "a.csv", ["a", "b"], series(50)), ALL, 99)
    for shape, targets in (((3, 4), Targets("mse", 2, (2,))), ((2, 8), Targets("mse", 3, (3,))), ((2, 60), None)):
        with pytest.raises(DataError):
            table.snapshot(shape, targets)
    with pytest.raises(DataError):
        table.snapshot((2, 8), Targets("cross_entropy", 3)).check(Targets("cross_entropy", 3), (2, 8))


def test_a_table_takes_no_more_room_than_it_may(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ["a", "b"], series(100))
    TableFile(path, ALL, 99, max_bytes=800)
    with pytest.raises(DataError, match="199"):
        TableFile(path, ALL, 99, max_bytes=799)


def rows_in(path: Path, text: str | bytes, names: tuple[str, ...] = ()) -> Any:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return rows_read(path, names)


def rows_read(path: Path, names: tuple[str, ...] = ()) -> Any:
    with open_table(path, names) as table:
        return np.concatenate([block.numbers for block in table.blocks])


@pytest.mark.parametrize(
    "text",
    [
        "temp;hum;class\n20,5;3;1\n-1,25;4;0\n",
        "sep=;\ntemp;hum;class\n20.5;3;1\n-1.25;4;0\n",
        '"temp, in C, or F";hum;class\n20,5;3;1\n-1,25;4;0\n',
        '"temp",  "hum, in %",class\n"20.5", "3","1"\n"-1.25",4,0\n',
        '"temp\nin C",hum,class\n20.5,3,1\n-1.25,4,0\n',
        'temp,hum,class\n"20,5",3,1\n"-1,25",4,0\n',
        "temp;hum;class\n20,5;3;1\n\u22121,25;4;0\n",
        "temp,hum,class,\n20.5,3,1,\n-1.25,4,0\n",
        "temp,hum,class\n20.5,3,1,,\n-1.25,4,0\n,,\n,,\n",
        "temp,hum,CLASS\n°C,%,\n20.5,3,1\n-1.25,4,0\n",
        "# a logger\ntemp,hum,Label\n# restarted\n20.5,3,1\n-1.25,4,0\n",
        "# temp,hum,class\n20.5,3,1\n-1.25,4,0\n",
        "#,temp,hum,class\n1,20.5,3,1\n2,-1.25,4,0\n",
        "when,temp,hum,class\n2024-01-31 10:00,20.5,3,1\n2024-01-31 10:01,-1.25,4,0\n",
        "temp,hum,class\n20.5,3,True\n-1.25,4,FALSE\n",
        "temp,hum,class\r\n20.5,3,ok\r\n-1.25,4,bad\r\n",
        "temp,hum,class\n20.5,3,1\n-1.25,4,0\n".encode("utf-16"),
    ],
)
def test_the_dialects_of_spreadsheets_and_loggers_are_one_table(tmp_path: Path, text: str | bytes) -> None:
    np.testing.assert_array_equal(rows_in(tmp_path / "a.csv", text, ("bad", "ok")), [[20.5, 3, 1], [-1.25, 4, 0]])


@pytest.mark.parametrize("begin", ['"a,b\n', "\t" * (2**20 - 4) + '"\n'])
def test_a_quote_that_nothing_closes_is_refused(tmp_path: Path, begin: str) -> None:
    """In time that grows with the file: a search of all that was read at every line would take minutes."""
    with pytest.raises(DataError):
        rows_in(tmp_path / "a.csv", begin + "1,2\n" * 250_000)


@pytest.mark.parametrize("rows_before", [0, 1, 100_000], ids=["the names", "the first row", "a late row"])
def test_a_table_in_another_encoding_is_an_error_of_ours_wherever_that_shows(tmp_path: Path, rows_before: int) -> None:
    body = b"t,a\n1,2\n" + b"1,2\n" * rows_before + b"1,\xb0C\n"
    with pytest.raises(DataError, match="UTF-8") as caught:
        rows_in(tmp_path / "a.csv", body if rows_before else b"t,\xb0C\n1,2\n")
    assert str(tmp_path / "a.csv") in str(caught.value)


def test_rows_are_checked_as_they_are_read(tmp_path: Path) -> None:
    """A row that is too wide ends the reading: a file of such rows must not fill a board's memory first."""
    too_long_for_any_reader = "1" * 2**21
    with pytest.raises(DataError, match="row 1"):
        rows_in(tmp_path / "a.csv", f"a,b\n1,2,3\n{too_long_for_any_reader}\n")


@pytest.mark.parametrize(
    ("text", "place", "way_out"),
    [
        ("1,2\n3,4\n", "first row", "names of columns"),
        ("a,b\n1,2\n3\n", "row 2", "2 columns"),
        ("a,class\n1,1\n2,1.5\n", "row 2, column 2", "whole number"),
        ("a;b\n20,5;1.5\n", "numbers", "point"),
        ('a,b\n1,"1,234"\n', "row 1, column 2", "point"),
        ("a,b\n1,1700000001\n", "row 1, column 2", "time"),
        ("a,b\n1,inf\n2,3\n", "row 1, column 2", "number"),
        ("a,b\n1,on\n2,3\n", "row 1, column 2", "number"),
        ("a,b\n1,45%\n", "row 1, column 2", "unit"),
        ("first,second\n2024-01-31,2024-01-30\n", "row 1, column 1", "time"),
        ("a,b\n1,2\n1,NaN\n", "row 2, column 2", "--missing hold, mean or drop"),
        ("a,b\n°C,hPa\nvolts,amps\n1,2\n", "row 1, column 1 (line 2)", "units"),
        ("entity_id,state,last_changed\nsensor.a,on,2024-01-31T10:00:00Z\n", "got a text", "--columns state"),
        (
            "# a logger\n\na,b\n\n1,2\n# restarted\n3,4\n\n5,#N/A\n",
            "row 3, column 2 (line 9): expected a number, got no number",
            "--missing",
        ),
        ("sep=;\na;b\n1;\n", "row 1, column 2 (line 3): expected a number, got an empty cell", "--missing"),
        ("a;b\n1;1.200,5\n", "row 1, column 2 (line 2)", "1200,5"),
        ("a,b\n1,2\n20,5,3\n", "row 2 (line 3)", "semicolons"),
        ("a,class\n1,walk\n", "row 1, column 2", "--class-names"),
        ("a,class,label\n1,1,1\n", "columns of classes", "another name"),
    ],
)
def test_a_cell_that_may_mean_something_else_is_refused_with_a_way_out_that_loses_nothing(
    tmp_path: Path, text: str, place: str, way_out: str
) -> None:
    with pytest.raises(DataError) as caught:
        rows_in(tmp_path / "a.csv", text)
    assert place in str(caught.value)
    assert way_out in str(caught.value)


@pytest.mark.once
def test_columns_of_parquet_that_are_no_numbers_are_refused_by_type(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = {
        pa.timestamp("ns", "UTC"): 5,
        pa.time64("us"): 5,
        pa.list_(pa.float64()): [1.0],
        pa.struct([("secret", pa.int8())]): {"secret": 1},
        pa.dictionary(pa.int8(), pa.binary()): b"1",
    }
    for kind, value in values.items():
        for name in ("secret", "class"):
            columns = {"a": [1.0], name: pa.array([value], kind), "time": [1.0]}  # without `time` a date would be it
            pq.write_table(pa.table(columns), tmp_path / "a.parquet")
            with pytest.raises(DataError) as caught:
                rows_read(tmp_path / "a.parquet")
            message = str(caught.value)
            assert "column 2" in message
            assert "secret" not in message
            assert ("no input" in message) == pa.types.is_temporal(kind)


def test_windows_for_a_model_of_any_length_are_as_long_as_its_bound(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ["a", "b"], series(100))
    free, fixed = (TableFile(path, ALL, 50).snapshot((2, size)) for size in (Lengths(3, 6), 6))
    np.testing.assert_array_equal(free.x_train[:], fixed.x_train[:])


def test_chosen_columns_are_the_inputs_in_their_order_whatever_the_others_hold(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "id,heat,note,Damp,class\n" + "".join(f"{i}e9,{i},dry,{i + 50},1\n" for i in range(8))
    )
    table = TableFile(tmp_path / "a.csv", SplitShares(0.0), 100, options=TableOptions(columns=("damp", "heat")))
    data = table.snapshot((2, 4), Targets("cross_entropy", 2))
    np.testing.assert_array_equal(np.asarray(data.x_train[0]), [[50, 51, 52, 53], [0, 1, 2, 3]])
    for columns, got in ((("heat", "wind"), "no column of this name"), (("class",), "of classes")):
        with pytest.raises(DataError, match=f"name {len(columns)} of the chosen columns.*{got}"):
            TableFile(tmp_path / "a.csv", SplitShares(0.0), 100, options=TableOptions(columns=columns))


def test_a_column_that_counts_the_rows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    for step, is_counter in ((1, True), (-1, True), (2, False)):
        caplog.clear()
        path.write_text("heat,entry_id\n" + "".join(f"{n % 3},{100 + step * n}\n" for n in range(30)))
        table = TableFile(path, ALL, 99)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [warning.startswith(f"{path}: column 2 counts the rows") for warning in warnings] == [True] * is_counter
        assert table.snapshot((2, 4)).samples == 27
