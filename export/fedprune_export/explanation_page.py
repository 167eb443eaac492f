"""An explanation of a training step as one HTML page: where its time goes, drawn and in numbers."""

from __future__ import annotations

from fedprune.terminal import amount
from fedprune_export import pictures
from fedprune_export.explanation import Explanation
from fedprune_export.page_parts import document, paragraph, picture, table, text

_LETTERS = {"forward": "→", "input gradient": "dx", "weight gradient": "dw", "backward": "←"}
"""Signs of parts, as labels of bars are short."""


def page(explanation: Explanation) -> str:
    """The page.

    Args:
        explanation: What to show.
    """
    title = f"A training step of {explanation.model}"
    rows = [
        (f"{p.piece.title} {_LETTERS.get(p.piece.part, p.piece.part)}".strip(), p.bound_s, p.measured_s)
        for p in explanation.pieces
    ]
    parts = [
        f"<h1>{text(title)}</h1>",
        *map(paragraph, explanation.summary()),
        "<h2>Where the time goes</h2>",
        paragraph(
            "One bar per piece in the order of computation (→ forward, ← backward, dx and dw the gradients of input "
            "and weight): as long as what was measured, if anything was, and dark as long as the least time."
        ),
        picture(pictures.times(rows)),
    ]
    if explanation.step_s is not None:
        spent = [
            (kind, amount(share * explanation.step_s, "s"), f"{share:.1%}")
            for kind, share in explanation.shares().items()
        ]
        parts += ["<h2>What it is spent on</h2>", table(("", "of the step", "share"), spent)]
    parts += ["<h2>Pieces</h2>", table([c.title for c in explanation.columns], explanation.rows(), words=(1, 2, 3, 7))]
    return document(title, parts)
