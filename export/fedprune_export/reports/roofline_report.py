"""Report of an explained training step: a table and lines for a terminal, and a page with its bars."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune import __version__
from fedprune.core.text import amount, quantity
from fedprune.output.document import Bars, Block, Document, Table
from fedprune.output.page import Bar
from fedprune.output.tables import Column
from fedprune.runtime import session
from fedprune_export.profiling.roofline import Explained, Explanation

_FOLDED = 0.01  # pieces with a smaller share of the step share a row of the printed table

_COLUMNS = (
    Column("layer", wrap=12),
    Column("operator", drop=4),
    Column("part"),
    Column("form", drop=6),
    Column("MACs", right=True, drop=3),
    Column("moves", right=True, drop=5),
    Column("bound", right=True),
    Column("binds", drop=2),
)
_KINDS = {
    "products": "convolutions and products",
    "norms": "norms",
    "layout": "changes of layout",
    "update": "update of weights",
    "other": "all else",
}
_SHARES = (Column(""), Column("of the step", right=True), Column("share", right=True))
_PIECES = (
    "One bar per piece in the order of computation (→ forward, ← backward, dx and dw the gradients of input and weight)"
    ": the filled part is the least time that it can take, the whole bar what was measured, if anything was."
)
_LETTERS = {"forward": "→", "input gradient": "dx", "weight gradient": "dw", "backward": "←"}


def print_explanation(explanation: Explanation) -> None:
    """Print the table, with small pieces in one row, and the summary of the step."""
    table(explanation, fold=True).print()
    print("\n".join(summary(explanation)))


def document(explanation: Explanation) -> Document:
    facts = {
        "Model": explanation.model,
        "Batch size": str(explanation.batch),
        "Bounds": explanation.speed.source,
        "onnxruntime": session.version(),
        "fedprune": __version__,
    }
    spent = [
        (kind, amount(share * (explanation.step_s or 0.0), "s"), f"{share:.1%}")
        for kind, share in explanation.shares().items()
    ]
    sections: dict[str, Sequence[Block]] = {
        "": summary(explanation),
        "Time of every piece": (Bars(_bars(explanation.pieces), "Time of every piece of a step", caption=_PIECES),),
        "Time by kind": (Table(_SHARES, spent),),
        "Pieces": (table(explanation),),
    }
    return Document(f"A training step of {explanation.model}", facts, sections)


def table(explanation: Explanation, *, fold: bool = False) -> Table:
    """A row per piece in the order of computation.

    `fold`: give pieces that take less than a hundredth of the step (measured, else by their bounds) one row.
    """
    columns = list(_COLUMNS)
    if explanation.step_s is not None:
        columns.append(Column("measured" if explanation.speed.here else "measured here", right=True))
        columns += [Column("gap", right=True, drop=1)] if explanation.speed.here else []
    least = _FOLDED * sum(p.seconds for p in explanation.pieces)
    folded = [p for p in explanation.pieces if p.seconds < least] if fold else []
    shown = [p for p in explanation.pieces if p.seconds >= least] if len(folded) > 1 else explanation.pieces
    rows = [_row(explanation, (p.piece.title, p.piece.op, p.piece.part, p.piece.form), [p], p.binds) for p in shown]
    if len(folded) > 1:
        rows.append(_row(explanation, (f"{len(folded)} others", "", "", ""), folded, ""))
    return Table(columns, rows, "Pieces")


def _row(explanation: Explanation, words: Sequence[str], pieces: Sequence[Explained], binds: str) -> tuple[str, ...]:
    bound = sum(p.bound_s for p in pieces)
    row = [*(word or "–" for word in words), f"{sum(p.piece.macs for p in pieces):,}"]
    row += [amount(sum(p.piece.bytes for p in pieces), "bytes"), amount(bound, "s"), binds or "–"]
    if explanation.step_s is not None:
        took = sum(p.measured_s or 0.0 for p in pieces)
        row.append(amount(took, "s"))
        if explanation.speed.here:
            row.append(f"{took / bound:.1f}" if bound else "–")
    return tuple(row)


def summary(explanation: Explanation) -> list[str]:
    speed, took = explanation.speed, explanation.step_s
    lines = [f"bounds: {speed.flops / 1e9:,.1f} GFLOP/s and {speed.bytes_s / 1e9:,.1f} GB/s ({speed.source})"]
    macs = sum(p.piece.macs for p in explanation.pieces)
    step = f"a step of {quantity(explanation.batch, 'sample')}"
    least = f"{step}: {macs:,} MACs, at least {amount(explanation.bound_s, 's')}"
    if took is None:
        return [*lines, least]
    if speed.here:
        lines.append(f"{least}; measured {amount(took, 's')}, {took / explanation.bound_s:.1f} times that")
    else:
        lines.append(f"{least} on that board")
        lines.append(f"measured on this machine, which is another: {amount(took, 's')}")
    parts = (f"{_KINDS[kind]} {share:.0%}" for kind, share in explanation.shares().items())
    return [*lines, f"spent on: {', '.join(parts)}"]


def _bars(explained: Sequence[Explained]) -> list[Bar]:
    """One bar per piece: what it took, filled as far as the least that it can take."""
    longest = max((max(p.bound_s, p.seconds) for p in explained), default=0.0) or 1.0
    found = []
    for p in explained:
        least = f"at least {1000 * p.bound_s:.3g} ms"
        found.append(
            Bar(
                f"{p.piece.title} {_LETTERS.get(p.piece.part, p.piece.part)}".strip(),
                (("whole", 0.0, (p.measured_s or 0.0) / longest), ("held", 0.0, p.bound_s / longest)),
                least if p.measured_s is None else f"{1000 * p.measured_s:.3g} ms, {least}",
            )
        )
    return found
