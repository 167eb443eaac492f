"""The HTML and SVG of charts and channel strips, which `output.chart` has laid out.

A chart is an SVG that stretches to its room, with its axes' labels as text around it, so that lines fit a phone and
letters keep their size. It shows everything without a script; `charts.js` adds the values under the pointer and a
legend that hides and highlights curves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from fedprune.output.chart import HEIGHT, LEVELS, MAX_TABLE_CURVES, WIDTH, Chart, Curve, Strip, last_value

# Curves whose values under the pointer fit on the line above the chart; those of more curves are in a box.
MAX_INLINE_CURVES = 3

# Entries from which a legend or list has a search field.
SEARCH_THRESHOLD = 20


def html_text(content: str) -> str:
    """Text as HTML: escaped, without control characters and lone surrogates, which no file of a page can hold."""
    return escape("".join(c if c.isprintable() or c == "\n" else "�" for c in content))


def chart_html(chart: Chart, *, legend: bool = True) -> str:
    """A chart as HTML, with a legend of its own if asked for."""
    is_inline = len(chart.curves) <= MAX_INLINE_CURVES
    latest = ", ".join(
        f"{c.name} {last_value(c.values)}" if len(chart.curves) > 1 else last_value(c.values) for c in chart.curves
    )
    keys_html = legend_html([(c.name, c.style) for c in chart.curves]) if legend and len(chart.curves) > 1 else ""
    words = (chart.x_title, chart.positions[-1])
    heading = " ".join(words if chart.x_title == "round" else reversed(words))
    # A run that cost less ends further to the left.
    has_several_ends = chart.x_title != "round" and len(chart.curves) > 1
    latest_html = html_text(
        ", ".join(_end_text(chart, c) for c in chart.curves) if has_several_ends else f"{heading}: {latest}"
    )
    output = f'<output aria-hidden="true">{latest_html}</output>' if is_inline else ""
    plot_html = "".join(f'<line class="rule" x1="0" x2="{WIDTH}" y1="{y:g}" y2="{y:g}"/>' for y in chart.grid_lines)
    for i, curve in enumerate(chart.curves):
        shapes = "".join(f'<polyline class="{curve.style}" points="{points}"/>' for points in curve.paths)
        shapes += "".join(f'<path class="{curve.style} dot" d="{d}"/>' for d in curve.dots)
        plot_html += f'<g data-curve="{i}">{shapes}</g>'
    data = {
        "along": chart.x_title,
        "names": [c.name for c in chart.curves],
        "styles": [c.style for c in chart.curves],
        "at": chart.plot_x,
        "places": chart.positions,
        "values": chart.values,
    }
    serialised = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in data.items()}
    attributes = " ".join(f'data-{k}="{html_text(v)}"' for k, v in serialised.items())
    return (
        f'<figure id="chart-{html_text(chart.key)}"{" data-charts" * legend}>'
        f'<div class="keys">{keys_html}{output}</div><div class="chart">'
        f'<div class="ys" aria-hidden="true">{_label_spans(chart.marks_y)}</div><div class="plot" {attributes}>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html_text(chart.summary)}">{plot_html}</svg></div>'
        f'<div class="xs" aria-hidden="true">{_label_spans(chart.marks_x)}</div></div>{_value_table(chart)}</figure>'
    )


def _end_text(chart: Chart, curve: Curve) -> str:
    places = zip(reversed(chart.positions), reversed(curve.values), strict=True)
    return f"{curve.name} {next((f'{value} ({place} {chart.x_title})' for place, value in places if value), 'unknown')}"


def legend_html(entries: Sequence[tuple[str, str]]) -> str:
    """A legend whose entries (name and CSS classes) hide and show their curves; a long one has a search field."""
    keys = "".join(
        f'<button type="button" class="key {style}" aria-pressed="true" data-key-of="{i}" title="Hide or show">'
        f"{html_text(name)}</button>"
        for i, (name, style) in enumerate(entries)
    )
    if len(entries) <= SEARCH_THRESHOLD:
        return keys
    field = search_field("Search the legend")
    return f'{field}<div class="many" tabindex="0" role="group" aria-label="Legend">{keys}</div>'


def search_field(label: str) -> str:
    """A field that hides the entries after it that don't contain its text."""
    name = html_text(label)
    return f'<input type="search" class="filter" data-search aria-label="{name}" placeholder="{name}">'


def strip_svg(strip: Strip) -> str:
    """A strip as an SVG that stretches to its room."""
    runs = "".join(f'<rect class="h{r.level}" x="{r.x}" width="{r.width}" height="1"/>' for r in strip.runs)
    return (
        f'<svg class="strip" viewBox="0 0 {max(strip.channels, 1)} 1" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges" aria-hidden="true">{runs}</svg>'
    )


def heat_scale(lowest: str = "none", highest: str = "all") -> str:
    """The heat map's scale, with what its ends stand for."""
    steps = "".join(f'<rect class="h{i}" x="{i}" width="1" height="1"/>' for i in range(LEVELS + 1))
    return (
        f'<div class="scale"><span>{html_text(lowest)}</span><svg viewBox="0 0 {LEVELS + 1} 1" '
        f'preserveAspectRatio="none" aria-hidden="true">{steps}</svg><span>{html_text(highest)}</span></div>'
    )


def _value_table(chart: Chart) -> str:
    """The table of values below a chart; empty if it would have too many columns."""
    if len(chart.curves) > MAX_TABLE_CURVES:
        return ""
    name = html_text(f"{chart.title} as numbers")
    head = "".join(f'<th scope="col" class="num">{html_text(c.name)}</th>' for c in chart.curves)
    rows = "".join(
        f'<tr><th scope="row">{html_text(place)}</th>'
        + "".join(f'<td class="num">{html_text(v) or "–"}</td>' for v in values)
        + "</tr>"
        for place, values in chart.table_rows
    )
    return (
        f'<details class="numbers" id="numbers-{html_text(chart.key)}"><summary>{name}</summary>'
        f'<div class="table" tabindex="0" role="region" aria-label="{name}"><table><thead><tr>'
        f'<th scope="col">{html_text(chart.x_title)}</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _label_spans(texts: Sequence[str]) -> str:
    return "".join(f"<span>{html_text(t)}</span>" for t in texts)
