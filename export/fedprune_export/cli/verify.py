"""`verify BUNDLE`: checks a bundle on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedprune.core.cli import add_json_option, print_json
from fedprune.core.errors import FedpruneError
from fedprune.output import tables
from fedprune.runtime.bundle import open_bundle
from fedprune_export.cli.options import MODEL_HELP, read_model
from fedprune_export.model_options import add_model_options


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        description="Check every file of a bundle, load its graphs, run predictions and a training step with random "
        "numbers, and compare the graphs with each other. The first thing that is wrong ends the command.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--model", metavar="MODEL", help=f"compare with the model that was cut: {MODEL_HELP}")
    add_json_option(parser)
    add_model_options(parser)
    parser.set_defaults(function=verify_command)


def verify_command(arguments: argparse.Namespace) -> None:
    """Print every check that is passed."""
    from fedprune_export.bundles import verification

    passed_checks: list[dict[str, str]] = []
    try:
        with tables.progress() as tell:
            model = None
            if arguments.model:
                tell(f"importing {arguments.model}")
                # Under the bundle's name: an architecture's digest includes it.
                bundle = open_bundle(arguments.bundle)
                model = read_model(arguments, name=bundle.architecture.name, recipe=bundle.recipe)
            tell("checking the bundle")
            for check in verification.verify_bundle(arguments.bundle, model):
                passed_checks.append({"check": check.name, "found": check.finding})
                # At once, since later checks may take a while.
                if not arguments.json:
                    print(f"{check.name}: {check.finding}")
    except FedpruneError as error:
        if arguments.json:
            print_json({"ok": False, "passed": passed_checks, "error": str(error)})
        raise
    if arguments.json:
        print_json({"ok": True, "passed": passed_checks})
