"""The report of an export as one HTML page: tables and pictures, with nothing that is fetched from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence

from fedprune_export import pictures
from fedprune_export.parity import SAMPLES
from fedprune_export.report import Report, places, score

_CSS = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #fff; --line: #d8dee4; --soft: #f6f8fa }
:root { --cut: #dfe3e8; --kept: #1f6f8b }
@media (prefers-color-scheme: dark) {
:root { --ink: #d7dde3; --paper: #14181d; --line: #343b43; --soft: #1d2329; --cut: #2d343c; --kept: #58b4d1 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem }
body { margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem } summary { cursor: pointer }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { background: var(--soft) } th:first-child, td:first-child, td.word, th.word { text-align: left }
td.word { overflow-wrap: anywhere } pre { background: var(--soft); padding: .8rem; overflow-x: auto }
svg { max-width: 100%; height: auto; display: block } svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
svg .cut { fill: var(--cut) } svg .kept { fill: var(--kept) } .scroll { overflow-x: auto }
"""


_LAYERS = ("layer", "operator", "weight", "as cut", "multiplications", "as cut", "bytes made", "as cut")


def page(report: Report) -> str:
    """The page.

    Args:
        report: What to show.
    """
    architecture, widths = report.model.architecture, report.selection.widths
    title = f"{architecture.name} for {report.target}"
    rows = [(f.title, *f.shown(), f.kept) for f in report.figures()]
    if report.accuracy is not None:
        a = report.accuracy
        rows.append((f"{a.measure} on {a.samples:,} given samples", score(a, a.before), score(a, a.after), ""))
    groups = [
        (g.name, f"{g.size:,}", f"{w:,}", places(architecture.summary(i), 40).replace("`", ""))
        for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
    ]
    layers = [(r.title, r.op, *r.shown(), *(f"{n:,}" for n in (*r.macs, *r.activation_bytes))) for r in report.layers()]
    parts = [
        f"<h1>{_text(title)}</h1>",
        *([_paragraph(f"Second tier: {report.advice}")] if report.advice else []),
        _paragraph(
            f"Channels were ranked by {report.scorer}. On {SAMPLES} random inputs the bundle differs from the whole "
            f"model with the lost channels masked by at most {report.parity:.1e} of the largest output."
        ),
        _table(("", "whole model", "this bundle", "kept"), rows),
        f"<h2>Plan</h2><pre>{_text(report.plan_text())}</pre>",
        *_precisions(report),
        "<h2>What was cut</h2>",
        _paragraph("One bar per channel group, its channels in the model's own order: dark ones are kept."),
        f'<div class="scroll">{pictures.channel_bars(report.selection)}</div>',
        _details("Where the groups live", _table(("group", "channels", "kept", "lives in"), groups, words=(3,))),
        "<h2>Layers</h2>",
        _paragraph("Output channels of every layer: the whole bar before, its dark part after."),
        f'<div class="scroll">{pictures.layer_widths(architecture, widths)}</div>',
        _details(
            "Shapes, multiplications and activations of one sample",
            _table(_LAYERS, layers, words=(1,)),
        ),
        "<h2>Files</h2>",
        _table(("file", "bytes"), [(n, f"{size:,}") for n, size in report.sizes.items()]),
    ]
    if report.model.notes:
        parts += ["<h2>Notes of the import</h2><ul>", *(f"<li>{_text(n)}</li>" for n in report.model.notes), "</ul>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _precisions(report: Report) -> list[str]:
    rows = [(t.lowered.precision, t.describe()) for t in report.trials]
    return ["<h2>Lower precision</h2>", _table(("", "beside float32"), rows, words=(1,))] if rows else []


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """A table; columns in `words` hold text and are set to the left, as the first one is."""
    kind = ["" if i not in words else ' class="word"' for i in range(len(titles))]
    head = "".join(f"<th{k}>{_text(t)}</th>" for t, k in zip(titles, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{_text(c)}</td>" for c, k in zip(row, kind, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{body}</details>"


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _text(text: str) -> str:
    """Text of a model or file as text of the page: escaped, without control characters."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text))
