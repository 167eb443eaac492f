"""Puts tables of results into `docs/reproduce-a-paper.md`: `python -m benchmarks.accuracy.docs`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.accuracy.page import in_short
from benchmarks.accuracy.protocols import PROTOCOLS

PAGE = Path("docs/reproduce-a-paper.md")
RESULTS = Path("benchmarks/results/accuracy")

SUMMARY = "summary"
"""The place of the verdicts of all tables."""

_PLACE = re.compile(r"(<!-- results: ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _verdicts(results: Path) -> str:
    """The page of verdicts without its heading, as a reader of another page finds it."""
    path = results / f"{SUMMARY}.md"
    if not path.exists():
        return f"Not made yet: `python -m benchmarks.accuracy {SUMMARY}`.\n"
    text = path.read_text().partition("\n\n")[2]
    return re.sub(r"\]\(([\w-]+\.md)\)", r"](../benchmarks/results/accuracy/\1)", text)


def filled(text: str, results: Path) -> str:
    """The page with every table that there are results of, and for the others the command that makes them."""

    def table(match: re.Match[str]) -> str:
        if match[2] == SUMMARY:
            return f"{match[1]}\n{_verdicts(results)}\n{match[4]}"
        path = results / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}\nNot run yet: `python -m benchmarks.accuracy {match[2]}`.\n\n{match[4]}"
        found = json.loads(path.read_text())
        lines = in_short(PROTOCOLS[match[2]], found["runs"], found["date"])
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return _PLACE.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), RESULTS))
