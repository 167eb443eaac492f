"""`operators`: every operator that can be cut or trained, out of the registries of rules."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedprune.core.errors import ExitCode
from fedprune.output import tables
from fedprune.output.tables import Column


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "operators",
        help="every operator that can be cut or trained",
        description="Print every operator with what its channel rule and its gradient rule do, and in which forms it "
        "is read and written. Channels of an operator without a channel rule stay; a model with one without a gradient "
        "rule can't be trained.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(function=operators)


_COLUMNS = (
    Column("operator"),
    Column("channels", wrap=16),
    Column("gradient", wrap=16),
    Column("forms", drop=1, wrap=16),
)


def operators(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = table()
    if arguments.json:
        tables.print_json(rows)
        return int(ExitCode.OK)
    tables.print_table(
        _COLUMNS, [(r["operator"], r["channels"] or "–", r["gradient"] or "–", r["forms"] or "") for r in rows]
    )
    return int(ExitCode.OK)


def table() -> list[dict[str, Any]]:
    """One row per operator: its name and the first line of each rule's docstring, or None."""
    from fedprune_export.autodiff.tape import RULES as GRADIENTS
    from fedprune_export.channels.rule import RULES as CHANNELS

    forms = _forms()
    names = sorted({*CHANNELS, *GRADIENTS, *forms})
    return [
        {
            "operator": name,
            "channels": _said(CHANNELS, name),
            "gradient": _said(GRADIENTS, name),
            "forms": forms.get(name),
        }
        for name in names
    ]


_BECOMES = {
    "Attention": "products, Softmax and reshapes, on import",
    "CastLike": "Cast, on import",
    "Col2Im": "a transposed convolution with a constant kernel, on import",
    "DFT": "a product with a constant matrix, on import",
    "RotaryEmbedding": "products with cosines and sines, on import",
    "STFT": "a convolution with constant waves, on import",
    "Swish": "a product with Sigmoid, on import",
    "SplitToSequence": "Split, on import",
    "ConcatFromSequence": "Concat, on import",
}
"""What operators become that no rule needs to know."""


def _forms() -> Mapping[str, str]:
    """In which forms operators are read and written."""
    from fedprune_export.importing.control_flow import CONTROL_FLOW
    from fedprune_export.importing.sequences import SEQUENCE_OPERATORS
    from fedprune_export.importing.translation import TRANSLATED
    from fedprune_export.ir.composites import COMPOSITES, NATIVE
    from fedprune_export.ir.opset_lowering import EARLIER_FORMS, LATER_FORMS

    out: dict[str, list[str]] = {}
    for name in CONTROL_FLOW:
        out[name] = ["written out on import, where it doesn't depend on the data"]
    for name in sorted(SEQUENCE_OPERATORS | {n for n in TRANSLATED if n in _BECOMES}):
        out[name] = [f"becomes {_BECOMES[name]}" if name in _BECOMES else "dissolved on import"]
    for name in sorted(TRANSLATED - set(out)):
        out[name] = ["later forms are read, too"]
    for name, since in NATIVE.items():
        found = "found where it is written out in primitives" if name in COMPOSITES else "found in primitives"
        out.setdefault(name, []).append(f"{found}; written so below opset {since}")
    for forms in (LATER_FORMS, EARLIER_FORMS):
        for name, since in forms.items():
            out.setdefault(name, []).append(f"written in its newer form from opset {since} on")
    return {name: "; ".join(parts) for name, parts in out.items()}


_FORMULA = re.compile(r"(Dx|Y|X)\b(?= *[=/·(])")


def _said(rules: Mapping[str, Callable[..., Any]], name: str) -> str | None:
    """The first line of a rule's description; of one without, its family."""
    rule = rules.get(name)
    if rule is None:
        return None
    text = (inspect.getdoc(rule) or rule.__module__.rpartition(".")[2]).splitlines()[0]
    # Sentences begin with capitals, also where a formula begins with dx.
    return _FORMULA.sub(lambda m: m.group().lower(), text, count=1) if _FORMULA.match(text) else text
