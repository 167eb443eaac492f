"""`fedprune-server rollout`: give boards a release in stages, look how far it is, pause it, stop it, take it back.

It writes and reads the state folder alone; the server that runs on it does the rest, now or when it is started.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedprune.core.cli import whole_number
from fedprune.core.disk import held
from fedprune.core.errors import ExitCode, UsageError
from fedprune.core.text import quantity, some
from fedprune.output.tables import Column, print_table
from fedprune.releases.release import Release
from fedprune.releases.rollout import CAREFUL, Fate, RolloutPhase
from fedprune.wire.fleet_messages import COMMITTED, DOWNLOADING, MAX_ATTEMPTS, MAX_SECONDS
from fedprune_server.cli.state_option import add_state
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.rollouts import ALL_AT_ONCE, RolloutTerms, start_rollout, take_back
from fedprune_server.ota.store import RolloutEntry, RolloutStore
from fedprune_server.storage.state_folder import has_database

_LOCK = "lock"
_SHOWN = 20
"""Boards that a list on one line names."""


def add_rollout(rollout: argparse.ArgumentParser) -> None:
    actions = rollout.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = actions.add_parser("start", help="begin with a release that `fedprune-server release` made")
    start.add_argument("release", type=Path, metavar="DIR", help="the release's folder")
    start.add_argument(
        "--groups",
        type=_groups,
        metavar="SHARES",
        help="of the boards, one stage each: 1,10%%,100%% is one board, a tenth, all (the default)",
    )
    start.add_argument(
        "--success", type=_share, default=0.9, metavar="SHARE", help="of a stage, before the next (default: 90%%)"
    )
    start.add_argument(
        "--errors", type=_share, default=0.1, metavar="SHARE", help="of a stage that may fail (default: 10%%)"
    )
    start.add_argument(
        "--patience", type=float, default=60.0, metavar="MINUTES", help="that a board may say nothing new (default: 60)"
    )
    start.add_argument("--hours", type=float, default=24.0, metavar="H", help="that a stage may take (default: 24)")
    start.add_argument("--attempts", type=whole_number, default=3, metavar="N", help="starts of a trial (default: 3)")
    start.add_argument(
        "--deadline", type=float, default=600.0, metavar="S", help="seconds of each until it is healthy (default: 600)"
    )
    start.add_argument("--devices", metavar="NAMES", help="these boards alone, with commas (default: all that are in)")
    start.add_argument("--seed", type=int, default=0, help="another one chooses other boards to be early")
    start.set_defaults(function=_start)
    pause = actions.add_parser(
        "pause", help="begin nothing further; boards that were given the release continue with it"
    )
    pause.set_defaults(function=_pause)
    resume = actions.add_parser("resume", help="let a paused rollout go on")
    resume.set_defaults(function=_resume)
    status = actions.add_parser("status", help="say how far the last rollout is, and what failed")
    status.add_argument("--json", action="store_true", help="as JSON, for programs")
    status.set_defaults(function=_status)
    listed = actions.add_parser("list", help="list all rollouts, the latest first")
    listed.add_argument("--json", action="store_true", help="as JSON, for programs")
    listed.set_defaults(function=_list)
    stop = actions.add_parser("stop", help="give the release to no more boards; those that have it keep it")
    stop.set_defaults(function=_stop)
    back = actions.add_parser(
        "back", help="take the boards that have the last release to what they had before, under a new number"
    )
    back.add_argument("--number", type=int, metavar="N", help="of the new release (default: the next that is free)")
    back.add_argument("--groups", type=_groups, metavar="SHARES", help="as for start (default: all at once)")
    back.set_defaults(function=_back)
    for action in (pause, stop, back):
        action.add_argument("--reason", default="by the operator", metavar="TEXT", help="for the record")
    for action in (start, pause, resume, status, listed, stop, back):
        add_state(action)


def _start(arguments: argparse.Namespace) -> int:
    if arguments.attempts > MAX_ATTEMPTS or not 1 <= arguments.deadline <= MAX_SECONDS:
        raise UsageError("a trial", expected=f"up to {MAX_ATTEMPTS} attempts of 1 to {MAX_SECONDS:g} s each")
    begun = start_rollout(arguments.state, arguments.release, _terms(arguments), _named_boards(arguments.devices))
    number, release, rollout = begun.number, begun.release, begun.rollout
    which = "all that are let in" if arguments.devices is None else "those that were named"
    count = quantity(len(rollout.boards), "board")
    print(f"rollout {number}: release {release.number} ({release.version}) to {count}, {which}")
    for at in range(len(rollout.plan.stages)):
        names = sorted(n for n, b in rollout.boards.items() if b.stage == at)
        print(f"  stage {at + 1}: {quantity(len(names), 'board')}{_named(names)}")
    print(f"a board that is off for {arguments.patience:g} minutes in its stage, or has no launcher, counts as failed:")
    print("--devices chooses the boards")
    if not held(arguments.state / _LOCK):
        print("no server is running on this folder: it begins when one is started")
    return int(ExitCode.OK)


def _named_boards(given: str | None) -> list[str] | None:
    return None if given is None else [n.strip() for n in given.split(",") if n.strip()]


def _terms(arguments: argparse.Namespace) -> RolloutTerms:
    return RolloutTerms(
        arguments.groups or (),
        arguments.success,
        arguments.errors,
        60 * arguments.patience,
        3600 * arguments.hours,
        arguments.attempts,
        arguments.deadline,
        arguments.seed,
    )


def _status(arguments: argparse.Namespace) -> int:
    entry = next(reversed(_entries(arguments.state)), None)
    if arguments.json:
        print(json.dumps(None if entry is None else _body(entry), indent=2, sort_keys=True))
    elif entry is None:
        print("nothing was rolled out yet")
    else:
        print(describe(entry))
        if entry.rollout.phase.under_way and not held(arguments.state / _LOCK):
            print("no server is running on this folder: it continues when one is started")
    return int(ExitCode.OK)


def _list(arguments: argparse.Namespace) -> int:
    entries = _entries(arguments.state)[::-1]
    if arguments.json:
        print(json.dumps([_body(e) for e in entries], indent=2, sort_keys=True))
        return int(ExitCode.OK)
    rows = []
    for entry in entries:
        release = Release.from_bytes(entry.offer.manifest.encode())
        fates = Counter(b.fate for b in entry.rollout.boards.values())
        begun = datetime.fromtimestamp(entry.at, timezone.utc).strftime("%Y-%m-%d %H:%M")
        boards = f"{fates[Fate.WELL]} of {len(entry.rollout.boards) - fates[Fate.GONE]}"
        state, failed = entry.rollout.phase.value, str(fates[Fate.FAILED])
        rows.append((str(entry.number), f"{release.number} ({release.version})", state, boards, failed, begun))
    print_table([Column("rollout", right=True), Column("release"), Column("state"), Column("updated", right=True),
                 Column("failed", right=True, drop=1), Column("begun (UTC)", drop=2)], rows)  # fmt: skip
    return int(ExitCode.OK)


def _stop(arguments: argparse.Namespace) -> int:
    _entries(arguments.state)
    with RolloutStore(arguments.state) as store:
        number = store.stop(arguments.reason)
    print(f"rollout {number} is to stop: boards that have the release keep it")
    if not held(arguments.state / _LOCK):
        print("no server is running on this folder: it stops when one is started")
    return int(ExitCode.OK)


def _pause(arguments: argparse.Namespace) -> int:
    _entries(arguments.state)
    with RolloutStore(arguments.state) as store:
        number = store.pause(arguments.reason)
    print(f"rollout {number} is paused: no further board is given the release, those at it end")
    return int(ExitCode.OK)


def _resume(arguments: argparse.Namespace) -> int:
    _entries(arguments.state)
    with RolloutStore(arguments.state) as store:
        number = store.resume()
    print(f"rollout {number} goes on")
    if not held(arguments.state / _LOCK):
        print("no server is running on this folder: it continues when one is started")
    return int(ExitCode.OK)


def _back(arguments: argparse.Namespace) -> int:
    _entries(arguments.state)
    terms = replace(ALL_AT_ONCE, shares=arguments.groups or ALL_AT_ONCE.shares)
    begun = take_back(arguments.state, arguments.reason, number=arguments.number, terms=terms)
    print(begun.told_back())
    if not held(arguments.state / _LOCK):
        print("no server is running on this folder: it begins when one is started")
    return int(ExitCode.OK)


def _entries(state: Path) -> list[RolloutEntry]:
    """All rollouts, the oldest first; nothing is made if there is none."""
    IdentityFolder(state).close()  # without an identity there is nothing to roll out
    if not has_database(state):
        return []
    with RolloutStore(state, read_only=True) as store:
        return store.entries()


def describe(entry: RolloutEntry) -> str:
    """How far a rollout is, as text."""
    rollout, release = entry.rollout, Release.from_bytes(entry.offer.manifest.encode())
    stage = f", stage {rollout.stage + 1} of {len(rollout.plan.stages)}" if rollout.stage >= 0 else ", not begun"
    asked = _asked(entry)
    counts = Counter(b.fate for b in rollout.boards.values())
    words = {Fate.WELL: "updated", Fate.GIVEN: "updating", Fate.FAILED: "failed", Fate.WAITING: "pending"}
    gone = sorted(n for n, b in rollout.boards.items() if b.fate is Fate.GONE)
    count = len(rollout.boards) - len(gone)
    lines = [
        f"rollout {entry.number} of release {release.number} ({release.version}): {rollout.phase.value}{stage}{asked}",
        "  " + ", ".join(f"{counts[fate]} {what}" for fate, what in words.items()) + f", of {count}",
    ]
    if entry.leaves is not None:
        lines.append(f"  it takes boards back from release {entry.leaves}")
    if rollout.why:
        lines.append(f"  {rollout.why}")
    if gone:
        lines.append(f"  {len(gone)} left the fleet before, and don't count{_named(gone)}")
    for name, board in sorted(rollout.boards.items()):
        if board.fate is Fate.GIVEN:
            lines.append(f"  {name}: {_doing(entry.reports.get(name))}")
        elif board.fate is Fate.FAILED:
            lines.append(f"  {name}: failed: {board.reason}")
    return "\n".join(lines)


def _asked(entry: RolloutEntry) -> str:
    """An order that the server hasn't carried out yet."""
    phase = entry.rollout.phase
    if not phase.under_way:
        return ""
    if entry.wish is not None:
        return ", to be stopped"
    if entry.hold is not None and phase is RolloutPhase.RUNNING:
        return ", to be paused"
    return ", to go on" if entry.hold is None and phase is RolloutPhase.PAUSED else ""


