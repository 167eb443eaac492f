"""`fedprune-flash kit`: make a folder from which a board installs itself, without a network."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedprune.core.cli import add_json_option, print_json, with_extra
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import ConfigError, path_remedy
from fedprune.core.text import decode_text, quantity
from fedprune.output.tables import progress
from fedprune_flash.kit.unit import DEFAULT_SAMPLES_PATH

_CLAIM_VARIABLE = "FEDPRUNE_CLAIM"
NO_CLAIM_NOTE = (
    "It has no claim, and no board joins without one: give one to the kit (--claim-file), or to each board "
    "(install.pyz --claim there, as deploy/ansible does)."
)


def add_kit_command(commands: argparse._SubParsersAction[CommandParser]) -> None:
    kit = commands.add_parser("kit", help="make a folder from which a board installs itself, without a network")
    kit.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    kit.add_argument("--server", required=True, metavar="URL", help="mqtts://host[:port], no password")
    kit.add_argument(
        "--join", default="", metavar="URL", help="address for joining (default: the port after the server's)"
    )
    kit.add_argument(
        "--device",
        required=True,
        metavar="NAME",
        help="the board's name, unique in the site; `any` for one that Ansible names",
    )
    kit.add_argument("--site", default="default", help="the fleet's site (default: default)")
    kit.add_argument(
        "--data", default=DEFAULT_SAMPLES_PATH, metavar="SRC", help="the board's samples (default: %(default)s)"
    )
    kit.add_argument("--ca", type=Path, metavar="FILE", help="authority of the broker, as PEM (default: the fleet's)")
    kit.add_argument(
        "--claim-file",
        type=Path,
        metavar="FILE",
        help="a file with the board's one-time claim, also among those of other boards; or put the claim into "
        f"${_CLAIM_VARIABLE}",
    )
    kit.add_argument("--python", default="3.13", metavar="V", help="the board's Python, 3.10 to 3.13 (default: 3.13)")
    kit.add_argument("--architecture", default="aarch64", metavar="A", help="aarch64 (default) or x86_64")
    kit.add_argument("--jetson", action="store_true", help="use the board's own onnxruntime-gpu and TensorRT")
    kit.add_argument("--wheel", type=Path, metavar="FILE", help="fedprune's wheel (default: built from the checkout)")
    kit.add_argument(
        "--find-links", type=Path, action="append", default=[], metavar="DIR", help="wheels; then no network is used"
    )
    kit.add_argument(
        "--signing-key", type=Path, metavar="FILE", help="the server's key: identity/signing.key in its state folder"
    )
    add_json_option(kit)
    kit.set_defaults(run=with_extra("flash", _kit))


def _kit(arguments: argparse.Namespace) -> None:
    from fedprune.security.keys import SigningKey, VerifyingKey
    from fedprune_flash.kit.board_settings import BoardSettings
    from fedprune_flash.kit.kit import build_kit
    from fedprune_flash.kit.target import BoardTarget

    authorities = None if arguments.ca is None else read_bytes(arguments.ca)
    claim = os.environ.get(_CLAIM_VARIABLE)
    if arguments.claim_file is not None:
        raw = read_bytes(arguments.claim_file)
        try:
            claim = decode_text(raw)
        except UnicodeError:
            claim = raw.decode("ascii", "replace")
    board = BoardSettings(
        server=arguments.server,
        device=arguments.device,
        site=arguments.site,
        data=arguments.data,
        authority=authorities is not None,
        join=arguments.join,
    )
    with progress("making the kit") as tell:
        kit = build_kit(
            arguments.out,
            board,
            BoardTarget(arguments.python, arguments.architecture, arguments.jetson),
            wheel=arguments.wheel,
            links=arguments.find_links,
            authorities=authorities,
            claim=claim,
            signer=None if arguments.signing_key is None else SigningKey.load(arguments.signing_key),
            tell=tell,
        )
    if arguments.json:
        body = {"folder": str(kit.folder), "device": kit.device, "target": str(kit.target), "files": len(kit.paths)}
        origin = {"sha256": kit.digest, "claimed": kit.has_claim, "key": kit.signed_by or None}
        print_json({**body, "bytes": kit.bytes, **origin})
        return
    size = f"{quantity(len(kit.paths), 'file')}, {kit.bytes / 1e6:.1f} MB"
    print(f"{kit.folder}: device {kit.device}, {kit.target}, {size}, sha256 {kit.digest}")
    print(f"Its claim lets {kit.device} join, once." if kit.has_claim else NO_CLAIM_NOTE)
    if kit.signed_by:
        print(f"It is signed with key {VerifyingKey.from_hex(kit.signed_by).fingerprint}.")
    else:
        print("It is not signed: a board can't tell who made it (--signing-key).")
    print(f"On the board: sudo python3 -I {kit.folder.name}/install.pyz{'' if kit.signed_by else ' --unsigned'}")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
