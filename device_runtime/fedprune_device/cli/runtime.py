"""The commands of `fedprune-device` that install and update the runtime, and that make its service."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, ExitCode, ProtocolError, StorageError, shown
from fedprune_device.hardware.board_facts import TEGRA
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.launcher.state import SLOTS, STABLE, TRIAL, DamagedError, LauncherState
from fedprune_device.releases.unit import ServiceUnit

ROOT = Path("/opt/fedprune")
_KEY = Path("/var/lib/fedprune/identity/server.pub")
"""Where a board that has joined keeps its server's key."""

_LARGEST_KEY_FILE = 200


def add_runtime_commands(commands: Any) -> None:
    """Add them to the parser's commands."""
    install = commands.add_parser("install", help="set this board up: a launcher, two slots, a first release")
    update = commands.add_parser("update", help="bring a release into the slot that doesn't run, to be tried next")
    for parser in (install, update):
        parser.add_argument("--release", type=Path, required=True, metavar="DIR", help="the release's folder")
        parser.add_argument(
            "--key",
            default=str(_KEY),
            metavar="KEY",
            help="the server's key, as `fedprune-server release` shows it, or a file with it (default: %(default)s)",
        )
        parser.add_argument(
            "--jetson",
            action=argparse.BooleanOptionalAction,
            default=TEGRA.exists(),
            help="never hide packages that JetPack brings (default: as this board is)",
        )
    update.add_argument("--stage-only", action="store_true", help="leave its trial to a later `update`")
    update.add_argument("--attempts", type=int, default=3, metavar="N", help="starts of a trial (default: 3)")
    update.add_argument(
        "--deadline", type=float, default=600.0, metavar="S", help="seconds of each until it is healthy (default: 600)"
    )
    slots = commands.add_parser("slots", help="say which release runs, and how the last update ended")
    slots.add_argument("--json", action="store_true", help="as JSON, for programs")
    for parser in (install, update, slots):
        parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="default: %(default)s")
    install.set_defaults(run=_install)
    update.set_defaults(run=_update)
    slots.set_defaults(run=_slots)
    _add_unit(commands)


def _add_unit(commands: Any) -> None:
    unit = commands.add_parser("unit", help="print the systemd unit of this board's service")
    kind = unit.add_mutually_exclusive_group(required=True)
    kind.add_argument("--cpu", action="store_true", help="a board that computes on its processor: strict sandbox")
    kind.add_argument("--jetson", action="store_true", help="a board that computes on an NVIDIA GPU")
    unit.add_argument("--root", default=str(ROOT), metavar="DIR", help="of launcher and slots (default: %(default)s)")
    unit.add_argument("--user", default=ServiceUnit.user, metavar="NAME", help="who runs it (default: %(default)s)")
    unit.add_argument(
        "--environment",
        default=ServiceUnit.environment,
        metavar="FILE",
        help="with FEDPRUNE_BROKER (default: %(default)s)",
    )
    unit.add_argument("--memory", default=ServiceUnit.memory_max, metavar="MOST", help="default: %(default)s")
    unit.add_argument("--cpu-quota", type=int, default=0, metavar="PERCENT", help="of one core (default: no limit)")
    unit.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="what the service is started with: run ...")
    unit.set_defaults(run=_unit)


def _install(arguments: argparse.Namespace) -> int:
    from fedprune_device.releases.release_source import FolderSource

    release = _updater(arguments).install(FolderSource(arguments.release))
    print(f"release {release.number} ({release.version}) is installed in {arguments.root}")
    return int(ExitCode.OK)


def _update(arguments: argparse.Namespace) -> int:
    from fedprune_device.releases.release_source import FolderSource

    updater = _updater(arguments)
    release = updater.stage(FolderSource(arguments.release))
    if arguments.stage_only:
        print(f"release {release.number} ({release.version}) is staged")
    else:
        updater.arm(arguments.attempts, arguments.deadline)
        print(f"release {release.number} ({release.version}) is tried when the service starts the next time")
    return int(ExitCode.OK)


def _updater(arguments: argparse.Namespace) -> Any:
    from fedprune_device.releases.installer import KEPT, ReleaseInstaller

    key, identity = _server_key(arguments.key), Path(arguments.key).parent if Path(arguments.key).exists() else None
    return ReleaseInstaller(arguments.root, key, identity=identity, keep=KEPT if arguments.jetson else ())


def _server_key(given: str) -> Any:
    """The server's verifying key, from its hex digits or from a file of them."""
    from fedprune.security.keys import VerifyingKey

    text, what = given, "--key"
    if not re.fullmatch(r"[0-9a-f]{64}", given):
        path = Path(given)
        if "/" not in given and not path.exists():
            raise ConfigError(
                "--key",
                expected="64 hex digits, or a file with them",
                got=shown(given),
                hint="`fedprune-server release` shows them; the fingerprint that `init` shows is shorter.",
            )
        with storage_errors(f"can't read the server's key {path}"), path.open("rb") as file:
            text, what = file.read(_LARGEST_KEY_FILE).decode("ascii", "replace").strip(), f"the server's key {path}"
    try:
        return VerifyingKey.from_hex(text, what)
    except ProtocolError as error:
        raise ConfigError(error.what, expected=error.expected, got=error.got) from error


def _slots(arguments: argparse.Namespace) -> int:
    home = SlotStore(arguments.root)
    state = home.load()
    if state is None:
        raise StorageError(
            f"{arguments.root} has no runtime whose state is whole",
            hint="The launcher mends it when the service starts; `fedprune-device install` sets a board up.",
        )
    held = {slot: _held(home, slot) for slot in SLOTS}
    if arguments.json:
        print(json.dumps({**asdict(state), "slots": held}, sort_keys=True))
    else:
        sys.stdout.writelines(f"{line}\n" for line in _described(state, held))
    return int(ExitCode.OK)


def _held(home: SlotStore, slot: str) -> tuple[int, str] | str:
    """Number and version of what is in a slot, or what is wrong with it."""
    if not (home.folder / f"{slot}.json").exists():
        return "empty"
    try:
        record = home.whole(slot)
    except DamagedError as error:
        return str(error)
    return record.version, record.name


def _described(state: LauncherState, held: dict[str, tuple[int, str] | str]) -> list[str]:
    lines = []
    for slot, what in held.items():
        role = "stable" if slot == state.stable else state.phase if state.phase != STABLE else "not in use"
        lines.append(f"{slot}: {what if isinstance(what, str) else f'release {what[0]} ({what[1]})'}, {role}")
    if state.phase == TRIAL:
        lines.append(f"trial: {state.left} attempts of {state.seconds:g} s left {state.trouble}".rstrip())
    if state.outcome is not None:
        end = state.outcome
        lines.append(f"last update: release {end.version} {end.result}" + (f": {end.reason}" if end.reason else ""))
    return lines


def _unit(arguments: argparse.Namespace) -> int:
    service = ServiceUnit(
        jetson=arguments.jetson,
        arguments=tuple(arguments.arguments) or ServiceUnit().arguments,
        root=arguments.root,
        user=arguments.user,
        environment=arguments.environment,
        memory_max=arguments.memory,
        cpu_quota=arguments.cpu_quota,
    )
    print(service.text(), end="")
    return int(ExitCode.OK)
