"""`fedprune-device`: take part in a fleet, predict with what was learnt, measure the board."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from fedprune import __version__
from fedprune.blobs.blob_ref import LEAF
from fedprune.core.cli import run_command, whole_number
from fedprune.core.errors import ExitCode, ProtocolError
from fedprune.runtime.blocks import turn_off, turned_off
from fedprune.wire.chunk import MAX_PACKET, MAX_PAYLOAD, PACKET_OVERHEAD
from fedprune.wire.topics import check_job
from fedprune_device.api.options import add_local_options
from fedprune_device.cli.collect import add_collect_command
from fedprune_device.cli.predict import add_predict_command, threads
from fedprune_device.cli.runtime import add_runtime_commands
from fedprune_device.cli.train import add_train_command
from fedprune_device.engines.accelerator_options import add_accelerator_options
from fedprune_device.engines.engine_command import add_engine_command
from fedprune_device.enrolment.membership import add_join_command, add_membership
from fedprune_device.hardware.thermal_guard import COOL_C, HOT_C
from fedprune_device.privacy.policy import add_policy_option
from fedprune_device.serving.reduced_precision import SERVE

_LOG = logging.getLogger("fedprune.device")

_MOST_HOURS = 8760.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command("fedprune-device", build_parser, argv)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="fedprune-device",
        description="Train on this board's own data as part of a fleet, and predict with what was learnt.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_join_command(commands)
    _add_run(commands)
    add_train_command(commands)
    add_predict_command(commands)
    add_collect_command(commands)
    probe = commands.add_parser("probe", help="measure this board, which takes about fifteen seconds")
    probe.add_argument("--json", action="store_true", help="as JSON, for programs")
    probe.add_argument("--threads", type=whole_number, default=threads(), metavar="N", help="threads for the benchmark")
    probe.set_defaults(run=_probe)
    identify = commands.add_parser("identify", help="say which hardware profile fits this board, and why")
    identify.add_argument("--json", action="store_true", help="as JSON, for programs")
    identify.set_defaults(run=_identify)
    add_engine_command(commands)
    add_runtime_commands(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="take part in a fleet, or go on after a stop, crash or power cut")
    add_membership(run)
    run.add_argument(
        "--insecure", action="store_true", help="without identity, TLS and signatures: on the server's machine alone"
    )
    run.add_argument("--seed", type=int, default=0, help="of the split into training and test samples (default: 0)")
    run.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the training samples, set aside for what training and fleet decide by (default: 0)",
    )
    run.add_argument("--profile", metavar="NAME", help="a hardware profile's name or file (default: what fits)")
    add_accelerator_options(run)
    run.add_argument("--threads", type=whole_number, default=threads(), metavar="N", help="default: half of the cores")
    run.add_argument("--until-finished", action="store_true", help="end when the job is done")
    run.add_argument("--patient", action="store_true", help="wait for a broker that isn't there when starting")
    run.add_argument(
        "--pause-above",
        type=float,
        default=HOT_C,
        metavar="C",
        help="training waits at this heat (default: %(default)g °C)",
    )
    run.add_argument("--resume-below", type=float, default=COOL_C, metavar="C", help="default: %(default)g °C")
    run.add_argument("--no-probe", action="store_true", help="don't measure the board; the profile is believed")
    run.add_argument(
        "--no-blocks", action="store_true", help="train with standard operators alone, not with channels in blocks"
    )
    run.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much is said on stderr (default: info)",
    )
    add_local_options(run)
    add_policy_option(run)
    run.add_argument(
        "--serve",
        choices=SERVE,
        default=SERVE[0],
        help="the precision at which the model predicts, as long as it says what float32 says (default: float32)",
    )
    run.add_argument(
        "--serve-job",
        type=_job,
        metavar="JOB",
        help="models of this job alone serve predictions (default: the newest model, whichever job it is of)",
    )
    run.add_argument(
        "--train-alone",
        type=_hours,
        default=0.0,
        metavar="HOURS",
        help="train on while the server is away, so often (default: wait for it)",
    )
    run.add_argument(
        "--max-packet",
        type=_packet,
        default=MAX_PACKET,
        metavar="BYTES",
        help="what the broker lets through; less is found out, too, at the price of a pause (default: %(default)s)",
    )
    run.set_defaults(run=_run)


def _job(text: str) -> str:
    try:
        return check_job(text)
    except ProtocolError as error:
        raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from error


def _packet(text: str) -> int:
    low, high = LEAF + PACKET_OVERHEAD, MAX_PAYLOAD + PACKET_OVERHEAD
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected {low} to {high} bytes, got {text!r}")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from fedprune_device.board import run_board

    logging.basicConfig(
        level=arguments.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if arguments.no_blocks:
        turn_off()
    turned_off()  # what is wrong with the setting comes first
    run_board(arguments)
    return int(ExitCode.OK)


def _identify(arguments: argparse.Namespace) -> int:
    from fedprune.hardware.identification import identify
    from fedprune_device.hardware.board_facts import facts

    read = facts()
    found = identify(read)
    if arguments.json:
        print(json.dumps({"board": asdict(read), **found.to_dict()}, sort_keys=True))
    else:
        print(found.describe())
    return int(ExitCode.OK)


def _probe(arguments: argparse.Namespace) -> int:
    from fedprune_device.hardware.probe import probe, table_summaries

    turned_off()  # what is wrong with the setting comes first
    report = probe(arguments.threads, begin=_begin)
    if arguments.json:
        print(json.dumps(report.to_dict(), sort_keys=True))
        return int(ExitCode.OK)
    tables = table_summaries(report)
    for field in fields(report):
        value = getattr(report, field.name)
        if field.name.endswith("_rate") and value is not None:
            value = f"{value / 1e9:.2f} GFLOP/s"
        elif field.name.startswith("memory_"):
            value = f"{value / 1e6:.0f} MB"
        elif field.name == "seconds":
            value = f"{value:.1f}"
        elif field.name in tables:
            value = tables[field.name]
        if value not in (None, ""):
            print(f"{field.name}: {value}")
    return int(ExitCode.OK)


def _begin(what: str, seconds: float) -> None:
    """Name a measurement that begins, where no spinner turns."""
    if not sys.stderr.isatty():
        print(f"measuring {what}: about {seconds:.0f} s, longer on a slow board", file=sys.stderr, flush=True)


def _hours(text: str) -> float:
    number = float(text)
    if not 0 < number <= _MOST_HOURS:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most {_MOST_HOURS:g} hours, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
