"""Benchmarks keep a record of each case, and pages' tables are filled from records."""

import json
from pathlib import Path

from benchmarks import robustness, tables

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


def test_a_hundredfold_update_breaks_a_model_without_limits_alone() -> None:
    without, limited = (robustness.play("digits", s, "×100", 1, 0, rounds=2).accuracy for s in ("no limits", "default"))
    assert without < 0.3 < 0.5 < limited
