"""`fedprune-device`: the grammar of its commands. What they do is loaded when they run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.core import cli
from fedprune.core.command_parser import CommandParser
from fedprune.planning.jetpack_releases import TEGRA_RELEASE
from fedprune.runtime.precision_files import PRECISIONS
from fedprune_device.cli import options
from fedprune_device.cli.run import add_run

RUNTIME_ROOT = Path("/opt/fedprune")
_SERVER_KEY = Path("/var/lib/fedprune/identity/server.pub")  # where a board that has joined keeps its server's key


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_command("fedprune-device", build_parser, argv)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="fedprune-device",
        description="Train on this board's own data as part of a fleet, and predict with what was learnt.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_join(commands)
    add_run(commands)
    _add_train(commands)
    _add_predict(commands)
    _add_data(commands)
    _add_sensors(commands)
    probe = commands.add_parser("probe", help="measure this board, which takes about fifteen seconds")
    cli.add_json_option(probe)
    options.add_threads_option(probe, "threads for the benchmark")
    options.add_tier_option(probe)
    probe.set_defaults(run=_command("measure", "probe_board"))
    identify = commands.add_parser("identify", help="show which hardware profile fits this board, and why")
    cli.add_json_option(identify)
    identify.set_defaults(run=_command("measure", "identify_board"))
    _add_engine(commands)
    _add_runtime(commands)
    return parser


def _add_join(commands: Any) -> None:
    join = commands.add_parser("join", help="become a member of a fleet, with a claim or by the operator's approval")
    options.add_membership(join)
    join.add_argument(
        "--pin",
        metavar="HEX",
        help="fingerprint of the server's authority, as `init` shows it, to join without a claim",
    )
    join.add_argument(
        "--new-key", action="store_true", help="join with a new key, in place of a revoked identity for example"
    )
    join.add_argument(
        "--patient",
        action="store_true",
        help="wait without a time-out: for the server, and for the operator's approval",
    )
    join.set_defaults(run=_command("join", "join"))


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a bundle on this machine's samples, without a server",
        description="Train a bundle on local samples and write it with the trained weights. Ctrl-C ends training early "
        "and keeps what was trained until then.",
    )
    train.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="a bundle of fedprune-export")
    train.add_argument(
        "--data",
        required=True,
        metavar="SRC",
        help=".npz with x and y, package.module:Class, or files as docs/board-data.md lists them",
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the trained bundle; may be the same DIR")
    train.add_argument(
        "--epochs", type=cli.positive_integer, metavar="N", help="passes over the samples (default: the recipe's)"
    )
    train.add_argument("--lr", type=cli.positive_rate, metavar="RATE", help="learning rate (default: as exported)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        type=_recipe_setting,
        metavar="KEY=VALUE",
        help="any other number of the recipe, such as batch_size=16; repeatable",
    )
    options.add_split_options(train, "the test split and of the order of samples", "early stopping")
    train.add_argument("--threads", type=cli.positive_integer, metavar="N", help="default: half of the cores")
    cli.add_json_option(train)
    options.add_sample_options(train.add_argument_group("images and samples"))
    train.set_defaults(run=_command("train", "train"), device="")


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="predict with the serving model, also while the agent runs")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--state", type=Path, metavar="DIR", help="the serving model of a running or stopped agent")
    source.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of fedprune-export")
    predict.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="SRC",
        help=".npy, or what trains: .npz with x or x_test (and labels), package.module:Class, or files as "
        "docs/board-data.md lists them",
    )
    predict.add_argument(
        "--split",
        choices=("test", "train", "val"),
        help="which samples of SRC (default: its test samples, or all of a file without any)",
    )
    out = predict.add_mutually_exclusive_group()
    out.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the logits to this .npy file, or to .npz with the outputs of the model's own file",
    )
    out.add_argument(
        "--top", type=cli.positive_integer, default=1, metavar="K", help="print the K likeliest (default: 1)"
    )
    predict.add_argument("--data", metavar="SRC", help="with --bundle: adjust logits to the label shares of this data")
    options.add_threads_option(predict)
    cli.add_json_option(predict)
    predict.add_argument("--precision", choices=PRECISIONS, help="with --bundle: the precision, of those that it has")
    options.add_sample_options(predict.add_argument_group("images and samples"))
    predict.set_defaults(run=_command("predict", "predict"), device="", seed=0, validation_share=0.0)


def _add_data(commands: Any) -> None:
    actions = commands.add_parser("data", help="look at a board's samples before a fleet is begun").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    check = actions.add_parser(
        "check",
        help="show what a bundle's model would be trained on, and what doesn't fit it",
        description="Read samples as a training does, and show their number, shape, ranges and classes. It ends with 6 "
        "if something doesn't fit the model, and with the error of a training if that would refuse the samples.",
    )
    check.add_argument(
        "--data",
        required=True,
        metavar="SRC",
        help=".npz with x and y, package.module:function, or files as docs/board-data.md lists them",
    )
    check.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="a bundle of fedprune-export")
    check.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write an HTML page, with three samples drawn; with .npz the samples as arrays, as exports take them",
    )
    cli.add_json_option(check)
    options.add_split_options(check, "the split into training and test samples", "validation")
    options.add_sample_options(check.add_argument_group("images and samples"))
    check.set_defaults(run=_command("data", "check_data"), device="")


def _add_sensors(commands: Any) -> None:
    sensors = commands.add_parser(
        "sensors",
        help="hand the MQTT messages of sensors to the board as samples",
        description="Subscribe to the home's broker, join the messages of sensors into samples, and hand these to a "
        "board that runs with --data local --local.",
    )
    sensors.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="TOML, as docs/board-data.md describes it"
    )
    sensors.add_argument("--patient", action="store_true", help="at the start, wait for a broker that can't be reached")
    sensors.set_defaults(run=_command("sensors", "hand_in_sensors"))


def _add_engine(commands: Any) -> None:
    build = commands.add_parser(
        "build-engine", help="build and check the TensorRT engine of the serving model (Jetson)"
    )
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--state", type=Path, metavar="DIR", help="the state folder of an agent, whose engine it becomes"
    )
    source.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of fedprune-export; needs --out")
    build.add_argument("--out", type=Path, metavar="DIR", help="with --bundle: the folder of the engine")
    build.add_argument(
        "--plan", type=Path, metavar="FILE", help="an engine.json (default: the bundle's, or docs/jetson.md's values)"
    )
    build.add_argument(
        "--rebuild", action="store_true", help="build even if a good engine exists, or earlier builds failed"
    )
    cli.add_json_option(build, "the report as JSON, for programs")
    build.set_defaults(run=_command("build_engine", "build_engine"))


def _add_runtime(commands: Any) -> None:
    update = commands.add_parser("update", help="install a release in the idle slot; the next start tries it")
    update.add_argument("--release", type=Path, required=True, metavar="DIR", help="the release's folder")
    update.add_argument(
        "--key",
        default=str(_SERVER_KEY),
        metavar="KEY",
        help="the server's key, as `fedprune-server release` shows it, or a file with it (default: %(default)s)",
    )
    update.add_argument(
        "--jetson",
        action=argparse.BooleanOptionalAction,
        default=TEGRA_RELEASE.exists(),
        help="never hide packages that JetPack brings (default: yes on a Jetson)",
    )
    update.add_argument("--stage-only", action="store_true", help="install it only; a later `update` starts its trial")
    update.add_argument(
        "--attempts", type=int, default=3, metavar="N", help="starts that a trial may take (default: 3)"
    )
    update.add_argument(
        "--deadline",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds in which a start must become healthy (default: 600)",
    )
    slots = commands.add_parser("slots", help="show which release runs, and how the last update ended")
    cli.add_json_option(slots)
    for parser in (update, slots):
        parser.add_argument("--root", type=Path, default=RUNTIME_ROOT, metavar="DIR", help="default: %(default)s")
    update.set_defaults(run=_command("runtime", "update"))
    slots.set_defaults(run=_command("runtime", "slots"))


def _command(module: str, name: str) -> cli.Command:
    """A command of a module next to this one, which is loaded when it runs."""

    def run(arguments: argparse.Namespace) -> int | None:
        command: cli.Command = getattr(import_module(f"fedprune_device.cli.{module}"), name)
        return command(arguments)

    return run


def _recipe_setting(text: str) -> tuple[str, Any]:
    from fedprune.model.recipe import LIST_SETTINGS  # which loads numpy: options are read without it

    return cli.recipe_setting(LIST_SETTINGS)(text)


if __name__ == "__main__":
    sys.exit(main())
