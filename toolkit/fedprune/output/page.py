"""A report as one HTML file that needs no other: its frame, header, tables and lists of bars."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fedprune.output.chart import Chart, Strip, series_classes
from fedprune.output.chart_html import SEARCH_THRESHOLD, chart_html, html_text, legend_html, search_field, strip_svg

# A segment of a bar: CSS class, start and end as shares of the bar's room.
BarSegment = tuple[str, float, float]


@dataclass(frozen=True)
class Bar:
    """A row of a list of bars: segments of one bar, or a strip per channel group; then a note, and a tooltip."""

    name: str
    segments: Sequence[BarSegment] | Sequence[Strip]
    note: str = ""
    title: str = ""


def page_html(title: str, sections: Sequence[str], facts: Mapping[str, str] | None = None) -> str:
    """A whole page; `facts` is what the header names, such as strategy, data set, seed and version, without empty
    values."""
    script = re.sub(r"^export ", "", _asset("charts.js"), flags=re.MULTILINE) + _START_SCRIPT
    # The policy allows this one script, images within the page and nothing else, so that device names in a report can't
    # run code.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    present_facts = {k: v for k, v in (facts or {}).items() if v}
    facts_html = "".join(f"<div><dt>{html_text(k)}</dt><dd>{html_text(v)}</dd></div>" for k, v in present_facts.items())
    header = f'<dl class="facts">{facts_html}</dl>' if present_facts else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html_text(title)}</title><style>{_asset('page.css')}{_asset('charts.css')}</style></head><body><main>"
        f"<h1>{html_text(title)}</h1>{header}{''.join(sections)}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def section_html(title: str, *content: str) -> str:
    """A heading and what follows; nothing where all content is empty."""
    return f"<section><h2>{html_text(title)}</h2>{''.join(content)}</section>" if any(content) else ""


def table_html(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (), label: str = ""
) -> str:
    """A table; a long one has a search field and scrolls.

    `words` are columns of text, aligned to the left as the first one is; the others hold numbers. `label` is the name
    for screen readers, by default the column headings.
    """
    kinds = ["" if not i else ' class="word"' if i in words else ' class="num"' for i in range(len(titles))]
    heads = zip(titles, kinds, strict=True)
    head = "".join(f'<th scope="col"{k}>{html_text(t)}</th>' if t else f"<td{k}></td>" for t, k in heads)
    label = label or ", ".join(filter(None, titles))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{html_text(c)}</th>' if not j else f"<td{k}>{html_text(c)}</td>"
            for j, (c, k) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    long = len(rows) > SEARCH_THRESHOLD
    return (
        (search_field(f"Search {len(rows):,} rows") if long else "")
        + f'<div class="table{" long" * long}" tabindex="0" role="group" aria-label="{html_text(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bars_html(rows: Sequence[Bar], label: str) -> str:
    """A list of bars; a long one has a search field and scrolls."""
    long = len(rows) > SEARCH_THRESHOLD
    rows_html = "".join(
        f'<li title="{html_text(row.title or ": ".join(filter(None, (row.name, row.note))))}">'
        f'<span class="name">{html_text(row.name)}</span>'
        f'{_bar_svg(row.segments)}<span class="note">{html_text(row.note)}</span></li>'
        for row in rows
    )
    return (
        search_field(f"Search {len(rows):,} rows") if long else ""
    ) + f'<ul class="bars{" tall" * long}" tabindex="0" aria-label="{html_text(label)}">{rows_html}</ul>'


def colour_legend(names: Sequence[str]) -> str:
    """A legend of filled colours, in the order of `style`."""
    keys = "".join(f'<span class="key box {series_classes(i)}">{html_text(n)}</span>' for i, n in enumerate(names))
    return f'<div class="keys">{keys}</div>'


def stacked_segments(amounts: Sequence[float], total: float) -> tuple[BarSegment, ...]:
    """Segments of a bar one after the other, in the colours of `colour_legend`; `total` fills the bar's room."""
    segments: list[BarSegment] = []
    start = 0.0
    for i, amount in enumerate(amounts):
        end = start + amount
        segments.append((f"part {series_classes(i)}", start / total if total else 0.0, end / total if total else 0.0))
        start = end
    return tuple(segments)


def charts_html(panels: Sequence[Chart], key: str) -> str:
    """Charts of the same curves next to each other, with one legend."""
    # That of the chart with the most curves: the others lack curves without a value.
    curves = max((c.curves for c in panels), key=len, default=())
    legend = f'<div class="keys">{legend_html([(c.name, c.style) for c in curves])}</div>' if len(curves) > 1 else ""
    figures = "".join(f"<div><h3>{html_text(c.title)}</h3>{chart_html(c, legend=False)}</div>" for c in panels)
    return f'<div data-charts id="{html_text(key)}">{legend}<div class="charts">{figures}</div></div>'


def list_html(lines: Sequence[str]) -> str:
    """A list; PASS or FAIL at the beginning of a line has a colour."""
    entries_html = "".join(f"<li>{_VERDICT_WORD.sub(_verdict_html, html_text(line))}</li>" for line in lines)
    return f"<ul>{entries_html}</ul>" if entries_html else ""


_VERDICT_WORD = re.compile("^(PASS|FAIL)(?=: )")


def _verdict_html(verdict: re.Match[str]) -> str:
    return f'<b class="{"held" if verdict[1] == "PASS" else "failed"}">{verdict[1]}</b>'


def details_html(title: str, body: str) -> str:
    """Content that a click unfolds."""
    return f"<details><summary>{html_text(title)}</summary>{body}</details>"


def paragraph_html(content: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html_text(content)}</p>' if kind else f"<p>{html_text(content)}</p>"


_START_SCRIPT = "watchCharts();\ndocument.documentElement.dataset.awake = '';\n"
_BAR_UNITS = 1000


def _bar_svg(segments: Sequence[BarSegment] | Sequence[Strip]) -> str:
    strips = [p for p in segments if isinstance(p, Strip)]
    if strips:
        return f'<span class="tiles">{"".join(map(strip_svg, strips))}</span>'
    rects = "".join(
        f'<rect class="{p[0]}" x="{_BAR_UNITS * p[1]:.4g}" width="{_BAR_UNITS * (p[2] - p[1]):.4g}" height="1"/>'
        for p in segments
        if not isinstance(p, Strip)
    )
    return (
        f'<svg class="strip" viewBox="0 0 {_BAR_UNITS} 1" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>'
    )


@cache
def _asset(name: str) -> str:
    return files("fedprune.output").joinpath(f"static/{name}").read_text(encoding="utf-8")
