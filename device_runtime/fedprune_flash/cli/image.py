"""`fedprune-flash image`: write a kit and a board's settings into an image of Raspberry Pi OS."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedprune.core.cli import with_extra
from fedprune.core.command_parser import CommandParser
from fedprune.core.disk import path_exists
from fedprune.core.errors import ConfigError
from fedprune.output.tables import byte_progress
from fedprune_flash.cli.kit import NO_CLAIM_NOTE, read_bytes
from fedprune_flash.image.board_setup import FirstBoot, Wifi, parse_ssh_keys

_WIFI_VARIABLE = "FEDPRUNE_WIFI_PASSWORD"


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
