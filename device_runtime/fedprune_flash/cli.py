"""`fedprune-flash`: kits for boards, and images of Raspberry Pi OS that bring one along."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedprune import __version__
from fedprune.cli import run_command, with_extra
from fedprune.errors import ConfigError, ExitCode, remedy
from fedprune_flash.board_file import SAMPLES, BoardFile

_CLAIM = "FEDPRUNE_CLAIM"


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
    return parser


def _add_kit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kit = commands.add_parser("kit", help="make a folder from which a board installs itself, without a network")
    kit.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    kit.add_argument("--server", required=True, metavar="URL", help="mqtt://host[:port] or mqtts://..., no password")
    kit.add_argument("--device", required=True, metavar="NAME", help="the board's name, unique in the site")
    kit.add_argument("--site", default="default", help="the fleet's site (default: default)")
    kit.add_argument("--data", default=SAMPLES, metavar="SRC", help="the board's samples (default: %(default)s)")
    kit.add_argument("--ca", type=Path, metavar="FILE", help="authorities that mqtts:// trusts, as PEM")
    kit.add_argument("--ca-sha256", metavar="HEX", help="the certificate's fingerprint, checked against --ca")
    kit.add_argument("--claim-file", type=Path, metavar="FILE", help=f"a one-time claim; ${_CLAIM} does the same")
    kit.add_argument("--python", default="3.13", metavar="V", help="the board's Python, 3.10 to 3.13 (default: 3.13)")
    kit.add_argument("--architecture", default="aarch64", metavar="A", help="aarch64 (default) or x86_64")
    kit.add_argument("--jetson", action="store_true", help="use the board's own onnxruntime-gpu and TensorRT")
    kit.add_argument("--wheel", type=Path, metavar="FILE", help="fedprune's wheel (default: built from the checkout)")
    kit.add_argument(
        "--find-links", type=Path, action="append", default=[], metavar="DIR", help="wheels; then no network is used"
    )
    kit.set_defaults(run=with_extra("flash", _kit))


def _kit(arguments: argparse.Namespace) -> int:
    from fedprune_flash.kit import build_kit
    from fedprune_flash.target import Target

    authorities = None if arguments.ca is None else _read(arguments.ca)
    claim = os.environ.get(_CLAIM)
    if arguments.claim_file is not None:
        claim = _read(arguments.claim_file).decode("utf-8", "replace")
    kit = build_kit(
        arguments.out,
        BoardFile(arguments.server, arguments.device, arguments.site, arguments.data, authorities is not None),
        Target(arguments.python, arguments.architecture, arguments.jetson),
        wheel=arguments.wheel,
        links=arguments.find_links,
        authorities=authorities,
        pin=arguments.ca_sha256,
        claim=claim,
    )
    print(f"{kit.folder}: {kit.target}, {len(kit.files)} files, {kit.bytes / 1e6:.1f} MB, sha256 {kit.digest}")
    print(f"On the board: sudo python3 {kit.folder.name}/install.py")
    return int(ExitCode.OK)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error


if __name__ == "__main__":
    sys.exit(main())
