"""Approve, deny and revoke devices, as an operator decides at a terminal or in the console."""

from __future__ import annotations

from fedprune.core.errors import JoinError, did_you_mean, value_text
from fedprune.core.text import quantity
from fedprune.security.keys import VerifyingKey
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import REVOKED, WAITING


def approve(identity: IdentityFolder, device: str, fingerprint: str) -> str:
    """Approve a waiting device by its key's fingerprint; returns a message. Raises `JoinError` if no such key waits."""
    normalised = fingerprint.strip().lower()
    members = identity.store.devices()
    waiting = [member for member in members if member.device == device and member.status == WAITING]
    if not waiting:
        suggestion = did_you_mean(device, {member.device for member in members if member.status == WAITING})
        raise JoinError(f"no such device waits: {device}{suggestion}", hint="See `fedprune-server devices`.")
    matching = [member for member in waiting if VerifyingKey.from_hex(member.key).fingerprint == normalised]
    if not matching:
        raise JoinError(
            f"no key with this fingerprint waits as {device}", got=value_text(fingerprint),
            hint="If the board shows it, another board's key waits: don't approve it. See `fedprune-server devices`.",
        )  # fmt: skip
    identity.store.approve(device, matching[0].key, identity.authority.now())
    return f"{device} is approved with key {normalised}"


def deny(identity: IdentityFolder, device: str, fingerprint: str | None = None) -> str:
    """Deny the waiting key of this fingerprint, or all that wait under a name; an approved device of that name stays.
    Returns a message. Raises `JoinError` if none waits.
    """
    normalised = None if fingerprint is None else fingerprint.strip().lower()
    keys = [
        member.key
        for member in identity.store.devices()
        if member.device == device
        and member.status == WAITING
        and normalised in (None, VerifyingKey.from_hex(member.key).fingerprint)
    ]
    count = identity.store.deny(device, keys, identity.authority.now())
    if not count:
        raise JoinError(f"no such device waits: {device}", hint="See `fedprune-server devices`.")
    return f"{device}: {quantity(count, 'key')} turned away"


def revoke(identity: IdentityFolder, device: str) -> str:
    """Revoke a device, approved or waiting; returns a message. Raises `JoinError` if there is none of this name."""
    keys, certificates = identity.revoke(device)
    if not keys:
        if any(d.device == device and d.status == REVOKED for d in identity.store.devices()):
            raise JoinError(f"{device} is revoked already", hint="See `fedprune-server devices`.")
        suggestion = did_you_mean(device, {d.device for d in identity.store.devices()})
        raise JoinError(f"no device {device} is approved or waits{suggestion}", hint="See `fedprune-server devices`.")
    return revocation_message(identity, device, keys, certificates)


def revocation_message(identity: IdentityFolder, device: str, keys: int, certificates: int) -> str:
    """The message about a revoked device."""
    line = f"{device}: {quantity(keys, 'key')} and {quantity(certificates, 'certificate')} revoked"
    if not certificates:
        return line
    # A broker reads the list of revoked certificates when it starts: until then the certificate still connects.
    path = identity.authority.crl_path
    return f"{line}.\nUnless on_revocation does that, copy {path} to the broker and restart the broker"
