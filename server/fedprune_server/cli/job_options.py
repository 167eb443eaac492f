"""The options of commands about a server's job, and what is kept of it. What they do is imported as it is run."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedprune.core.cli import add_json_option, imported_command, positive_integer, positive_seconds, setting_of
from fedprune_server.cli.state_option import add_allow, add_state, name_type


def add_status(status: argparse.ArgumentParser) -> None:
    add_state(status)
    status.add_argument(
        "--rounds", type=positive_integer, metavar="N", help="the last N rounds (default: 10; all with --json)"
    )
    add_json_option(status)
    status.set_defaults(function=imported_command("fedprune_server.cli.status", "run_status"))


def add_export_model(export: argparse.ArgumentParser) -> None:
    add_state(export)
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PLACE",
        help="model.onnx, weights.safetensors, or state.pt, written over if it is there; or a folder, which gets the "
        "layout of the Hugging Face hub",
    )
    export.add_argument("--opset", type=positive_integer, metavar="N", help="opset of the .onnx file (default: 17)")
    export.add_argument(
        "--round",
        type=_round,
        metavar="N",
        help="after this round, if its model is still kept; or `best`: after the one that the server's "
        "evaluation scored best",
    )
    add_allow(export)
    add_json_option(export)
    export.set_defaults(function=imported_command("fedprune_server.cli.export_model", "run_export_model"))


def _round(text: str) -> int | str:
    from fedprune_server.engine.stored_job import BEST_ROUND

    try:
        return BEST_ROUND if text == BEST_ROUND else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a round's number or {BEST_ROUND!r}, got {text!r}") from None


def add_demo(demo: argparse.ArgumentParser) -> None:
    demo.description = (
        "Start a broker, a server and six device processes, each with its own mixture of digits, and beside them the "
        "same devices with FedAvg at full width; compare accuracies and bytes, and write a report. It ends with exit "
        "code 5 if a claim fails."
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-run"), metavar="DIR", help="folder of the run (default: demo-run)"
    )
    demo.add_argument("--rounds", type=setting_of(int), metavar="N", help="rounds of each job")
    demo.add_argument("--seed", type=setting_of(int), default=0, help="keys every random number (default: 0)")
    demo.add_argument("--quick", action="store_true", help="two rounds: does it run at all? Too few to judge it by")
    demo.set_defaults(function=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from fedprune_server.cli.demo import run_demo

    return run_demo(arguments.out, seed=arguments.seed, rounds=arguments.rounds, quick=arguments.quick)


def add_check(check: argparse.ArgumentParser) -> None:
    add_state(check)
    check.add_argument(
        "--repair", action="store_true", help="delete what isn't needed, set damaged blobs aside, and list each action"
    )
    check.add_argument(
        "--from", dest="backup", type=Path, metavar="DIR", help="with --repair: a backup to take missing blobs from"
    )
    add_allow(check)
    add_json_option(check)
    check.set_defaults(function=imported_command("fedprune_server.cli.store", "run_check"))


def add_backup(backup: argparse.ArgumentParser) -> None:
    add_state(backup)
    backup.add_argument("--to", type=Path, required=True, metavar="PLACE", help="a folder; the next backup adds to it")
    add_json_option(backup)
    backup.set_defaults(function=imported_command("fedprune_server.cli.store", "run_backup"))


def add_restore(restore: argparse.ArgumentParser) -> None:
    restore.add_argument(
        "--from", dest="backup", type=Path, required=True, metavar="PLACE", help="what `backup --to` wrote"
    )
    restore.add_argument("--state", type=Path, required=True, metavar="DIR", help="the new state folder")
    restore.add_argument(
        "--database", metavar="URL", help="of an empty PostgreSQL database (default: SQLite in the folder)"
    )
    restore.add_argument("--dry-run", action="store_true", help="check that the backup is complete, and write nothing")
    add_json_option(restore)
    restore.set_defaults(function=imported_command("fedprune_server.cli.store", "run_restore"))


def add_crashes(crashes: argparse.ArgumentParser) -> None:
    add_state(crashes)
    crashes.add_argument("--device", type=name_type("device"), metavar="NAME", help="of this board alone")
    crashes.add_argument("--last", type=positive_integer, default=100, metavar="N", help="the last N (default: 100)")
    add_json_option(crashes, "one JSON object on each line, for programs")
    crashes.set_defaults(function=imported_command("fedprune_server.cli.observe", "run_crashes"))


def add_doctor(doctor: argparse.ArgumentParser) -> None:
    add_state(doctor)
    doctor.add_argument(
        "--timeout", type=positive_seconds, default=5.0, metavar="S",
        help="seconds to wait for each of broker, database and bucket (default: 5)",
    )  # fmt: skip
    add_json_option(doctor)
    doctor.set_defaults(function=imported_command("fedprune_server.cli.observe", "run_doctor"))
