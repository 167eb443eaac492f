"""`fedprune-flash`: install the runtime on boards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedprune import __version__
from fedprune.core.cli import add_json_option, print_json, run_command, with_extra
from fedprune.core.command_parser import CommandParser
from fedprune.core.disk import path_exists
from fedprune.core.errors import ConfigError, path_remedy
from fedprune.core.text import decode_text, quantity
from fedprune.output.tables import byte_progress, progress
from fedprune_flash.image.board_setup import FirstBoot, Wifi, parse_ssh_keys
from fedprune_flash.kit.unit import DEFAULT_SAMPLES_PATH

_WIFI_VARIABLE = "FEDPRUNE_WIFI_PASSWORD"


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


def add_image_command(commands: argparse._SubParsersAction[CommandParser]) -> None:
    image = commands.add_parser("image", help="write a kit and a board's settings into an image of Raspberry Pi OS")
    image.add_argument("source", type=Path, metavar="SRC", help="the image: .img, .img.xz or .img.gz")
    image.add_argument("--out", type=Path, required=True, metavar="FILE", help="the image to make")
    image.add_argument("--kit", type=Path, required=True, metavar="FOLDER", help="a kit of `fedprune-flash kit`")
    image.add_argument("--hostname", metavar="NAME", help="the board's name in the network (default: as in the fleet)")
    image.add_argument(
        "--user", metavar="NAME", help="the user who logs in with --ssh-key, and has sudo (default: no new user)"
    )
    image.add_argument("--ssh-key", type=Path, metavar="FILE", help="public keys, such as ~/.ssh/id_ed25519.pub")
    image.add_argument("--wifi", metavar="SSID", help=f"wireless network; its passphrase is in ${_WIFI_VARIABLE}")
    image.add_argument(
        "--wifi-password-file", type=Path, metavar="FILE", help="the passphrase, in place of the variable"
    )
    image.add_argument(
        "--wifi-country", metavar="CC", help="country of the network, such as DE; without it the radio stays off"
    )
    image.add_argument("--wifi-hidden", action="store_true", help="the network doesn't announce itself")
    image.add_argument(
        "--scheme",
        choices=("cloud-init", "firstrun", "preseed"),
        help="how the image takes settings (default: recognised by its boot partition)",
    )
    image.add_argument(
        "--signing-key", type=Path, metavar="FILE", help="key of the server that must have signed the kit"
    )
    image.add_argument("--unsigned", action="store_true", help="don't check who signed the kit")
    image.add_argument("--dry-run", action="store_true", help="print every step, and write nothing")
    image.set_defaults(run=with_extra("flash", _image))


def _image(arguments: argparse.Namespace) -> None:
    from fedprune_flash.image import boot_image as image
    from fedprune_flash.image.first_boot import Scheme
    from fedprune_flash.image.programs import check_programs
    from fedprune_flash.kit.kit import open_kit, server_signer

    check_programs()
    kit = open_kit(arguments.kit, server_signer(arguments.signing_key, unsigned=arguments.unsigned))
    setup = _first_boot(arguments, kit.device)
    scheme = Scheme(arguments.scheme) if arguments.scheme else None
    out = None if arguments.dry_run else arguments.out
    packed_bytes = arguments.source.stat().st_size if path_exists(arguments.source, file=True) else 0
    # A claim, or the key of a wireless network.
    secret = kit.has_claim or setup.wifi is not None
    with (
        byte_progress(f"Unpacking {arguments.source.name}", packed_bytes) as advance,
        image.open_image(arguments.source, out, advance, private=secret) as file,
    ):
        contents = image.examine_image(file, scheme, str(arguments.source))
        image.check_image(contents, kit)
        steps = image.customise_image(file, contents, kit, setup, write=out is not None)
    system = contents.system.title or "unknown system"
    print(f"{system}, {contents.scheme.value}, {contents.system.mount}; kit: device {kit.device}, {kit.target}")
    steps = [f"copy {arguments.source} to {arguments.out} ({contents.size / 1e6:.0f} MB)", *steps]
    print("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))
    if out is not None:
        print(f"{out} is ready{f': for {kit.device} alone, since it holds its claim' if kit.has_claim else ''}.")
        if not kit.has_claim:
            print(NO_CLAIM_NOTE)


def _first_boot(arguments: argparse.Namespace, device: str) -> FirstBoot:
    keys = () if arguments.ssh_key is None else parse_ssh_keys(read_bytes(arguments.ssh_key).decode("utf-8", "replace"))
    wifi = None
    if arguments.wifi is not None:
        passphrase = os.environ.get(_WIFI_VARIABLE)
        if arguments.wifi_password_file is not None:
            passphrase = read_bytes(arguments.wifi_password_file).decode("utf-8", "replace").rstrip("\r\n")
        if passphrase is None:
            raise ConfigError(
                "no passphrase for the wireless network", hint=f"Set {_WIFI_VARIABLE} or use --wifi-password-file."
            )
        country = arguments.wifi_country or ""
        wifi = Wifi.from_passphrase(arguments.wifi, passphrase, country, hidden=arguments.wifi_hidden)
    return FirstBoot(arguments.hostname or device, arguments.user, keys, wifi)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("fedprune-flash", build_parser, argv)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="fedprune-flash",
        description="Install the runtime on boards.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_kit_command(commands)
    add_image_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
