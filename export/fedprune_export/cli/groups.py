"""`groups MODEL`: prints which channels can only be cut together, and which stay."""

from __future__ import annotations

import argparse
from typing import Any

from fedprune.core.cli import add_json_option, print_json
from fedprune.output import tables
from fedprune_export.cli.options import MODEL_HELP, read_model
from fedprune_export.model_options import add_model_options


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "groups",
        description="Print the groups of channels that can only be kept or cut together, every axis on which each "
        "lives (conv1.weight[0] is the first one), the axes that stay whole, and why.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_json_option(parser)
    add_model_options(parser)
    parser.set_defaults(function=print_groups)


def print_groups(arguments: argparse.Namespace) -> None:
    """Print a model's channel groups."""
    # On stderr, so that the result can be piped.
    with tables.progress() as tell:
        tell(f"importing {arguments.model}")
        model = read_model(arguments)
    if arguments.json:
        print_json(model.groups.to_dict())
    else:
        print(model.groups)
