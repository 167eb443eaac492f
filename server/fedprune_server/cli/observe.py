"""`fedprune-server crashes` and `doctor`: how boards' programs ended, and what is wrong with a fleet."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.cli import print_json
from fedprune.core.errors import ExitCode, FedpruneError, JoinError, did_you_mean
from fedprune.core.text import amount, sentences
from fedprune.output.tables import print_verdicts
from fedprune_server.devices.crash_store import BoardCrash, frames_of, read_crashes
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.maintenance.doctor import diagnose
from fedprune_server.maintenance.finding import Severity
from fedprune_server.monitoring.alerts import BOARD_LOG_COMMAND
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.storage import Storage

_BOARD_LOG_HINT = f"Its own log is on the board: {BOARD_LOG_COMMAND}"


def run_crashes(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.state
    Storage.check_existing(folder)
    crashes = read_crashes(folder, arguments.device, limit=arguments.last)
    _print_crashes(crashes, as_json=arguments.json)
    remarks = [] if crashes else ["no board has reported a crash"]
    if not crashes and arguments.device is not None:
        remarks = [_no_crash_text(_read_exclusions(folder), arguments.device)]
    elif not arguments.json:
        with suppress(FedpruneError):  # crashes are shown also where the job can't be read
            exclusions = _read_exclusions(folder)
            # A board that can't start reports no crash: its stored crashes are older.
            names = sorted(n for n in exclusions.cannot_start if arguments.device in (None, n))
            remarks += [sentences(f"{n}: {exclusions.reasons[n]}", _BOARD_LOG_HINT) for n in names]
    for remark in () if arguments.json else remarks:
        print(remark, flush=True)


@dataclass(frozen=True)
class _Exclusions:
    """The reasons why boards take no part.

    Attributes:
        reasons: By name of every board that the server knows; empty where it takes part.
        cannot_start: Boards whose program ends before it has begun.
    """

    reasons: Mapping[str, str]
    cannot_start: Collection[str]


def _read_exclusions(folder: Path) -> _Exclusions:
    with open_database(folder, read_only=True) as database:
        reasons = dict.fromkeys((device.device for device in IdentityStore(database).devices()), "")
    if Storage.read_settings(folder) is None:
        return _Exclusions(reasons, ())
    with Storage.open_existing(folder) as storage:
        outsiders = storage.unplanned_devices()
        bodies = [*storage.devices(), *({"name": n, **body} for n, body in outsiders.items())]
    reasons |= {str(body["name"]): str(body["excluded"] or "") for body in bodies}
    return _Exclusions(reasons, [n for n, body in outsiders.items() if body.get("cannot_start")])


def _no_crash_text(exclusions: _Exclusions, name: str) -> str:
    """A sentence on why no crash of a board is stored, and where to look instead. Raises `JoinError` if the server
    doesn't know the board."""
    if name not in exclusions.reasons:
        raise JoinError(
            f"no board is called {name}{did_you_mean(name, exclusions.reasons)}",
            hint="`fedprune-server status` and `fedprune-server devices` list boards.",
        )
    reason = exclusions.reasons[name]
    return sentences(f"{name} has reported no crash", f"It takes no part: {reason}" if reason else "", _BOARD_LOG_HINT)


def _print_crashes(crashes: Sequence[BoardCrash], *, as_json: bool) -> None:
    for crash in crashes:
        if as_json:
            print(json.dumps(crash.to_dict(), sort_keys=True), flush=True)
            continue
        body = crash.body
        uptime = "" if body["uptime_s"] is None else f" after {body['uptime_s']:.0f} s"
        temperature = "" if body["temperature_c"] is None else f", {body['temperature_c']:.0f} °C"
        free_bytes = body["memory_available"]
        memory = "" if free_bytes is None else f", {amount(free_bytes, 'bytes')} of memory free"
        slot = f", slot {body['slot']}" if body["slot"] else ""
        print(f"{crash} ({body['cause']} in {body['release']}{slot}{uptime}{temperature}{memory})", flush=True)
        for frame in frames_of(crash):
            print(f"    {frame}", flush=True)


def run_doctor(arguments: argparse.Namespace) -> int:
    logging.getLogger("fedprune").addHandler(logging.NullHandler())  # findings report what would be logged
    findings = diagnose(arguments.state, arguments.timeout)
    if arguments.json:
        print_json({"state": str(arguments.state), "findings": [f.to_dict() for f in findings]})
    else:
        for finding in findings:
            print_verdicts(str(finding))
        if not findings:
            print(f"{arguments.state}: nothing is wrong that could be seen from here")
    return int(ExitCode.FINDINGS if any(f.severity is not Severity.NOTE for f in findings) else ExitCode.OK)
