"""`fedprune-device join`: become a member of a fleet, and keep the old identity until the new one is accepted."""

from __future__ import annotations

import argparse
import re
import shutil

from fedprune.core.cli import options_of
from fedprune.core.disk import storage_errors
from fedprune.core.errors import UsageError
from fedprune_device.network import membership
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore

# The identity of a board that is about to join with a new key: it comes back if joining fails.
_OLD_IDENTITY = "identity.old"


def join(arguments: argparse.Namespace) -> None:
    owner = DirectoryOwner(arguments.device, arguments.site)
    owner.check(arguments.state)
    options = options_of(membership.MembershipOptions, arguments)
    membership.checked_urls(options)  # only for its errors, before the old identity is moved
    pin = _pin(arguments.pin)
    # The store's lock keeps the service from running meanwhile.
    with DeviceStore(arguments.state, owner=owner):
        folder, old_identity = arguments.state / membership.IDENTITY_FOLDER, arguments.state / _OLD_IDENTITY
        with storage_errors(f"can't replace {folder}"):
            # Where an old identity is there already, an earlier try was interrupted: it continues.
            if arguments.new_key and folder.exists() and not old_identity.exists():
                folder.rename(old_identity)
        member = membership.resolve_membership(options)
        if member.identity is not None and member.identity.has_joined:
            print(f"{options.device} is a member already, with key {member.identity.key.verifying_key.fingerprint}")
        else:
            try:
                membership.join_first(member, pin=pin, patient=arguments.patient)
            except BaseException:
                # The old identity may still be a valid one.
                if old_identity.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    old_identity.rename(folder)
                raise
        with storage_errors(f"can't delete {old_identity}"):
            if old_identity.exists():
                shutil.rmtree(old_identity)
        owner.claim(arguments.state)


def _pin(text: str | None) -> bytes | None:
    # Operators copy it with the separators that the server prints.
    digits = re.sub(r"[\s:-]", "", text or "")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{24}", digits):
        raise UsageError("--pin", expected="24 hex digits, as `fedprune-server init` shows them", got=text[:80])
    return bytes.fromhex(digits)
