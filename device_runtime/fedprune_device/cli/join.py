"""`fedprune-device join`."""

from __future__ import annotations

import argparse
import re
import shutil

from fedprune.core.cli import options_of
from fedprune.core.disk import storage_errors
from fedprune.core.errors import UsageError
from fedprune_device.network.membership import IDENTITY, MembershipOptions, checked_urls, join_first, membership
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore

_OLD_IDENTITY = "identity.old"  # the identity of a board that is about to join with a new key


def join(arguments: argparse.Namespace) -> None:
    owner = DirectoryOwner(arguments.device, arguments.site)
    owner.check(arguments.state)
    options = options_of(MembershipOptions, arguments)
    checked_urls(options)
    pin = _pin(arguments.pin)
    with DeviceStore(arguments.state, owner=owner):  # not while the service runs
        folder, old = arguments.state / IDENTITY, arguments.state / _OLD_IDENTITY
        with storage_errors(f"can't replace {folder}"):
            if arguments.new_key and folder.exists() and not old.exists():  # else the last try continues
                folder.rename(old)
        member = membership(options)
        if member.identity is not None and member.identity.joined:
            print(f"{options.device} is a member already, with key {member.identity.key.verifying.fingerprint}")
        else:
            try:
                join_first(member, pin=pin, patient=arguments.patient)
            except BaseException:
                if old.exists():  # what it was is better than nothing
                    shutil.rmtree(folder, ignore_errors=True)
                    old.rename(folder)
                raise
        with storage_errors(f"can't delete {old}"):
            if old.exists():
                shutil.rmtree(old)
        owner.claim(arguments.state)


def _pin(text: str | None) -> bytes | None:
    plain = re.sub(r"[\s:-]", "", text or "")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{24}", plain):
        raise UsageError("--pin", expected="24 hex digits, as `fedprune-server init` shows them", got=text[:80])
    return bytes.fromhex(plain)
