"""An explanation of a training step as one HTML page: where its time goes, drawn and in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune import __version__
from fedprune.core.text import amount
from fedprune.report.page import Bar, bars, document, paragraph, section, table
from fedprune.runtime import session
from fedprune_export.profiling.roofline import Explained, Explanation

_LETTERS = {"forward": "→", "input gradient": "dx", "weight gradient": "dw", "backward": "←"}


def page(explanation: Explanation) -> str:
    """The page.

    Args:
        explanation: What to show.
    """
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
    parts = [
        *map(paragraph, explanation.summary()),
        section(
            "Time of every piece",
            paragraph(
                "One bar per piece in the order of computation (→ forward, ← backward, dx and dw the gradients of "
                "input and weight): the filled part is the least time that it can take, the whole bar what was "
                "measured, if anything was."
            ),
            bars(pieces(explanation.pieces), "Time of every piece of a step"),
        ),
        section("Time by kind", table(("", "of the step", "share"), spent) if spent else ""),
        section(
            "Pieces",
            table([c.title for c in explanation.columns], explanation.rows(), words=(1, 2, 3, 7), label="Pieces"),
        ),
    ]
    return document(f"A training step of {explanation.model}", parts, facts)


def pieces(explained: Sequence[Explained]) -> list[Bar]:
    """One bar per piece: what it took, filled as far as the least that it can take."""
    longest = max((max(p.bound_s, p.measured_s or 0.0) for p in explained), default=0.0) or 1.0
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
