"""`operators`: prints the operators that can be cut or trained, from the registries of rules."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedprune.core.cli import add_json_option, print_json
from fedprune.output import tables
from fedprune.output.tables import Column


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "operators",
        description="Print every operator with what its channel rule and its gradient rule do, and in which opsets' "
        "forms it is read and written. Channels of an operator without a channel rule stay; a model with one "
        "without a gradient rule can't be trained.",
    )
    add_json_option(parser)
    parser.set_defaults(function=print_operators)


_OPERATOR_COLUMNS = (
    Column("operator"),
    Column("channels", min_width=16),
    Column("gradient", min_width=16),
    Column("forms", drop_order=1, min_width=16),
)


def print_operators(arguments: argparse.Namespace) -> None:
    """Print the table."""
    rows = operator_rows()
    if arguments.json:
        print_json(rows)
        return
    texts = [(r["operator"], r["channels"] or "–", r["gradient"] or "–", r["forms"] or "") for r in rows]
    tables.print_table(_OPERATOR_COLUMNS, texts)


def operator_rows() -> list[dict[str, Any]]:
    """One row per operator: its name and the first line of each rule's docstring, or None."""
    # Imported late, as everywhere in this room: help texts must not wait for onnx and onnxruntime.
    from fedprune_export.autodiff.tape import RULES as GRADIENTS
    from fedprune_export.channels.rule import RULES as CHANNELS
    from fedprune_export.ir.operators import load_rules

    forms = _forms()
    names = sorted({*load_rules(CHANNELS), *load_rules(GRADIENTS), *forms})
    return [
        {
            "operator": name,
            "channels": _summary(CHANNELS, name),
            "gradient": _summary(GRADIENTS, name),
            "forms": forms.get(name),
        }
        for name in names
    ]


def _forms() -> Mapping[str, str]:
    """The forms in which operators are read and written."""
    from fedprune_export.importing import fused_operators
    from fedprune_export.importing.control_flow import WRITTEN_OUT
    from fedprune_export.importing.inlining import BY_DEFINITION
    from fedprune_export.importing.translation import CHANGED, REPLACED
    from fedprune_export.ir.opset_lowering import NATIVE_SINCE, NEWER_FORMS

    forms_of: dict[str, list[str]] = {}
    forms_of |= {name: ["later forms are read, too"] for name in CHANGED}
    forms_of |= {name: [form] for name, form in WRITTEN_OUT.items()}
    fused = {f"com.microsoft::{name}": rule for name, rule in fused_operators.RULES.items()}
    forms_of |= {name: [f"on import: {_summary(REPLACED | fused, name)}"] for name in REPLACED | fused}
    forms_of |= {name: [f"becomes {form} on import"] for name, form in BY_DEFINITION.items()}
    for name, since in NATIVE_SINCE.items():
        forms_of.setdefault(name, []).append(f"recognised in its decomposed form; written so below opset {since}")
    for name, since in NEWER_FORMS.items():
        forms_of.setdefault(name, []).append(f"written in its newer form from opset {since} on")
    return {name: "; ".join(texts) for name, texts in forms_of.items()}


def _summary(rules: Mapping[str, Callable[..., Any]], name: str) -> str | None:
    """The first line of a rule's docstring; without one, the rule's module."""
    rule = rules.get(name)
    return None if rule is None else (inspect.getdoc(rule) or rule.__module__.rpartition(".")[2]).splitlines()[0]
