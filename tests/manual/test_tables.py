"""Benchmarks keep a record of each case, and pages' tables are filled from records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, tables

PAGE = """Some text.

<!-- table: speed.json rows|selectattr("net", "eq", "a")
| net | ms | ratio | share |
|---|---:|---:|---:|
| {net} | {times.ours:.1f} | {times.ours / times.theirs:.2f} | {share * 100:.0f} |
-->

whatever stood here

<!-- end -->

More text.
"""


def test_a_table_shows_the_records_that_its_page_asks_for(tmp_path: Path) -> None:
    rows = [
        {"net": "a", "times": {"ours": 1.25, "theirs": 2.5}, "share": 0.5},
        {"net": "b", "times": {"ours": 1.0, "theirs": 1.0}},
        {"net": "a", "times": {"ours": 3.0}},
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows}))
    page = tables.filled(PAGE, tmp_path)
    assert page.count("| net | ms | ratio | share |\n|---|---:|---:|---:|\n") == 2  # in the comment, and in the table
    assert "-->\n\n| net |" in page
    assert "| a | 1.2 | 0.50 | 50 |\n| a | 3.0 | – | – |\n\n<!-- end -->" in page
    assert "whatever" not in page
    assert tables.filled(page, tmp_path) == page


def test_a_benchmark_continues_and_each_record_says_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = tmp_path / "speed.json", list[str]()

    def run(net: str, density: float) -> dict[str, Any]:
        ran.append(net)
        if net == "c" and ran.count("c") == 1:
            raise KeyboardInterrupt
        return {"ms": len(ran)}

    def main(*options: str) -> list[harness.Record]:
        monkeypatch.setattr("sys.argv", ["speed", "--out", str(out), *options])
        cases = [{"net": net, "density": 0.5} for net in "abc"]
        return harness.run_cases("speed", "Speed.", cases, run, "pytest", turns=3)

    with pytest.raises(KeyboardInterrupt):
        main()
    assert [row["ms"] for row in main()] == [1, 2, 4]
    assert ran == ["a", "b", "c", "c"]
    body = json.loads(out.read_text())
    assert body["turns"] == 3
    assert body["rows"][0]["made"].keys() >= {"date", "cpu", "python", "fedprune", "code", "pytest"}
    assert len(main("--anew", "--only", "net=b")) == 1
