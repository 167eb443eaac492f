"""`fedprune-flash`: kits for boards, images of Raspberry Pi OS that bring one along, and boards over SSH."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedprune import __version__
from fedprune.core.cli import run_command, with_extra
from fedprune.core.errors import CardError, ConfigError, ExitCode, UsageError, remedy
from fedprune.core.text import quantity
from fedprune_flash.image.board_setup import FirstBoot, Wifi, ssh_keys
from fedprune_flash.kit.board_settings import SAMPLES, BoardFile
from fedprune_flash.ssh_cli import add_ssh_command

_CLAIM = "FEDPRUNE_CLAIM"
_WIFI = "FEDPRUNE_WIFI_PASSWORD"
_NO_CLAIM = (
    "It has no claim, and without one no board gets in: give one to the kit (--claim-file), or to each board "
    "(fedprune-flash ssh --claims, or /var/lib/fedprune/claim there)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command("fedprune-flash", build_parser, argv)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="fedprune-flash",
        description="Put the runtime on boards.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_kit(commands)
    _add_image(commands)
    _add_jetson(commands)
    add_ssh_command(commands)
    return parser


def _add_kit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kit = commands.add_parser("kit", help="make a folder from which a board installs itself, without a network")
    kit.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    kit.add_argument("--server", required=True, metavar="URL", help="mqtts://host[:port], no password")
    kit.add_argument("--join", default="", metavar="URL", help="where to join (default: the server's host, port 8884)")
    kit.add_argument("--device", required=True, metavar="NAME", help="the board's name, unique in the site")
    kit.add_argument("--site", default="default", help="the fleet's site (default: default)")
    kit.add_argument("--data", default=SAMPLES, metavar="SRC", help="the board's samples (default: %(default)s)")
    kit.add_argument("--ca", type=Path, metavar="FILE", help="who vouches for the broker, as PEM (default: the fleet)")
    kit.add_argument("--ca-sha256", metavar="HEX", help="the certificate's fingerprint, checked against --ca")
    kit.add_argument("--claim-file", type=Path, metavar="FILE", help=f"a one-time claim; ${_CLAIM} does the same")
    kit.add_argument("--python", default="3.13", metavar="V", help="the board's Python, 3.10 to 3.13 (default: 3.13)")
    kit.add_argument("--architecture", default="aarch64", metavar="A", help="aarch64 (default) or x86_64")
    kit.add_argument("--jetson", action="store_true", help="use the board's own onnxruntime-gpu and TensorRT")
    kit.add_argument("--wheel", type=Path, metavar="FILE", help="fedprune's wheel (default: built from the checkout)")
    kit.add_argument(
        "--find-links", type=Path, action="append", default=[], metavar="DIR", help="wheels; then no network is used"
    )
    kit.add_argument(
        "--signing-key", type=Path, metavar="FILE", help="the server's, identity/signing.key in its state folder"
    )
    kit.set_defaults(run=with_extra("flash", _kit))


def _add_image(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    image = commands.add_parser("image", help="write a kit and a board's settings into an image of Raspberry Pi OS")
    image.add_argument("source", type=Path, metavar="SRC", help="the image: .img, .img.xz or .img.gz")
    image.add_argument("--out", type=Path, required=True, metavar="FILE", help="the image to make")
    image.add_argument("--kit", type=Path, required=True, metavar="FOLDER", help="what `fedprune-flash kit` made")
    image.add_argument("--hostname", metavar="NAME", help="the board's name in the network (default: as in the fleet)")
    image.add_argument(
        "--user", metavar="NAME", help="who may log in with --ssh-key, and has sudo (default: nobody new)"
    )
    image.add_argument("--ssh-key", type=Path, metavar="FILE", help="public keys, such as ~/.ssh/id_ed25519.pub")
    image.add_argument("--wifi", metavar="SSID", help=f"wireless network; its passphrase is in ${_WIFI}")
    image.add_argument(
        "--wifi-password-file", type=Path, metavar="FILE", help="the passphrase, in place of the variable"
    )
    image.add_argument("--wifi-country", metavar="CC", help="where it is, such as DE: without it the radio stays off")
    image.add_argument("--wifi-hidden", action="store_true", help="the network doesn't announce itself")
    image.add_argument(
        "--scheme",
        choices=("cloud-init", "firstrun", "custom-toml", "preseed"),
        help="how the image takes settings (default: told by its boot partition)",
    )
    image.add_argument("--card", metavar="DEVICE", help="write it to this card, too, and read it back; needs root")
    image.add_argument("--yes", metavar="DEVICE", help="the same device once more, instead of typing it when asked")
    image.add_argument("--unsigned", action="store_true", help="take a kit that no server has signed")
    image.add_argument("--dry-run", action="store_true", help="say every step and its reverse, and write nothing")
    image.set_defaults(run=with_extra("flash", _image))


def _add_jetson(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    jetson = commands.add_parser("jetson", help="print the commands that put Jetson Linux on a Jetson")
    jetson.add_argument("board", metavar="BOARD", help="such as jetson-orin-nano")
    jetson.add_argument("--release", required=True, metavar="R", help="of Jetson Linux, such as 36.4.3")
    jetson.add_argument("--storage", metavar="WHERE", help="what it boots from: nvme, sd or emmc (default: as usual)")
    jetson.add_argument("--user", default="nvidia", metavar="NAME", help="the first user (default: nvidia)")
    jetson.set_defaults(run=_jetson)


def _jetson(arguments: argparse.Namespace) -> int:
    from fedprune_flash.jetson import commands

    lines = commands(arguments.board, arguments.release, arguments.storage, arguments.user)
    print("# On an x86-64 Ubuntu, the board on its USB in recovery mode; all that is on its storage will be lost.")
    print("\n".join(lines))
    return int(ExitCode.OK)


def _image(arguments: argparse.Namespace) -> int:
    from fedprune_flash.card import drives
    from fedprune_flash.image import boot_image as image
    from fedprune_flash.image.first_boot_scheme import Scheme
    from fedprune_flash.kit.kit import open_kit
    from fedprune_flash.kit.plan import Step, described
    from fedprune_flash.shown_progress import shown_progress

    if arguments.yes is not None and arguments.yes != arguments.card:
        raise UsageError("--yes names another device than --card", expected=arguments.card, got=arguments.yes)
    card = None if arguments.card is None else drives.chosen(arguments.card, drives.drives(), 0)
    kit = open_kit(arguments.kit, unsigned=arguments.unsigned)
    wanted = _first_boot(arguments, kit.board.device)
    scheme = Scheme(arguments.scheme) if arguments.scheme else None
    out = None if arguments.dry_run else arguments.out
    secret = kit.claimed or wanted.wifi is not None
    with (
        shown_progress(f"Unpacking {arguments.source.name}") as told,
        image.opened_image(arguments.source, out, told, private=secret) as file,
    ):
        contents = image.examine(file, scheme, str(arguments.source))
        image.check(contents, kit)
        steps = image.customise(file, contents, kit, wanted, write=out is not None)
    size = f"{contents.size / 1e6:.0f} MB"
    steps = [Step(f"copy {arguments.source} to {arguments.out} ({size})", f"delete {arguments.out}"), *steps]
    system = contents.system.title or "unknown system"
    print(f"{system}, {contents.scheme.value}, {contents.system.mount}; kit: {kit.target}")
    print(described(steps))
    if card is not None:
        print(described([Step(f"write {arguments.out} to {card}", "none: what is on the card will be lost")]))
    if out is not None:
        print(f"{out} is ready{': for one board, since it holds a claim' if kit.claimed else ''}.")
        if not kit.claimed:
            print(_NO_CLAIM)
        if card is not None:
            _write_card(out, card.path, arguments.yes)
    return int(ExitCode.OK)


def _write_card(image: Path, device: str, yes: str | None) -> None:
    from fedprune_flash.card.card_writer import write_card
    from fedprune_flash.card.drives import chosen, drives
    from fedprune_flash.shown_progress import shown_progress

    # Drives come and go while an image is made: look again before anything is lost.
    drive = chosen(device, drives(), image.stat().st_size)
    if yes is None:
        print(f"All that is on {drive} will be lost. Type {drive.path} to go on: ", end="", flush=True)
        if sys.stdin.readline().strip() != drive.path:
            raise CardError(f"{drive.path} was not confirmed", hint=f"{image} is kept.")
        # Somebody was asked about this drive; by the answer its name may be another's.
        now = chosen(device, drives(), image.stat().st_size)
        if now != drive:
            raise CardError(
                f"{drive.path} is another drive now", expected=str(drive), got=str(now), hint=f"{image} is kept."
            )
    with shown_progress(f"Writing {drive.path} and reading it back") as told:
        digest = write_card(image, Path(drive.path), told)
    print(f"{drive.path} holds the image, sha256 {digest}.")


def _first_boot(arguments: argparse.Namespace, device: str) -> FirstBoot:
    keys = () if arguments.ssh_key is None else ssh_keys(_read(arguments.ssh_key).decode("utf-8", "replace"))
    wifi = None
    if arguments.wifi is not None:
        passphrase = os.environ.get(_WIFI)
        if arguments.wifi_password_file is not None:
            passphrase = _read(arguments.wifi_password_file).decode("utf-8", "replace").rstrip("\r\n")
        if passphrase is None:
            raise ConfigError(
                "no passphrase for the wireless network", hint=f"Set {_WIFI} or use --wifi-password-file."
            )
        wifi = Wifi.of(arguments.wifi, passphrase, arguments.wifi_country or "", hidden=arguments.wifi_hidden)
    return FirstBoot(arguments.hostname or device, arguments.user, keys, wifi)


def _kit(arguments: argparse.Namespace) -> int:
    from fedprune.security.keys import VerifyingKey
    from fedprune_flash.kit.kit import Signer, build_kit
    from fedprune_flash.kit.target import Target

    authorities = None if arguments.ca is None else _read(arguments.ca)
    claim = os.environ.get(_CLAIM)
    if arguments.claim_file is not None:
        claim = _read(arguments.claim_file).decode("utf-8", "replace")
    kit = build_kit(
        arguments.out,
        BoardFile(
            arguments.server, arguments.device, arguments.site, arguments.data, authorities is not None, arguments.join
        ),
        Target(arguments.python, arguments.architecture, arguments.jetson),
        wheel=arguments.wheel,
        links=arguments.find_links,
        authorities=authorities,
        pin=arguments.ca_sha256,
        claim=claim,
        signer=None if arguments.signing_key is None else Signer.load(arguments.signing_key),
    )
    print(
        f"{kit.folder}: {kit.target}, {quantity(len(kit.files), 'file')}, {kit.bytes / 1e6:.1f} MB, sha256 {kit.digest}"
    )
    if not kit.claimed:
        print(_NO_CLAIM)
    if kit.key:
        print(f"It is signed with key {VerifyingKey.from_hex(kit.key).fingerprint}.")
    else:
        print("It is not signed: nothing shows a board who made it (--signing-key).")
    print(f"On the board: sudo python3 {kit.folder.name}/install.pyz{'' if kit.key else ' --unsigned'}")
    return int(ExitCode.OK)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error


if __name__ == "__main__":
    sys.exit(main())
