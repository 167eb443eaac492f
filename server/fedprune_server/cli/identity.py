"""`fedprune-server init`, `identity`, `claim`, `devices` and `broker-config`: the server's identity, and its boards."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from fedprune.core.cli import options_of, print_json
from fedprune.core.disk import storage_errors
from fedprune.core.errors import IdentityError, JoinError, UsageError, did_you_mean
from fedprune.core.text import quantity
from fedprune.security.keys import VerifyingKey, grouped_digits
from fedprune_device.storage.directory_owner import check_unowned
from fedprune_server.cli.fleet_options import CERTIFICATE, DEVICE_ACTIONS, REPLACE
from fedprune_server.cli.state_option import chosen_database
from fedprune_server.devices.crash_store import board_time, read_warnings
from fedprune_server.enrollment.approval import approve, revocation_message, revoke
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.broker.broker_files import BROKER_KEY_FILE, BrokerAddress, write_broker
from fedprune_server.storage.folder_layout import database_url, store_url
from fedprune_server.storage.folder_lock import folder_lock
from fedprune_server.storage.lease import leader_elsewhere

# Printed after `replace`: without these steps the fleet stays disconnected.
_STEPS_AFTER_REPLACE = (
    "back the identity up, and copy it to standbys; if [server] console_certificate was in it, make another with "
    "`identity certificate`; give the broker the files that `fedprune-server broker-config` writes now and restart it "
    "(the embedded broker needs none), then start the server. No board is a member any more: make a claim for each "
    "(`fedprune-server claim`), and let it join again with that: fedprune-device join --new-key --claim FILE"
)

# Claims are secrets that open a fleet: a slip of the keyboard must not make a million, nor one that lasts for ever.
_MAX_CLAIMS = 1000
_MAX_HOURS = 24 * 365


def run_init(arguments: argparse.Namespace) -> None:
    check_unowned(arguments.state)
    database = chosen_database(arguments)
    with IdentityFolder.make(arguments.state, arguments.site) as identity:
        if database is not None:
            store_url(arguments.state, database_url(arguments.state, database))
        if arguments.json:
            print_json({**_identity_fields(identity), "folder": str(identity.path)})
            return
        print(f"identity of site {identity.site} in {identity.path}: back it up, and keep it private")
        _print_identity(identity)


def run_identity(arguments: argparse.Namespace) -> None:
    action: str = arguments.action
    if bool(arguments.hosts) != (action == CERTIFICATE):
        raise UsageError("--host", expected=f"with {CERTIFICATE}, and only with it", got=f"identity {action}")
    if action == CERTIFICATE:
        _issue_console_certificate(arguments)
        return
    if action == REPLACE:
        IdentityFolder(arguments.state, read_only=True).close()  # raises without an identity, before locks are taken
        # A server that runs would continue with the old keys.
        with folder_lock(arguments.state), _open_identity(arguments) as identity:
            if leader := leader_elsewhere(arguments.state):
                hint = "Stop it and all that stand by, then run this again."
                raise IdentityError(f"a server elsewhere has the job: {leader}", hint=hint)
            identity.replace().close()
    with IdentityFolder(arguments.state, database=chosen_database(arguments), read_only=True) as identity:
        if arguments.json:
            print_json(_identity_fields(identity))
        else:
            print(f"site:                 {identity.site}")
            _print_identity(identity)
    if action == REPLACE:
        print(_STEPS_AFTER_REPLACE, file=sys.stderr if arguments.json else sys.stdout)


def _issue_console_certificate(arguments: argparse.Namespace) -> None:
    with _open_identity(arguments) as identity:
        certificate, key, authority = identity.console_files(arguments.hosts)
    if arguments.json:
        print_json({"console_certificate": str(certificate), "console_key": str(key), "authority": str(authority)})
        return
    print(f"console_certificate = {json.dumps(str(certificate))}\nconsole_key = {json.dumps(str(key))}")
    advice = f"Put these two lines into [server], start the server again, and let browsers trust {authority}."
    print(advice, file=sys.stderr)


def _open_identity(arguments: argparse.Namespace) -> IdentityFolder:
    return IdentityFolder(arguments.state, database=chosen_database(arguments))


def _identity_fields(identity: IdentityFolder) -> dict[str, Any]:
    pin, key = identity.authority.pin.hex(), identity.key.verifying_key
    return {"site": identity.site, "pin": pin, "key": key.hex, "fingerprint": key.fingerprint}


def _print_identity(identity: IdentityFolder) -> None:
    print(f"pin of the authority: {grouped_digits(identity.authority.pin.hex())}")
    print(f"the server's key:     {identity.key.verifying_key.fingerprint}")


def run_claim(arguments: argparse.Namespace) -> None:
    _check_hours(arguments.hours)
    if arguments.count > _MAX_CLAIMS:
        raise UsageError("--count", expected=f"at most {_MAX_CLAIMS}", got=arguments.count)
    names: list[str] = arguments.devices or []
    devices: list[str | None] = [*names] or [None] * arguments.count
    if arguments.count > 1 and names:
        raise UsageError("--count and --device", expected="one of them", got="both", hint="A name is one device's.")
    if len(set(names)) < len(names):
        raise UsageError("--device", expected="every name once", got=", ".join(names))
    with _open_identity(arguments) as identity, _open_claims_file(arguments.out) as file:
        for device in devices:
            print(identity.make_claim(device, math.ceil(3600 * arguments.hours)).text, file=file)
    _print_claims(arguments, ", ".join(names) or "any name that is free", len(devices))


def _print_claims(arguments: argparse.Namespace, names: str, count: int = 1) -> None:
    """Print what a file of claims is for. Without a file nothing is printed: standard output has only the claims."""
    if arguments.out is not None:
        end = datetime.now().astimezone() + timedelta(hours=arguments.hours)
        print(f"{arguments.out}: {quantity(count, 'claim')} for {names}, valid until {end:%Y-%m-%d %H:%M %Z}")


@contextmanager
def _open_claims_file(path: Path | None) -> Iterator[TextIO | None]:
    """Open the new file for claims; None for standard output."""
    if path is None:
        yield None
        return
    if path.exists():
        raise UsageError(
            "--out", expected="a file that isn't there yet", got=str(path), hint="The claims in it may still be unused."
        )
    with (
        storage_errors(f"can't write {path}"),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
    ):
        try:
            yield file
            file.flush()
        except BaseException:
            path.unlink()  # half a file of claims can't be written again: `--out` must be a new file
            raise


def run_devices(arguments: argparse.Namespace) -> None:
    if arguments.action not in DEVICE_ACTIONS:  # `devices NAME` shows one
        if arguments.device is not None:
            actions = ", ".join(DEVICE_ACTIONS)
            raise UsageError("devices: ACTION", expected=f"one of {actions}", got=arguments.action)
        arguments.action, arguments.device = "list", arguments.action
    with _open_identity(arguments) as identity:
        if arguments.action == "list":
            _list(identity, arguments)
        elif arguments.device is None:
            raise UsageError(f"devices {arguments.action}", expected="the name of a device", got="none")
        elif arguments.action == "approve":
            if arguments.key is None:
                raise UsageError(
                    f"devices approve {arguments.device}", expected="--key FINGERPRINT, as the board shows it",
                    got="none",
                    hint="It is in the output of `fedprune-device`, and must be the one in `fedprune-server devices`.",
                )  # fmt: skip
            print(approve(identity, arguments.device, arguments.key))
        elif arguments.action == "replace":
            _check_hours(arguments.hours)
            _replace(identity, arguments)
        else:
            print(revoke(identity, arguments.device))


def _replace(identity: IdentityFolder, arguments: argparse.Namespace) -> None:
    """Revoke a device and make a claim for its name. Standard output gets only the claim, as with `claim`."""
    # The file first: a claim that can't be written must not cost the board its membership.
    with _open_claims_file(arguments.out) as file:
        keys, certificates = identity.revoke(arguments.device)
        print(revocation_message(identity, arguments.device, keys, certificates), file=sys.stderr)
        print(identity.make_claim(arguments.device, math.ceil(3600 * arguments.hours)).text, file=file)
    _print_claims(arguments, arguments.device)


def _list(identity: IdentityFolder, arguments: argparse.Namespace) -> None:
    ends, devices = identity.store.certificate_ends(), identity.store.devices()
    rows: list[dict[str, Any]] = [
        {
            "device": d.device,
            "status": d.status,
            "key": VerifyingKey.from_hex(d.key).fingerprint,
            "asked": d.asked,
            "certificate_ends": ends.get(d.device),
            **({} if arguments.device is None else {"warnings": read_warnings(arguments.state, d.device)}),
        }
        for d in devices
        if arguments.device in (None, d.device)
    ]
    if arguments.device is not None and not rows:
        near = did_you_mean(arguments.device, {d.device for d in devices})
        raise JoinError(f"no device {arguments.device}{near}", hint="See `fedprune-server devices`.")
    if arguments.json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['device']:<24} {row['status']:<9} {row['key']}")
    for warning in rows[0].get("warnings", ()) if rows else ():
        print(f"  warned at {board_time(warning['at'])} of its clock: {warning['text']}")
    if not rows:
        print("no device has asked yet")


def run_broker_config(arguments: argparse.Namespace) -> None:
    folder = arguments.at or arguments.out.resolve()
    broker = options_of(BrokerAddress, arguments, hosts=tuple(arguments.hosts), folder=folder)
    with _open_identity(arguments) as identity:
        identity.update_revocations()  # the broker gets a copy of the list as it is now
        written = [arguments.out / name for name in write_broker(identity, arguments.kind, broker, arguments.out)]
    if arguments.json:
        print_json([str(path) for path in written])
        return
    for path in written:
        print(path)
    print(f"the broker's user must be able to read them, and {BROKER_KEY_FILE} no other user")


def _check_hours(hours_of_claim: float) -> None:
    if hours_of_claim > _MAX_HOURS:
        raise UsageError("--hours", expected=f"at most {_MAX_HOURS}", got=hours_of_claim)
