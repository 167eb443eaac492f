"""Tables: what loggers, spreadsheets, databases and dashboards write."""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data_folders.kinds import REFUSED, Kind, Truth, windows

ROWS, STEPS = 24, 4
HEAT = [20 + i % 7 / 4 for i in range(ROWS)]
DAMP = [1040 + i % 5 / 2 for i in range(ROWS)]
CLASS = [i // 12 for i in range(ROWS)]
BEGIN = dt.datetime(2024, 3, 30, 22, tzinfo=dt.timezone.utc)
TIMES = [BEGIN + dt.timedelta(minutes=i) for i in range(ROWS)]
NAN = float("nan")
WHOLE = Truth(windows([HEAT, DAMP], CLASS, STEPS))

Row = tuple[dt.datetime, float, float, int]
TABLE: list[Row] = list(zip(TIMES, HEAT, DAMP, CLASS, strict=True))


def kinds() -> Iterator[Kind]:
    """All kinds of tables."""
    yield from _dialects()
    yield from _missing_numbers()
    yield from _times()
    yield from _exports()
    yield from _other_files()


def _kind(name: str, body: str | bytes, truth: Truth = WHOLE, *, file: str = "log.csv", **options: Any) -> Kind:
    def write(folder: Path) -> tuple[Path, Truth]:
        path = folder / file
        path.write_bytes(body if isinstance(body, bytes) else body.encode())
        return path, truth

    return Kind("tables", name, write, (2, STEPS), options=tuple(options.items()))


def _lines(line: str, head: str = "heat,damp,class", rows: Sequence[Sequence[Any]] = TABLE, first: int = 0) -> str:
    """A table whose lines are filled in with number, time, heat, damp and class of each row."""
    return "\n".join([head, *(line.format(i, *row) for i, row in enumerate(rows, first))]) + "\n"


def _truth(heat: Sequence[float]) -> Truth:
    return Truth(windows([heat, DAMP], CLASS, STEPS))


def _dialects() -> Iterator[Kind]:
    plain = _lines("{2},{3},{4}")
    europe = plain.replace(",", ";").replace(".", ",")
    yield _kind("CSV with commas", plain)
    yield _kind("CSV of Excel in Europe: semicolons, decimal commas", europe)
    yield _kind("tabs", plain.replace(",", "\t"), file="log.tsv")
    yield _kind("bars", plain.replace(",", "|"))
    quoted = _lines('"{2}";"{3}";{4}').replace(".", ",").replace(";", ",")
    yield _kind("quoted numbers with decimal commas, separated by commas", quoted)
    yield _kind("a name with a comma in quotes", plain.replace("heat,", '"heat, °C",', 1))
    yield _kind("thousands after spaces", europe.replace(";10", ";1 0"))
    yield _kind("thousands after points (1.040,5)", europe.replace(";10", ";1.0"), REFUSED)
    yield _kind("UTF-16, as Excel's Unicode text", plain.replace(",", "\t").encode("utf-16"))
    yield _kind("UTF-8 with a byte order mark, line ends of Windows", ("\ufeff" + plain.replace("\n", "\r\n")).encode())
    yield _kind("Latin-1 with a degree sign", plain.replace("heat", "heat °C").encode("latin-1"), REFUSED)
    yield _kind("a line sep=;", "sep=;\n" + plain.replace(",", ";"))
    yield _kind("a row of units", plain.replace("\n", "\n°C,hPa,\n", 1))
    yield _kind("comments before the names", "# station 7\n# heat in °C\n" + plain)
    yield _kind("names in capitals, Class", plain.replace("heat,damp,class", "HEAT,Damp,Class"))
    yield _kind("separators at the end of each row, empty rows at the end", plain.replace("\n", ",\n") + ",,,\n,,,\n")
    names = ("still", "worn")
    named = [(*row, names[kind]) for *row, kind in TABLE]
    yield _kind("names of classes", _lines("{2},{3},{4}", "heat,damp,label", named), class_names=names)
    yield _kind("no row of names", plain.partition("\n")[2], REFUSED)
    yield _kind("two columns of one name", plain.replace("heat,damp", "heat,Heat"), REFUSED)
    yield _kind("numbers with units (20.5 °C)", _lines("{2} °C,{3} hPa,{4}"), REFUSED)


def _missing_numbers() -> Iterator[Kind]:
    def body(empty: str) -> str:
        return _lines("{2},{3},{4}", rows=[*TABLE[:9], (TIMES[9], empty, DAMP[9], CLASS[9]), *TABLE[10:]])

    def filled(value: float) -> Truth:
        return _truth([*HEAT[:9], value, *HEAT[10:]])

    yield _kind("an empty cell", body(""), REFUSED)
    yield _kind("an empty cell, --missing hold", body(""), filled(HEAT[8]), missing="hold")
    mean = float(np.mean(np.float64([*HEAT[:9], *HEAT[10:]])))
    yield _kind("NaN, --missing mean", body("NaN"), filled(mean), missing="mean")
    yield _kind("unavailable, --missing drop", body("unavailable"), filled(NAN), missing="drop")
    yield _kind("-999 for a missing number", body("-999"), filled(-999))
    yield _kind("#N/A of Excel, --missing drop", body("#N/A"), filled(NAN), missing="drop")


def _times() -> Iterator[Kind]:
    def dated(time: Callable[[dt.datetime], Any], rows: Sequence[Sequence[Any]] = TABLE, name: str = "time") -> str:
        return _lines("{1},{2},{3},{4}", f"{name},heat,damp,class", [(time(at), *rest) for at, *rest in rows])

    # An hour is missing between rows 10 and 11: no window spans it.
    late = [(t + dt.timedelta(hours=i > 10), *rest) for i, (t, *rest) in enumerate(TABLE)]
    gap = Truth([s for first, s in enumerate(WHOLE.samples or ()) if not first <= 10 < first + STEPS - 1])
    yield _kind("times of ISO 8601", dated(dt.datetime.isoformat))
    yield _kind("times with a gap of an hour", dated(dt.datetime.isoformat, late), gap)
    yield _kind("seconds since 1970", dated(lambda t: t.timestamp(), name="ts"))
    yield _kind("milliseconds since 1970", dated(lambda t: int(t.timestamp() * 1000), name="timestamp"))
    yield _kind("31.03.2024 00:01", dated(lambda t: f"{t:%d.%m.%Y %H:%M}"))
    yield _kind("3/31/24 12:01 AM", dated(lambda t: f"{t:%m/%d/%y %I:%M %p}"))
    two = _lines("{1:%Y-%m-%d},{1:%H:%M:%S},{2},{3},{4}", "date,time,heat,damp,class")
    yield _kind("date and time in two columns", two)
    yield _kind("the newest row first", dated(dt.datetime.isoformat, TABLE[::-1]))
    twice = [row for i, row in enumerate(TABLE) for _ in range(1 + (i == 7))]
    yield _kind("a row twice", dated(dt.datetime.isoformat, twice))
    mixed = dated(lambda t: t.isoformat() if t.minute < 12 else f"{t:%d.%m.%Y %H:%M}")
    yield _kind("a second form of time in the column", mixed, REFUSED)
    yield _kind("a column of dates with a name of its own", dated(dt.datetime.isoformat, name="when"))


def _exports() -> Iterator[Kind]:
    yield _kind("pandas: to_csv with its index", _lines("{0},{2},{3},{4}", ",heat,damp,class"))
    speak = _lines("{1:%Y-%m-%d %H:%M:%S} UTC,{0},{2},{3},{4}", "created_at,entry_id,field1,field2,class", first=100)
    yield _kind("ThingSpeak: created_at, entry_id, field1", speak, REFUSED)
    notes = _lines("{0}e9,{2},dry,{3},{4}", "id,heat,note,damp,class")
    yield _kind("a log with columns of no use, --columns heat,damp", notes, columns=("heat", "damp"))
    states = [(t.isoformat(), *(("heat", heat), ("damp", damp))[i % 2]) for i, (t, heat, damp, _) in enumerate(TABLE)]
    changes = _lines("sensor.{2},{3},{1}", "entity_id,state,last_changed", states)
    yield _kind("Home Assistant: a row for each change of a state", changes, REFUSED)
    influx = "#group,false,false,false,false\n#datatype,string,long,dateTime:RFC3339,double\n#default,_result,,,\n"
    influx += _lines(",,0,{1:%Y-%m-%dT%H:%M:%SZ},{2}", ",result,table,_time,_value")
    yield _kind("InfluxDB: annotated CSV", influx, REFUSED)
    series = _lines("{1:%Y-%m-%d %H:%M:%S},{2},{3},{4}", '"Time","heat","damp","class"')
    yield _kind("Grafana: Time, then series", series)
    shell = _lines("{0},{2},{3},{4}", "rowid,heat,damp,class", first=1)
    yield _kind("SQLite's shell: .mode csv, names on", shell, REFUSED)


def _parquet(name: str, columns: dict[str, Any], truth: Truth = WHOLE, *, index: bool = False) -> Kind:
    def write(folder: Path) -> tuple[Path, Truth]:
        path = folder / "log.parquet"
        if index:
            import pandas as pd

            pd.DataFrame(columns, index=list(range(5, 5 + ROWS))).to_parquet(path)
        else:
            pq.write_table(pa.table(columns), path)
        return path, truth

    return Kind("tables", name, write, (2, STEPS))


def _other_files() -> Iterator[Kind]:
    columns = {"heat": HEAT, "damp": DAMP, "class": CLASS}
    yield _parquet("Parquet", columns)
    yield _parquet("Parquet with timestamps of zones", {"at": pa.array(TIMES), **columns})
    yield _parquet("Parquet with the index of pandas", columns, index=True)
    yield _parquet("Parquet with lists", {**columns, "wave": [[1.0, 2.0]] * ROWS}, REFUSED)
    lines = "".join(f'{{"heat": {r[1]}, "damp": {r[2]}, "class": {r[3]}}}\n' for r in TABLE)
    yield _kind("JSON, a line for each row", lines, REFUSED, file="log.jsonl")
    yield _kind("an Excel workbook", b"PK\x03\x04" + bytes(200), REFUSED, file="log.xlsx")

    def write(folder: Path) -> tuple[Path, Truth]:
        with sqlite3.connect(folder / "log.db") as database:
            database.execute("CREATE TABLE log (heat REAL, damp REAL, class INTEGER)")
            database.executemany("INSERT INTO log VALUES (?, ?, ?)", [row[1:] for row in TABLE])
        return folder / "log.db", REFUSED

    yield Kind("tables", "an SQLite database", write, (2, STEPS))

    def write_folder(folder: Path) -> tuple[Path, Truth]:
        for day in range(2):
            (folder / f"day{day}.csv").write_text(_lines("{2},{3},{4}", rows=TABLE[day * 12 : day * 12 + 12]))
        return folder, REFUSED

    yield Kind("tables", "a folder of CSV files, one a day", write_folder, (2, STEPS))
