"""`explain MODEL`: where the time of a training step goes, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import fedprune_export as fx
from fedprune.core.atomic_file import write_whole
from fedprune.core.cli import add_json, print_json, whole_number
from fedprune.core.errors import UsageError
from fedprune.model.architecture import widths_at
from fedprune.output import tables
from fedprune.planning import profile_store
from fedprune_export.cli.options import (
    MODEL_HELP,
    add_model_options,
    add_profiles_option,
    add_recipe_options,
    density,
    read_model,
    read_recipe,
)

RUNS = 15  # steps that are timed


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        description="Print, for each layer's forward pass and gradients, the form that computes it, how much it "
        "multiplies and moves, and the least time that this takes; with --measure also what it takes on this machine. "
        "Pieces below 1 percent of the step share a row; --json and --page have all of them.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--target", metavar="PROFILE", help="whose bounds: a hardware profile (default: measured on this machine)"
    )
    add_profiles_option(parser)
    parser.add_argument("--density", type=density, default=1.0, help="kept share of all channels (default: 1)")
    parser.add_argument("--batch", type=whole_number, default=32, metavar="N", help="samples of a step (default: 32)")
    parser.add_argument("--threads", type=whole_number, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--measure", action="store_true", help="run the step on this machine, and time every piece")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="write it as a page with a picture, too")
    add_json(parser)
    add_model_options(parser)
    add_recipe_options(parser)
    parser.set_defaults(function=explain)


def explain(arguments: argparse.Namespace) -> None:
    """Print an explanation."""
    profile = profile_store.chosen(arguments.target, arguments.profiles) if arguments.target else None
    if arguments.page is not None and arguments.page.suffix.lower() not in (".html", ".htm"):
        raise UsageError("--page", expected="a file name that ends in .html", got=str(arguments.page))
    recipe = read_recipe(arguments)
    with tables.progress() as tell:
        tell(f"importing {arguments.model}")
        model = read_model(arguments)
        from fedprune_export.profiling.machine_peak import bounds
        from fedprune_export.reports.roofline_report import document, print_explanation

        tell("looking at this machine" if profile is None else "reading the profile")
        speed = bounds(profile, arguments.threads)
        tell("explaining the step")
        found = fx.explain(
            model,
            widths_at(model.architecture, arguments.density),
            recipe,
            speed,
            batch=arguments.batch,
            runs=RUNS if arguments.measure else 0,
            threads=arguments.threads,
        )
    if arguments.page is not None:
        write_whole(arguments.page, document(found).to_html().encode())
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_explanation(found)