def _doing(report: dict[str, Any] | None) -> str:
    if report is None:
        return "nothing heard yet"
    if report.get("state") == DOWNLOADING and report.get("total"):
        return f"{DOWNLOADING}, {int(100 * report['done'] / report['total'])}% when it last said so"
    return str(report.get("state"))


def _body(entry: RolloutEntry) -> dict[str, Any]:
    release = Release.from_bytes(entry.offer.manifest.encode())
    return {
        "number": entry.number,
        "at": entry.at,
        "release": release.number,
        "version": release.version,
        "stopping": entry.wish,
        "pausing": entry.hold,
        "leaves": entry.leaves,
        "committed": sorted(n for n, r in entry.reports.items() if r.get("state") == COMMITTED),
        "reports": entry.reports,
        **{k: v for k, v in entry.rollout.to_dict().items() if k != "format"},
    }


def _named(names: list[str]) -> str:
    return f": {some(names, most=_SHOWN)}" if names else ""


def _groups(text: str) -> list[float]:
    """Shares of the boards; a plain 1 is one board, whatever its share."""
    return [CAREFUL[0].share if part.strip() == "1" else _share(part) for part in text.split(",")]


def _share(text: str) -> float:
    found = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,6})?)%\s*", text)
    if found is None or float(found[1]) > 100:
        raise argparse.ArgumentTypeError(f"expected a share such as 10%, got {text!r}")
    return float(found[1]) / 100
