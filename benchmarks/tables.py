"""Tables on pages that people write, filled from the numbers that benchmarks leave: `python -m benchmarks.tables`.

A page says in a comment what its table shows, and the table follows:

    <!-- table: step.json rows|selectattr("threads", "eq", 1)
    | net | ours, ms | ratio |
    |---|---:|---:|
    | {net} | {ours.ms:.1f} | {ours.ms / torch.ms:.2f} |
    -->

    | net | ours, ms | ratio |
    ...

    <!-- end -->

The first line names a file beside the others in `benchmarks/results`, and a Jinja expression over it: the records. The
last line of the comment is written once for each record, with expressions over it in braces; `body` is the whole file.
The lines before are written as they stand. What a record lacks is shown as a dash.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import ChainableUndefined, Environment, UndefinedError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
PAGES = ("benchmarks/results/**/*.md", "docs/**/*.md")

_TABLE = re.compile(r"(<!-- table: (\S+) ([^\n]+)\n(.*?)\n-->\n)(.*?)(<!-- end -->)", re.DOTALL)
_FORMATTER = Formatter()

ENVIRONMENT = Environment(undefined=ChainableUndefined, autoescape=False)  # noqa: S701 - Markdown of our own numbers
ENVIRONMENT.filters |= {
    "mean": statistics.fmean,
    "median": statistics.median,
    "geometric_mean": statistics.geometric_mean,
    "stdev": lambda values: statistics.stdev(found) if len(found := list(values)) > 1 else 0.0,
}
ENVIRONMENT.globals |= {"zip": zip, "len": len}


def files(root: Path) -> dict[str, str]:
    """The pages with tables as they should be, by their paths in the repository."""
    found = {}
    for pattern in PAGES:
        for path in root.glob(pattern):
            text = path.read_text(encoding="utf-8")
            if "<!-- table: " in text:
                found[path.relative_to(root).as_posix()] = filled(text, root / RESULTS)
    return found


def write(root: Path) -> None:
    """Fill the tables of all pages."""
    for name, text in files(root).items():
        if (root / name).read_text(encoding="utf-8") != text:
            (root / name).write_text(text, encoding="utf-8")
            print(name, file=sys.stderr)


def filled(text: str, results: Path) -> str:
    """A page with its tables filled from the files of a folder."""

    def table(match: re.Match[str]) -> str:
        mark, file, records, template, _, end = match.groups()
        body = read(results / file, (results / file).stat().st_mtime_ns)
        *head, row = template.split("\n")
        lines = [*head, *(line(row, record, body) for record in records_of(records, body))]
        return f"{mark}\n" + "\n".join(lines) + f"\n\n{end}"

    return _TABLE.sub(table, text)


@cache
def read(path: Path, _changed: int) -> Any:
    """A file of results, which is read again where it has changed."""
    return json.loads(path.read_text(encoding="utf-8"))


def records_of(text: str, body: Mapping[str, Any]) -> list[Any]:
    """What an expression finds in a file of results; entries of a mapping have `key` and `value`."""
    found = expression(text)(**body, body=body)
    if isinstance(found, Mapping):
        return [{"key": key, "value": value} for key, value in found.items()]
    return list(found or ())


def line(template: str, record: Any, body: Mapping[str, Any]) -> str:
    """A line of a table."""
    names = record if isinstance(record, Mapping) else {"row": record}
    out = []
    for before, field, form, _ in _FORMATTER.parse(template):
        out.append(before)
        if field is not None:
            try:
                value = expression(field)(**{**names, "row": record, "body": body})
            except (TypeError, UndefinedError):  # arithmetic with what the record lacks
                value = None
            out.append("–" if value is None else format(value, form or ""))
    return "".join(out)


@cache
def expression(text: str) -> Callable[..., Any]:
    return ENVIRONMENT.compile_expression(text)


if __name__ == "__main__":
    write(ROOT)
