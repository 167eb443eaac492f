"""The commands of `fedprune-device` that update the runtime, and show its slots."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedprune.core.disk import open_file, storage_errors
from fedprune.core.errors import ConfigError, StorageError, value_text
from fedprune.core.validation import is_digest
from fedprune_device.launcher.slot_store import SlotStore
from fedprune_device.launcher.state import SLOTS, STABLE, TRIAL, DamagedError, LauncherState

_MAX_KEY_FILE_BYTES = 200  # a key is 64 hex digits; another file need not be read whole to say so


def update(arguments: argparse.Namespace) -> None:
    from fedprune_device.releases.installer import JETPACK_PACKAGES, ReleaseInstaller, ReleaseSource

    keep = JETPACK_PACKAGES if arguments.jetson else ()
    installer = ReleaseInstaller(arguments.root, _server_key(arguments.key), keep=keep)
    release = installer.stage(ReleaseSource.of_folder(arguments.release))
    if arguments.stage_only:
        print(f"release {release.number} ({release.version}) is staged")
    else:
        installer.arm(arguments.attempts, arguments.deadline)
        print(f"release {release.number} ({release.version}) is tried when the service starts the next time")


def _server_key(option: str) -> Any:
    from fedprune.security.keys import VerifyingKey

    text, subject = option, "--key"
    if not is_digest(option):
        path = Path(option)
        if "/" not in option and not path.exists():
            raise ConfigError(
                "--key",
                expected="64 hex digits, or a file with them",
                got=value_text(option),
                hint="`fedprune-server release` shows them; the fingerprint that `init` shows is shorter.",
            )
        with storage_errors(f"can't read the server's key {path}"), open_file(path) as file:
            text = file.read(_MAX_KEY_FILE_BYTES).decode("ascii", "replace").strip()
        subject = f"the server's key {path}"
    return VerifyingKey.from_hex(text, subject, error=ConfigError)


def slots(arguments: argparse.Namespace) -> None:
    store = SlotStore(arguments.root)
    state = store.load()
    if state is None:
        raise StorageError(
            f"{arguments.root} has no runtime whose state is whole",
            hint="The launcher mends it when the service starts; a kit sets a board up.",
        )
    contents = {slot: _slot_content(store, slot) for slot in SLOTS}
    if arguments.json:
        print(json.dumps({**asdict(state), "slots": contents}, sort_keys=True))
    else:
        sys.stdout.writelines(f"{line}\n" for line in _slot_lines(state, contents))


def _slot_content(store: SlotStore, slot: str) -> tuple[int, str] | str:
    """Number and version of a slot's release, or a text that says why there is none."""
    if not (store.folder / f"{slot}.json").exists():
        return "empty"
    try:
        record = store.checked_record(slot)
    except DamagedError as error:
        return str(error)
    return record.version, record.name


def _slot_lines(state: LauncherState, contents: dict[str, tuple[int, str] | str]) -> list[str]:
    lines = []
    for slot, content in contents.items():
        role = "stable" if slot == state.stable else state.phase if state.phase != STABLE else "not in use"
        text = content if isinstance(content, str) else f"release {content[0]} ({content[1]})"
        lines.append(f"{slot}: {text}, {role}")
    if state.phase == TRIAL:
        lines.append(f"trial: {state.left} attempts of {state.seconds:g} s left {state.trouble}".rstrip())
    if state.outcome is not None:
        reason = f": {state.outcome.reason}" if state.outcome.reason else ""
        lines.append(f"last update: release {state.outcome.version} {state.outcome.result}{reason}")
    return lines
