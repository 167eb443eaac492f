"""Writes the pages of the committed results again, and their tables into `docs`: `python -m benchmarks.accuracy.docs`.

Runs stay of the code or marked as they were when they were recorded: nothing is run, and nothing is compared with
today's code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.accuracy.__main__ import whole
from benchmarks.accuracy.figures import current
from benchmarks.accuracy.page import in_short, page
from benchmarks.accuracy.protocols import EIGHT, PROTOCOLS
from benchmarks.accuracy.run import unpublished
from benchmarks.accuracy.verdicts import summary

RESULTS = Path("benchmarks/results/accuracy")
DOCS = Path("docs")

SUMMARY = "summary"
"""The place of the verdicts of all tables."""

_PLACE = re.compile(r"(<!-- results: ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_AGE = re.compile(r"(<!-- age of (.+?) -->)(.*?)(<!-- end -->)")


def pages(results: Path) -> dict[str, str]:
    """The pages of all tables that there are results of, by file name, and that of the verdicts."""
    found = {name: json.loads(path.read_text()) for name in PROTOCOLS if (path := results / f"{name}.json").exists()}
    runs = {name: whole(body["runs"]) for name, body in found.items()}
    texts = {f"{name}.md": page(PROTOCOLS[name], runs[name], body) for name, body in found.items()}
    eight = [p.name for p in EIGHT if p.name in found]
    dates, codes = (sorted({str(found[name].get(key)) for name in eight}) for key in ("date", "code"))
    lost = unpublished([*codes, *(run.get("code", "") for name in eight for run in runs[name])])
    made = f"{' and '.join(dates)}, code: {', '.join(codes)}. {lost}".strip()
    return texts | {f"{SUMMARY}.md": summary({name: (PROTOCOLS[name], runs[name]) for name in eight}, made)}


def _verdicts(results: Path) -> str:
    """The page of verdicts without its heading, as a reader of another page finds it."""
    path = results / f"{SUMMARY}.md"
    if not path.exists():
        return f"Not made yet: `python -m benchmarks.accuracy {SUMMARY}`.\n"
    text = path.read_text().partition("\n\n")[2]
    return re.sub(r"\]\(([\w-]+\.md)\)", r"](../benchmarks/results/accuracy/\1)", text)


def _age(names: str, results: Path) -> str:
    """What is said of a verdict whose tables have runs of older code; empty if none has."""
    found = [(name, results / f"{name}.json") for name in names.split()]
    runs = [r for n, p in found if p.exists() for r in current(PROTOCOLS[n], json.loads(p.read_text())["runs"])]
    old = [run for run in runs if run.get("stale")]
    if not old:
        return ""
    return ", on older code" if len(old) == len(runs) else ", in part on older code"


def filled(text: str, results: Path) -> str:
    """A page of `docs` with every table that there are results of, for the others the command that makes them, and
    verdicts marked that rest on runs of older code."""

    def table(match: re.Match[str]) -> str:
        if match[2] == SUMMARY:
            return f"{match[1]}\n{_verdicts(results)}\n{match[4]}"
        path = results / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}\nNot run yet: `python -m benchmarks.accuracy {match[2]}`.\n\n{match[4]}"
        found = json.loads(path.read_text())
        lines = in_short(PROTOCOLS[match[2]], found["runs"], found["date"])
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return _AGE.sub(lambda match: f"{match[1]}{_age(match[2], results)}{match[4]}", _PLACE.sub(table, text))


if __name__ == "__main__":
    for name, text in pages(RESULTS).items():
        (RESULTS / name).write_text(text)
    for path in (DOCS / "reproduce-a-paper.md", *sorted((DOCS / "strategies").glob("*.md"))):
        path.write_text(filled(path.read_text(), RESULTS))
