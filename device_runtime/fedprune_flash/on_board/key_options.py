"""Options of the installer: the server's key, which the board trusts, and a one-time claim, with which it joins."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from fedprune.core.disk import open_file, read_file
from fedprune.core.errors import JoinError, KitError, value_text
from fedprune.core.text import decode_text
from fedprune_device.launcher.slot_store import KEY_FILE
from fedprune_flash.on_board.board_system import RUNTIME_FOLDER, STATE_FOLDER, BoardSystem
from fedprune_flash.on_board.kit_folder import KitFolder

_KEY_DIGITS = re.compile(r"[0-9a-f]{64}")
_CLAIM = re.compile(rb"FP1[A-Z0-9]{56}")
# Bytes that are read of a claim: its text with dashes, blanks and a device's name, also in UTF-16 as Windows writes it.
_MAX_CLAIM_BYTES = 400


def read_key_option(option: str, *, own: bool = False) -> bytes:
    """A server's key from 64 hex digits, or from a file with them, with `own` no link; otherwise `KitError`."""
    digits = option
    try:
        if not _KEY_DIGITS.fullmatch(option):
            digits = read_file(option, 200, own=own).decode("ascii", "replace").strip()
    except OSError as error:
        raise KitError(f"can't read the server's key {option}: {error.strerror}") from error
    if not _KEY_DIGITS.fullmatch(digits):
        raise KitError(f"the server's key {value_text(option)}", expected="64 hex digits, or a file with them")
    return bytes.fromhex(digits)


def read_claim_option(option: str, device: str) -> bytes:
    """A claim for this device from a file, or from standard input for -; otherwise `JoinError`. The service checks its
    digits."""
    try:
        with open(0, "rb", closefd=False) if option == "-" else open_file(option) as file:
            raw = file.read(_MAX_CLAIM_BYTES)
    except OSError as error:
        raise JoinError(f"can't read the claim {option}: {error.strerror}") from error
    with suppress(UnicodeError):
        raw = decode_text(raw).encode()
    claim = raw.strip()
    code, _, name = claim.partition(b"@")
    # A name with white space is further lines, such as other boards' claims, which no message may show.
    if not _CLAIM.fullmatch(re.sub(rb"[\s-]", b"", code).upper()) or len(name.split()) > 1:
        raise JoinError(
            f"the claim {option}",
            expected="FP1- and 7 groups of 8 characters",
            # Not the text itself, which may be a key.
            got=f"another text of {len(claim)} bytes",
            hint="`fedprune-server claim` makes one.",
        )
    if name and name.decode("ascii", "replace") != device:
        raise JoinError(
            f"the claim {option} is another device's",
            expected=f"one for {device}",
            got=f"one for {value_text(name.decode('ascii', 'replace'))}",
            hint="--device names this board, where the kit doesn't.",
        )
    return claim


def trusted_key(kit: KitFolder, system: BoardSystem, option: str | None, *, unsigned: bool) -> bytes | None:
    """The key that this board trusts with a kit; None for a kit that may be installed unsigned.

    Raises `KitError` if the kit is not signed, or by another key than the one that the operator names or the board
    knows.
    """
    known_key = _known_key(system) if option is None else read_key_option(option)
    if kit.signature or (known_key is not None and not unsigned):
        return kit.authenticate(known_key)
    if not unsigned:
        raise KitError("the kit is not signed", hint="Make it with --signing-key, or install it with --unsigned.")
    if system.path_of(f"{RUNTIME_FOLDER}/{KEY_FILE}").exists():
        raise KitError(
            "the kit is not signed, and this board's launcher starts only what its server has signed",
            hint="Make the kit with --signing-key, or --remove the installation first.",
        )
    return None


def _known_key(system: BoardSystem) -> bytes | None:
    """The server's key that this board knows: from root's own file, or from the identity with which it joined."""
    for path in (f"{RUNTIME_FOLDER}/{KEY_FILE}", f"{STATE_FOLDER}/identity/{KEY_FILE}"):
        if os.path.lexists(system.path_of(path)):
            # The second file is the service's: its user could put a link or a pipe there, which root must not open.
            return read_key_option(str(system.path_of(path)), own=True)
    return None
