"""`operators`: every operator that can be cut or trained, out of the registries of rules."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedprune.errors import ExitCode
from fedprune_export import terminal


def register(subparsers: Any) -> None:
    """Add the command `operators`; its function takes the parsed arguments and returns an exit code.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "operators",
        help="every operator that can be cut or trained",
        description="Print every operator with what its channel rule, its gradient rule and the import do with it. "
        "Channels of an operator without a channel rule stay; a model with one that has no gradient rule can't be "
        "trained.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(function=operators)


def operators(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = table()
    if arguments.json:
        terminal.print_json(rows)
        return int(ExitCode.OK)
    terminal.print_table(
        ("operator", "channels", "gradient", "import"),
        [(r["operator"], r["channels"] or "–", r["gradient"] or "–", r["import"] or "") for r in rows],
    )
    return int(ExitCode.OK)


def table() -> list[dict[str, Any]]:
    """One row per operator: its name, and in a line each what the rules say of themselves; None where there is none."""
    from fedprune_export.channels.rule import RULES as CHANNELS
    from fedprune_export.gradients.tape import RULES as GRADIENTS

    imported = _import_notes()
    names = sorted({*CHANNELS, *GRADIENTS, *imported})
    return [
        {
            "operator": name,
            "channels": _said(CHANNELS, name),
            "gradient": _said(GRADIENTS, name),
            "import": imported.get(name),
        }
        for name in names
    ]


def _import_notes() -> Mapping[str, str]:
    """What becomes of operators before any rule sees them."""
    return {}


def _said(rules: Mapping[str, Callable[..., Any]], name: str) -> str | None:
    """The first line of a rule's description; of one without, its family."""
    rule = rules.get(name)
    if rule is None:
        return None
    return (inspect.getdoc(rule) or rule.__module__.rpartition(".")[2]).splitlines()[0]
