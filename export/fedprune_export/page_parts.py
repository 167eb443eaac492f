"""What HTML pages are made of: style, tables, paragraphs, with nothing that is fetched from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence

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


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: Its title, as text.
        parts: What it shows, as HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{_CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """A table; columns in `words` hold text and are set to the left, as the first one is."""
    kind = ["" if i not in words else ' class="word"' for i in range(len(titles))]
    head = "".join(f"<th{k}>{text(t)}</th>" for t, k in zip(titles, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{text(c)}</td>" for c, k in zip(row, kind, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(svg: str) -> str:
    """A picture, which can be moved sideways where the screen is narrow."""
    return f'<div class="scroll">{svg}</div>'


def details(title: str, body: str) -> str:
    """Something that opens when it is clicked."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def paragraph(content: str) -> str:
    """A paragraph of text."""
    return f"<p>{text(content)}</p>"


def text(content: str) -> str:
    """Text of a model or file as text of the page: escaped, without control characters."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "�" for c in content))
