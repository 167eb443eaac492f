"""The options of commands about a fleet: its identity, boards, releases and operators. What they do is imported as it
is run."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fedprune.core.cli import add_json_option, imported_command, positive_hours, positive_integer
from fedprune.releases.rollout_plan import CAREFUL_STAGES
from fedprune_server.cli.state_option import add_board_list, add_database, add_state, name_type
from fedprune_server.web.auth.roles import ROLES

# Actions of `identity`.
REPLACE, CERTIFICATE = "replace", "certificate"
DEVICE_ACTIONS = ("list", "approve", "revoke", REPLACE)


def add_init(init: argparse.ArgumentParser) -> None:
    add_state(init)
    add_database(init)
    init.add_argument(
        "--site", type=name_type("site"), default="default", metavar="NAME", help="the fleet's site (default: default)"
    )
    add_json_option(init)
    init.set_defaults(function=imported_command("fedprune_server.cli.identity", "run_init"))


def add_identity(identity: argparse.ArgumentParser) -> None:
    add_state(identity)
    add_database(identity)
    identity.add_argument(
        "action", nargs="?", default="show", metavar="ACTION",
        choices=("show", CERTIFICATE, REPLACE),
        help="show (default); certificate: issue one for the console, by the names of --host; replace: other keys and "
        "another certificate authority for a stopped server, as after a theft. All its boards must join again",
    )  # fmt: skip
    identity.add_argument(
        "--host", dest="hosts", action="append", default=[], metavar="HOST",
        help="of certificate: a name or address by which browsers reach the console; may be repeated",
    )  # fmt: skip
    add_json_option(identity)
    identity.set_defaults(function=imported_command("fedprune_server.cli.identity", "run_identity"))


def add_claim(claim: argparse.ArgumentParser) -> None:
    add_state(claim)
    add_database(claim)
    add_board_list(claim, "make a claim for each of these, which ends in its name (default: for any name that is free)")
    claim.add_argument("--count", type=positive_integer, default=1, metavar="N", help="how many (default: 1)")
    claim.add_argument("--hours", type=positive_hours, default=72, metavar="H", help="how long they last (default: 72)")
    claim.add_argument("--out", type=Path, metavar="FILE", help="write them to a new file that only you can read")
    claim.set_defaults(function=imported_command("fedprune_server.cli.identity", "run_claim"))


def add_devices(devices: argparse.ArgumentParser) -> None:
    add_state(devices)
    add_database(devices)
    add_json_option(devices, "the list as JSON, for programs")
    devices.add_argument(
        "action", nargs="?", default="list", metavar="ACTION",
        help="list (default), approve, revoke, or replace: revoke it and make a claim for a board of the same name; "
        "a device's name alone shows it and the last warnings of its log",
    )  # fmt: skip
    devices.add_argument("device", nargs="?", metavar="NAME", help="the device")
    devices.add_argument("--key", metavar="FINGERPRINT", help="of the key to approve, as the board shows it")
    hours_text = "of the claim to replace it with"
    devices.add_argument("--hours", type=positive_hours, default=72, metavar="H", help=hours_text)
    devices.add_argument(
        "--out", type=Path, metavar="FILE", help="write that claim to a new file that only you can read"
    )
    devices.set_defaults(function=imported_command("fedprune_server.cli.identity", "run_devices"))


def add_broker_config(broker: argparse.ArgumentParser) -> None:
    add_state(broker)
    add_database(broker)
    broker.add_argument("kind", choices=("mosquitto", "emqx"), metavar="BROKER", help="which one it is")
    broker.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    broker.add_argument(
        "--host",
        dest="hosts",
        action="append",
        required=True,
        metavar="HOST",
        help="name or address by which boards reach it; may be repeated",
    )
    broker.add_argument("--port", type=_port, default=8883, metavar="N", help="for members (default: 8883)")
    broker.add_argument("--join-port", type=_port, default=8884, metavar="N", help="for joining (default: 8884)")
    broker.add_argument("--bind", default="", metavar="ADDRESS", help="address to listen on (default: all)")
    broker.add_argument("--at", type=Path, metavar="DIR", help="where the broker finds the files (default: --out)")
    add_json_option(broker, "the files that are written as JSON, for programs")
    broker.set_defaults(function=imported_command("fedprune_server.cli.identity", "run_broker_config"))


def _port(text: str) -> int:
    value = positive_integer(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")
    return value


def add_release(release: argparse.ArgumentParser) -> None:
    source = release.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheels", type=Path, metavar="DIR", help="all wheels that it is made of")
    source.add_argument(
        "--again", type=Path, metavar="DIR", help="an earlier release, to go back to what it holds under a new number"
    )
    add_state(release, "the folder of `init --state`, whose key signs it")
    release.add_argument("--number", type=int, required=True, metavar="N", help="above that of every earlier release")
    release.add_argument("--name", default="", metavar="TEXT", help="its version for people (default: the number)")
    release.add_argument("--out", type=Path, required=True, metavar="DIR", help="the release's folder")
    release.add_argument("--python", default="cp311", metavar="TAG", help="the boards' Python (default: %(default)s)")
    release.add_argument("--machine", default="aarch64", metavar="NAME", help="as of `uname -m` (default: aarch64)")
    release.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="taken from the boards' own Python, so that no wheel of it is needed; repeatable",
    )
    release.add_argument(
        "--entry", default="fedprune_start:device", metavar="MODULE:FUNCTION", help="default: %(default)s"
    )
    add_json_option(release)
    release.set_defaults(function=imported_command("fedprune_server.cli.release", "run_release"))


def add_rollout(rollout: argparse.ArgumentParser) -> None:
    actions = rollout.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = actions.add_parser("start", help="begin with a release that `fedprune-server release` made")
    _add_start(start)
    pause = actions.add_parser(
        "pause", help="give the release to no further boards for now; boards that have it continue"
    )
    resume = actions.add_parser("resume", help="resume a paused rollout")
    status = actions.add_parser("status", help="show the progress and the failures of the latest rollout")
    add_json_option(status)
    status.set_defaults(function=imported_command("fedprune_server.cli.rollout", "run_status"))
    list_action = actions.add_parser("list", help="list all rollouts, the latest first")
    add_json_option(list_action)
    list_action.set_defaults(function=imported_command("fedprune_server.cli.rollout", "run_list"))
    stop = actions.add_parser("stop", help="give the release to no more boards; those that have it keep it")
    back = actions.add_parser(
        "back", help="roll back the boards that have the latest release to the one before, under a new number"
    )
    back.add_argument("--number", type=int, metavar="N", help="the new release's number (default: the next free one)")
    back.add_argument(
        "--groups", type=_groups, metavar="SHARES", help="stages, as for start (default: all boards at once)"
    )
    back.set_defaults(function=imported_command("fedprune_server.cli.rollout", "run_back"))
    for action in (pause, resume, stop):
        action.set_defaults(function=imported_command("fedprune_server.cli.rollout", "run_request"), reason="")
    for action in (pause, stop, back):
        action.add_argument("--reason", default="by the operator", metavar="TEXT", help="for the record")
    for action in (start, pause, resume, stop, back):
        add_json_option(action, "the rollout as JSON, as `status` has it")
    for action in (start, pause, resume, status, list_action, stop, back):
        add_state(action)
        add_database(action)


def _add_start(start: argparse.ArgumentParser) -> None:
    start.add_argument("release", type=Path, metavar="DIR", help="the release's folder")
    start.add_argument(
        "--groups",
        type=_groups,
        metavar="SHARES",
        help="shares of the boards, one per stage: 1,10%%,100%% is one board, a tenth, all (the default)",
    )
    start.add_argument(
        "--success",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="share of a stage's boards that must be updated before the next stage begins (default: 90%%)",
    )
    start.add_argument(
        "--errors",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="share of a stage's boards that may fail (default: 10%%)",
    )
    start.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="minutes without news after which a board counts as failed (default: 60)",
    )
    start.add_argument(
        "--hours", type=float, default=24.0, metavar="H", help="hours that a stage may take (default: 24)"
    )
    start.add_argument(
        "--attempts",
        type=positive_integer,
        default=3,
        metavar="N",
        help="how often a board starts the release on trial before it goes back (default: 3)",
    )
    start.add_argument(
        "--deadline",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that each of these starts has to become healthy (default: 600)",
    )
    add_board_list(start, "only these boards (default: all members)")
    start.add_argument("--seed", type=int, default=0, help="changes which boards are in the early stages")
    start.set_defaults(function=imported_command("fedprune_server.cli.rollout", "run_start"))


def _groups(text: str) -> list[float]:
    """Parse shares of the boards; a plain 1 stands for one board."""
    return [CAREFUL_STAGES[0].share if entry.strip() == "1" else _share(entry) for entry in text.split(",")]


def _share(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,6})?)%\s*", text)
    if match is None or float(match[1]) > 100:
        raise argparse.ArgumentTypeError(f"expected a share such as 10%, got {text!r}")
    return float(match[1]) / 100


def add_operators(operators: argparse.ArgumentParser) -> None:
    actions = operators.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="a new one; asks for the password, or reads it from standard input")
    add.add_argument("name", metavar="NAME", help="what they log in as")
    add.add_argument(
        "--role", choices=ROLES, default=ROLES[0], help="what they may do (default: viewer, who may only look)"
    )
    password = actions.add_parser("password", help="another password; their sessions end")
    password.add_argument("name", metavar="NAME", help="who")
    remove = actions.add_parser("remove", help="take an account away; its sessions end")
    remove.add_argument("name", metavar="NAME", help="who")
    listing = actions.add_parser("list", help="list them")
    add_json_option(listing)
    for action, run in ((add, "run_add"), (password, "run_password"), (remove, "run_remove"), (listing, "run_list")):
        add_state(action)
        action.set_defaults(function=imported_command("fedprune_server.cli.operators", run))


def add_pause(pause: argparse.ArgumentParser) -> None:
    add_state(pause)
    pause.add_argument("--job", metavar="NAME", help="which job (default: the server's first)")
    pause.set_defaults(function=imported_command("fedprune_server.cli.operators", "run_order"))


add_resume = add_pause
