"""Options that several commands share. Parsing loads neither numpy nor onnxruntime."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from fedprune.core.cli import byte_count, positive_integer
from fedprune.core.errors import ProtocolError
from fedprune.core.metrics import TEST_SHARE
from fedprune.planning.profile import TIERS
from fedprune.wire.topics import EVERYONE, check_device, check_topic_name, to_name
from fedprune_device.api.address import SOCKET
from fedprune_device.data.colours import COLOUR_FORM, WHITE, Colour, parse_colour
from fedprune_device.data.table_options import MISSING

BROKER_VARIABLE, JOIN_VARIABLE = "FEDPRUNE_BROKER", "FEDPRUNE_JOIN"
SITE_VARIABLE, DEVICE_VARIABLE = "FEDPRUNE_SITE", "FEDPRUNE_DEVICE"
PRIVACY_VARIABLE = "FEDPRUNE_PRIVACY"

# Little enough for the smallest boards, whose cards hold the system, two releases and a model besides.
DEFAULT_SAMPLES_BYTES = 64 * 2**20
DEFAULT_MAX_SAMPLES = 10_000


def log_handler() -> logging.Handler:
    """A handler that writes each record to stderr as one line; a traceback follows, indented."""
    from fedprune.output.log_lines import OneLineFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def default_threads() -> int:
    """Half of the cores: predictions and the system need some, too."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def add_threads_option(parser: argparse.ArgumentParser, text: str = "default: half of the cores") -> None:
    parser.add_argument("--threads", type=positive_integer, default=default_threads(), metavar="N", help=text)


def add_membership(parser: argparse.ArgumentParser) -> None:
    # Characters of the host's name that a device's can't have become dashes.
    host = to_name(socket.gethostname().partition(".")[0])
    parser.add_argument(
        "--broker",
        metavar="URL",
        default=os.environ.get(BROKER_VARIABLE),
        help=f"mqtts://[user:password@]host[:port]; ${BROKER_VARIABLE} keeps a password out of process lists",
    )
    parser.add_argument(
        "--join",
        metavar="URL",
        default=os.environ.get(JOIN_VARIABLE),
        help=f"address for joining, also ${JOIN_VARIABLE} (default: the port after the broker's, then the broker)",
    )
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="certificates of the broker's authority; `system` for the system's (default: the fleet's own authority)",
    )
    parser.add_argument(
        "--site",
        type=text_parser(check_topic_name),
        default=os.environ.get(SITE_VARIABLE, "default"),
        help="the fleet's site (default: $FEDPRUNE_SITE, else default)",
    )
    parser.add_argument(
        "--device",
        type=text_parser(check_device),
        default=os.environ.get(DEVICE_VARIABLE) or ("board" if host in ("", ".", "..", EVERYONE) else host),
        metavar="NAME",
        help="this board's name, unique in the site (default: $FEDPRUNE_DEVICE, else the host's name)",
    )
    parser.add_argument(
        "--state",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder of the board's state: identity, models, work in progress",
    )
    parser.add_argument(
        "--claim", metavar="FILE", help="a one-time claim, - for standard input (default: the file claim in --state)"
    )


def add_local_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        metavar="SRC",
        help=".npz with x and y, package.module:Class, files as docs/board-data.md lists them (images, "
        "recordings, tables), or `local`: what the application adds",
    )
    local = parser.add_argument_group("the local interface (docs/local-interface.md)")
    local.add_argument(
        "--local",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help=f"answer the application: unix:/path or 127.0.0.1:PORT (without ADDRESS: {SOCKET} in --state)",
    )
    add_sample_options(local)
    local.add_argument(
        "--samples-bytes",
        type=byte_count,
        default=DEFAULT_SAMPLES_BYTES,
        metavar="BYTES",
        help="space for added samples (default: 64 MiB)",
    )


def add_sample_options(group: argparse._ArgumentGroup) -> None:
    """Add how files become samples, how many samples are kept, and how many of them are for testing."""
    group.add_argument(
        "--class-names", type=_parse_names, default=(), metavar="A,B,C", help="names of the classes, as on all boards"
    )
    group.add_argument(
        "--image-mean",
        type=_parse_numbers,
        default=(0.0,),
        metavar="M[,M,M]",
        help="subtracted from images, whose values are scaled to 0 to 1",
    )
    group.add_argument(
        "--image-deviation",
        type=_parse_numbers,
        default=(1.0,),
        metavar="D[,D,D]",
        help="images are divided by it after the subtraction",
    )
    group.add_argument(
        "--image-background",
        type=_parse_colour,
        default=WHITE,
        metavar="COLOUR",
        help=f"what transparent images are drawn on: {COLOUR_FORM} (default: white)",
    )
    group.add_argument(
        "--audio-rate",
        type=positive_integer,
        default=16_000,
        metavar="HZ",
        help="sampling rate that the model expects of recordings (default: 16000)",
    )
    group.add_argument(
        "--columns",
        type=_parse_names,
        default=(),
        metavar="A,B,C",
        help="columns of a table that are inputs, in the model's order (default: all, in the file's)",
    )
    group.add_argument(
        "--missing",
        choices=MISSING,
        default=MISSING[0],
        help="missing numbers of a table: refuse them, hold the last number, take the training rows' mean, or drop "
        "windows that have one (default: error)",
    )
    group.add_argument(
        "--step",
        type=float,
        metavar="S",
        help="seconds between two rows of a table: no window spans a gap of more than 1.5 times this (default: the "
        "table's median step)",
    )
    group.add_argument(
        "--samples-most",
        type=positive_integer,
        default=DEFAULT_MAX_SAMPLES,
        metavar="N",
        help="largest number of samples kept (default: 10000)",
    )
    group.add_argument(
        "--test-share",
        type=float,
        default=TEST_SHARE,
        metavar="SHARE",
        help="share of added samples, or of those in folders, kept for testing (default: %(default)s)",
    )


def add_split_options(parser: argparse.ArgumentParser, seeded: str, validation_for: str) -> None:
    """Add the seed, of the test split and of what else is `seeded`, and the share that is set aside for validation."""
    parser.add_argument("--seed", type=int, default=0, help=f"seed of {seeded} (default: 0)")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help=f"share of the training samples set aside for {validation_for} (default: 0)",
    )


def add_tier_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tier",
        choices=TIERS,
        help="runtime and unit that compute, if they work here: docs/jetson.md (default: the profile's)",
    )


def add_policy_option(parser: argparse.ArgumentParser) -> None:
    policy_file = os.environ.get(PRIVACY_VARIABLE)
    parser.add_argument(
        "--privacy",
        type=Path,
        metavar="FILE",
        default=Path(policy_file) if policy_file else None,
        help=f"TOML with [privacy]: what a job must promise before this board takes part; ${PRIVACY_VARIABLE}"
        " (default: take part in any)",
    )


def _parse_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) < len(names) or any(n.isdecimal() or not n.isprintable() for n in names):
        raise argparse.ArgumentTypeError(f"expected different names with commas between them, got {text!r}")
    return names


def _parse_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or three with commas, got {text!r}") from None


def _parse_colour(text: str) -> Colour:
    colour = parse_colour(text)
    if colour is None:
        raise argparse.ArgumentTypeError(f"expected {COLOUR_FORM}, got {text!r}")
    return colour


def text_parser(check: Callable[[object, str], str]) -> Callable[[str], str]:
    """A parser of an option whose text `check` accepts, or refuses by a `ProtocolError`."""

    def check_argument(text: str) -> str:
        try:
            return check(text, "name")
        except ProtocolError as error:
            raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from error

    return check_argument
