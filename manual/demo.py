"""README's figures and curves of the demo: both made from the records of one run, which are committed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.report import claims
from fedprune_server.simulation.results.tables import final_rows, result_table, tail_note

RESULTS = "benchmarks/results/demo.json"
IMAGE = "docs/images/demo-curves.svg"
PAGE = "README.md"

_BEGIN, _END = "<!-- demo: python -m benchmarks.demo -->\n", "<!-- end -->"
_WIDTH, _HEIGHT = 330, 150
"""Of a chart's plot, in pixels."""

_LEFT, _TOP, _GAP_X, _GAP_Y = 52, 62, 70, 66
_STEPS = 4
"""Parts of an axis."""

_STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #24292f; } .page { fill: #ffffff; }
    .title { font-weight: 600; font-size: 14px; } .rule { stroke: #d0d7de; } .small { fill: #57606a; }
    .one { stroke: #0072b2; } .two { stroke: #d55e00; stroke-dasharray: 5 3; }
    polyline, .key { fill: none; stroke-width: 2; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .page { fill: #0d1117; } .rule { stroke: #30363d; } .small { fill: #9198a1; }
      .one { stroke: #56b4e9; } .two { stroke: #f0883e; }
    }
"""


def records(root: Path) -> tuple[Record, Record]:
    """The two runs of the demo: the fleet's, and FedAvg's."""
    body = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    fleet, reference = (Record.from_json(json.dumps(body[name]), RESULTS) for name in ("fleet", "reference"))
    return fleet, reference


def files(root: Path) -> dict[str, str]:
    """The picture, and README with its figures as they should be, by their paths.

    Args:
        root: The repository.
    """
    fleet, reference = records(root)
    text = (root / PAGE).read_text(encoding="utf-8")
    head, _, rest = text.partition(_BEGIN)
    verdicts = [f"- {claim}" for claim in claims(fleet, reference)]
    table, note = result_table(final_rows((fleet, reference))).to_markdown(), tail_note((fleet, reference))
    block = "\n".join(["", table, "", note, "", *verdicts, "", ""])
    return {IMAGE: drawing((fleet, reference)), PAGE: head + _BEGIN + block + _END + rest.partition(_END)[2]}


def drawing(runs: Sequence[Record]) -> str:
    """Accuracies of the global model and of the boards' own, by rounds and by bytes sent."""
    width, height = _LEFT + 2 * _WIDTH + _GAP_X + 24, _TOP + 2 * _HEIGHT + _GAP_Y + 34
    title = "Accuracy of the global model and of the boards' own, by rounds and by bytes sent"
    shapes = [f'<rect class="page" width="{width}" height="{height}"/>']
    for i, (run, style) in enumerate(zip(runs, ("one", "two"), strict=True)):
        x = _LEFT + 130 * i
        shapes.append(f'<line class="key {style}" x1="{x}" y1="18" x2="{x + 24}" y2="18"/>')
        shapes.append(f'<text x="{x + 32}" y="22">{escape(run.title)}</text>')
    kinds = (("Global accuracy", Record.global_values), ("Mean local accuracy", Record.mean_locals))
    for column, (along, unit) in enumerate((("by round", ""), ("by bytes sent", " MB"))):
        for row, (kind, values) in enumerate(kinds):
            places = [[float(r.round) if not unit else (r.down + r.up) / 1e6 for r in run.rounds] for run in runs]
            curves = [
                [(x, y) for x, y in zip(xs, values(run), strict=True) if y is not None]
                for xs, run in zip(places, runs, strict=True)
            ]
            x, y = _LEFT + column * (_WIDTH + _GAP_X), _TOP + row * (_HEIGHT + _GAP_Y)
            shapes += _chart(x, y, f"{kind}, {along}", curves, unit)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(title)}</title>\n'
    return head + f"<style>{_STYLE}</style>\n" + "\n".join(shapes) + "\n</svg>\n"


def _chart(left: int, top: int, title: str, curves: Sequence[Sequence[tuple[float, float]]], unit: str) -> list[str]:
    """A chart from 20 to 100 % whose x axis begins at 0."""
    least = 0.2
    most = max(x for curve in curves for x, _ in curve)
    shapes = [f'<text class="title" x="{left}" y="{top - 12}">{escape(title)}</text>']
    for i in range(_STEPS + 1):
        share = i / _STEPS
        y = top + _HEIGHT * (1 - share)
        shapes.append(f'<line class="rule" x1="{left}" y1="{y:.1f}" x2="{left + _WIDTH}" y2="{y:.1f}"/>')
        label = f"{100 * (least + share * (1 - least)):.0f}%"
        shapes.append(f'<text class="small" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        x, label = left + _WIDTH * share, f"{most * share:.0f}{unit}"
        shapes.append(f'<text class="small" x="{x:.1f}" y="{top + _HEIGHT + 20}" text-anchor="middle">{label}</text>')
    for curve, style in zip(curves, ("one", "two"), strict=True):
        points = " ".join(
            f"{left + _WIDTH * x / most:.1f},{top + _HEIGHT * (1 - max(0.0, y - least) / (1 - least)):.1f}"
            for x, y in curve
        )
        shapes.append(f'<polyline class="{style}" points="{points}"/>')
    return shapes
