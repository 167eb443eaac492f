"""`fedprune-flash ssh`: install on boards that run, over SSH, many at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedprune.core.cli import add_json, ended_by_signals, print_json, seconds, whole_number, with_extra
from fedprune.core.errors import ConfigError, ExitCode, UsageError
from fedprune.core.text import quantity

_MOST_JOBS = 64


def add_ssh_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ssh = commands.add_parser("ssh", help="install on many running boards over SSH, or remove an installation")
    ssh.add_argument("inventory", type=Path, metavar="INVENTORY", help="a TOML file with a table for each board")
    ssh.add_argument("--only", action="append", default=[], metavar="DEVICE", help="of the inventory; repeatable")
    ssh.add_argument(
        "--kit", type=Path, action="append", default=[], metavar="FOLDER",
        help="what `fedprune-flash kit` made; one for each Python and kind of board",
    )  # fmt: skip
    claims = ssh.add_mutually_exclusive_group()
    claims.add_argument("--claims", type=Path, metavar="FILE", help="of `fedprune-server claim --count N --out FILE`")
    claims.add_argument(
        "--server-state", type=Path, metavar="DIR", help="the state of the server on this machine, which makes them"
    )
    ssh.add_argument(
        "--hours", type=whole_number, default=72, metavar="H", help="of claims that it makes (default: 72)"
    )
    ssh.add_argument(
        "--new-claims", action="store_true", help="give boards that haven't joined another claim: theirs have expired"
    )
    ssh.add_argument("--jobs", type=whole_number, default=8, metavar="N", help="boards at once (default: 8)")
    ssh.add_argument(
        "--wait", type=seconds, default=120.0, metavar="S", help="for a service to run (default: %(default)g s)"
    )
    ssh.add_argument("--accept-new-hosts", action="store_true", help="accept the key of an unknown host")
    ssh.add_argument("--journal", type=Path, metavar="FILE", help="how far each board is (default: INVENTORY.journal)")
    ssh.add_argument("--again", action="store_true", help="visit boards, too, that are done")
    ssh.add_argument("--dry-run", action="store_true", help="probe every board and print what would be done")
    ssh.add_argument(
        "--signing-key",
        type=Path,
        metavar="FILE",
        help="the server's, for each board's own settings (default: that of --server-state)",
    )
    ssh.add_argument("--unsigned", action="store_true", help="install without signatures")
    ssh.add_argument("--remove", action="store_true", help="undo an installation; the board's state stays")
    ssh.add_argument("--purge", action="store_true", help="with --remove: delete the board's state, too")
    add_json(ssh)
    ssh.set_defaults(run=with_extra("flash", _ssh))


def _ssh(arguments: argparse.Namespace) -> int:
    from fedprune_flash.kit.kit import open_kit, server_signer
    from fedprune_flash.ssh.installation import InstallationOrder, SshInstallation, print_outcomes
    from fedprune_flash.ssh.inventory import read_inventory
    from fedprune_flash.ssh.journal import Claims, Journal, read_claims

    if arguments.purge and not arguments.remove:
        raise UsageError("--purge without --remove")
    if not arguments.remove and not arguments.kit:
        raise UsageError("no kit is given", hint="Name one with --kit, as `fedprune-flash kit` makes it.")
    if arguments.jobs > _MOST_JOBS:
        raise UsageError("--jobs", expected=f"at most {_MOST_JOBS}", got=arguments.jobs)
    rows = read_inventory(arguments.inventory)
    rows = tuple(row for row in rows if not arguments.only or row.device in arguments.only)
    _check_only(arguments.only, [row.device for row in rows], arguments.inventory)
    key = arguments.signing_key
    if key is None and arguments.server_state is not None and not arguments.unsigned:
        key = arguments.server_state / "identity/signing.key"
    server = None if arguments.remove else server_signer(key, unsigned=arguments.unsigned)
    kits = tuple(open_kit(folder, server) for folder in arguments.kit)
    for kit in kits:
        for row in rows:
            row.told(kit.board)
    texts = () if arguments.claims is None else read_claims(arguments.claims)
    journal = Journal(arguments.journal or arguments.inventory.with_name(f"{arguments.inventory.name}.journal"))
    order = InstallationOrder(
        kits,
        arguments.remove,
        arguments.purge,
        arguments.dry_run,
        arguments.wait,
        arguments.accept_new_hosts,
        arguments.new_claims,
        server,
    )
    used = None if arguments.claims is None else arguments.claims.with_name(f"{arguments.claims.name}.used")
    claims = Claims(journal, texts, arguments.server_state, arguments.hours, used)
    with journal.alone(), ended_by_signals():
        outcomes = SshInstallation(order, claims, journal, jobs=arguments.jobs, again=arguments.again).run(rows)
    if arguments.json:
        keys = ("state", "reason", "remedy", "good")
        print_json([{"device": o.row.device, **{key: getattr(o, key) for key in keys}} for o in outcomes])
    else:
        print_outcomes(outcomes)
    good = sum(outcome.good for outcome in outcomes)
    what = "planned" if arguments.dry_run else "removed" if arguments.remove else "done"
    print(f"{good} of {quantity(len(outcomes), 'board')} {what}", file=sys.stderr)
    return int(ExitCode.OK if good == len(outcomes) else ExitCode.BOARD)


def _check_only(wanted: Sequence[str], found: Sequence[str], inventory: Path) -> None:
    for device in wanted:
        if device not in found:
            raise ConfigError(f"{inventory} has no board {device!r:.80}")
