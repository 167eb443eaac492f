"""A report's content, and its two renderings: an HTML page that needs no other file, and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedprune.output import page, tables
from fedprune.output.tables import Column


@dataclass(frozen=True)
class Table:
    """A table; an empty one is left out.

    Attributes:
        summary: The line to click that unfolds it on a page; without one it is always shown.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    label: str = ""
    summary: str = ""

    def print(self) -> None:
        """Print it on a terminal, or tab-separated into a pipe."""
        tables.print_table(self.columns, self.rows)

    def to_markdown(self) -> str:
        return "\n".join(_block_markdown(self))


@dataclass(frozen=True)
class Bars:
    """Bars of a page.

    Attributes:
        legend: Names of the colours, if bars have several.
        is_listed: Whether Markdown lists their texts, because no table has them.
    """

    rows: Sequence[page.Bar]
    label: str
    legend: Sequence[str] = ()
    caption: str = ""
    is_listed: bool = False


@dataclass(frozen=True)
class Drawing:
    """HTML of a page, such as charts; Markdown has none of it."""

    html: str


# A paragraph, a list, a table, bars or a drawing; empty ones are left out.
Block = str | tuple[str, ...] | Table | Bars | Drawing


@dataclass(frozen=True)
class Document:
    """A report's content.

    Attributes:
        facts: What the header names; empty values are left out.
        sections: Blocks by heading; those without a heading come under "".
    """

    title: str
    facts: Mapping[str, str]
    sections: Mapping[str, Sequence[Block]] = field(default_factory=dict)

    def to_html(self) -> str:
        sections_html = [
            page.section_html(title, *map(_block_html, blocks)) if title else "".join(map(_block_html, blocks))
            for title, blocks in self.sections.items()
        ]
        return page.page_html(self.title, sections_html, self.facts)

    def to_markdown(self) -> str:
        facts = ", ".join(f"{name}: {value}" for name, value in self.facts.items() if value)
        paragraphs = [f"# {self.title}", facts]
        for title, blocks in self.sections.items():
            texts = ["\n".join(_block_markdown(block)) for block in blocks]
            if any(texts):
                paragraphs += [f"## {title}" if title else "", *texts]
        return "\n\n".join(filter(None, paragraphs)) + "\n"


def _block_html(block: Block) -> str:
    if isinstance(block, str):
        return page.paragraph_html(block, "warning" if block.startswith("warning: ") else "") if block else ""
    if isinstance(block, Drawing):
        return block.html
    if isinstance(block, Bars):
        head = (page.paragraph_html(block.caption) if block.caption else "") + (
            page.colour_legend(block.legend) if block.legend else ""
        )
        return head + page.bars_html(block.rows, block.label) if block.rows else ""
    if isinstance(block, Table):
        text_columns = [i for i, column in enumerate(block.columns) if i and not column.is_right_aligned]
        titles = [column.title for column in block.columns]
        table_markup = page.table_html(titles, block.rows, words=text_columns, label=block.label) if block.rows else ""
        return page.details_html(block.summary, table_markup) if table_markup and block.summary else table_markup
    return page.list_html(block)


def _block_markdown(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield _one_line(block)
    elif isinstance(block, Bars):
        yield from (f"- {_one_line(bar.title or f'{bar.name}: {bar.note}')}" for bar in block.rows if block.is_listed)
    elif isinstance(block, Table):
        if block.rows:
            yield _markdown_row([column.title for column in block.columns])
            yield _markdown_row(["---:" if column.is_right_aligned else "---" for column in block.columns])
            yield from map(_markdown_row, block.rows)
    elif not isinstance(block, Drawing):
        yield from (f"- {_one_line(item)}" for item in block)


def _markdown_row(cells: Sequence[str]) -> str:
    # An unescaped bar would begin another cell.
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(text.split())
