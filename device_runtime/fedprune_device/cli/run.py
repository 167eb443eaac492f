"""`fedprune-device run`: its options, and the board that they describe, which is loaded when the command runs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core import cli
from fedprune.runtime.precision_files import SERVE_CHOICES
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, MAX_PAYLOAD_BYTES, PACKET_OVERHEAD_BYTES
from fedprune.wire.fleet_messages import MAX_BOARD_AWAY_S
from fedprune.wire.topics import check_job
from fedprune_device.cli import options
from fedprune_device.hardware.thermal_guard import PAUSE_ABOVE_C, RESUME_BELOW_C

_MAX_HOURS = 8760.0  # a year


def add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="take part in a fleet, or continue after a stop, crash or power cut")
    options.add_membership(run)
    run.add_argument(
        "--insecure",
        action="store_true",
        help="without identity, TLS and signatures: for trials on the server's machine alone",
    )
    options.add_split_options(run, "the split into training and test samples", "validation, such as early stopping")
    run.add_argument(
        "--profile",
        metavar="NAME",
        help="a hardware profile's name or file (default: the profile that fits this board)",
    )
    options.add_tier_option(run)
    run.add_argument("--engine-plan", type=Path, metavar="FILE", help="how TensorRT engines are built: an engine.json")
    options.add_threads_option(run)
    run.add_argument("--until-finished", action="store_true", help="end when the job is done")
    run.add_argument("--patient", action="store_true", help="at the start, wait for a broker that can't be reached")
    run.add_argument(
        "--pause-above",
        type=float,
        default=PAUSE_ABOVE_C,
        metavar="C",
        help="training pauses from this temperature on (default: %(default)g °C)",
    )
    run.add_argument(
        "--resume-below",
        type=float,
        default=RESUME_BELOW_C,
        metavar="C",
        help="training continues below this temperature (default: %(default)g °C)",
    )
    run.add_argument(
        "--no-probe", action="store_true", help="don't measure the board, and plan with its profile's figures"
    )
    run.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least level of messages on stderr (default: info)",
    )
    options.add_local_options(run)
    options.add_policy_option(run)
    run.add_argument(
        "--serve",
        choices=SERVE_CHOICES,
        default=SERVE_CHOICES[0],
        help="the precision at which the model predicts, as long as it agrees with float32 (default: float32)",
    )
    run.add_argument(
        "--serve-job",
        type=options.text_parser(check_job),
        metavar="JOB",
        help="models of this job alone serve predictions (default: the newest model, whichever job it is of)",
    )
    run.add_argument(
        "--train-alone",
        type=_parse_hours,
        default=0.0,
        metavar="HOURS",
        help="while the server is away, train every HOURS hours (default: wait for it)",
    )
    run.add_argument(
        "--away",
        type=lambda text: 0.0 if float(text) == 0 else _parse_hours(text),
        default=MAX_BOARD_AWAY_S / 3600,
        metavar="HOURS",
        help="stay disconnected for at most HOURS hours when the server has no work; 0: never (default: as long as the "
        "server says)",
    )
    run.add_argument(
        "--max-packet",
        type=_parse_packet,
        default=DEFAULT_MAX_PACKET,
        metavar="BYTES",
        help="largest packet that the broker accepts; a smaller limit is found at run time, after a reconnection "
        "(default: %(default)s)",
    )
    run.set_defaults(run=_run)


def _parse_packet(text: str) -> int:
    low, high = LEAF_BYTES + PACKET_OVERHEAD_BYTES, MAX_PAYLOAD_BYTES + PACKET_OVERHEAD_BYTES
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected {low} to {high} bytes, got {text!r}")
    return int(text)


def _run(arguments: argparse.Namespace) -> None:
    from fedprune_device.board import BoardConfig, run_board
    from fedprune_device.data.sources import SampleOptions
    from fedprune_device.hardware.allocator import return_freed_blocks
    from fedprune_device.network.membership import MembershipOptions

    # Before the agent allocates anything: the setting only counts for later blocks.
    return_freed_blocks()
    logging.basicConfig(level=arguments.log_level.upper(), handlers=[options.log_handler()])
    member, samples = cli.options_of(MembershipOptions, arguments), cli.options_of(SampleOptions, arguments)
    run_board(cli.options_of(BoardConfig, arguments, membership=member, samples=samples))


def _parse_hours(text: str) -> float:
    number = float(text)
    if not 0 < number <= _MAX_HOURS:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most {_MAX_HOURS:g} hours, got {text}")
    return number
