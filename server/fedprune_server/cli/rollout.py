"""`fedprune-server rollout`: give a release to boards in stages; show, pause, resume, stop or roll back a rollout.

It only reads and writes the state folder; the server that runs on it does the rest, at once or when it is started.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from fedprune.core.cli import options_of, print_json
from fedprune.core.disk import has_lock_holder
from fedprune.core.errors import UsageError
from fedprune.core.text import first_few, quantity
from fedprune.output.tables import Column, print_table
from fedprune.releases.rollout import Fate
from fedprune.wire.fleet_messages import COMMITTED, DOWNLOADING, MAX_TRIAL_ATTEMPTS, MAX_TRIAL_S
from fedprune_server.cli.state_option import chosen_database
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.ota.rollouts import ALL_AT_ONCE, RolloutTerms, request_action, start_rollout, take_back
from fedprune_server.ota.store import RolloutEntry, RolloutStore
from fedprune_server.storage.folder_layout import database_url, has_database
from fedprune_server.storage.folder_lock import LOCK_FILE

# Requests that the server hasn't carried out yet, by the entry's state: it may be stopped, or look a second later.
_REQUEST_WORDS = {"stopping": ", to be stopped", "pausing": ", to be paused", "resuming": ", to go on"}

# Names of boards on one line; of more, their number is printed.
_MAX_NAMES_SHOWN = 20


def run_start(arguments: argparse.Namespace) -> None:
    if arguments.attempts > MAX_TRIAL_ATTEMPTS or not 1 <= arguments.deadline <= MAX_TRIAL_S:
        raise UsageError("a trial", expected=f"up to {MAX_TRIAL_ATTEMPTS} attempts of 1 to {MAX_TRIAL_S:g} s each")
    seconds = {"board_seconds": 60 * arguments.patience, "stage_seconds": 3600 * arguments.hours}
    shares, deadline_s = arguments.groups or (), arguments.deadline
    terms = options_of(RolloutTerms, arguments, shares=shares, deadline_s=deadline_s, **seconds)
    database = chosen_database(arguments)
    started = start_rollout(arguments.state, arguments.release, terms, arguments.devices, database=database)
    release, rollout = started.release, started.rollout
    chosen = "all members" if arguments.devices is None else "those that were named"
    count = quantity(len(rollout.boards), "board")
    lines = [f"rollout {started.number}: release {release.number} ({release.version}) to {count}, {chosen}"]
    boards = sorted(rollout.boards.items())
    names_by_stage = {s: [n for n, b in boards if b.stage == s] for s in range(len(rollout.plan.stages))}
    lines += [f"  stage {s + 1}: {quantity(len(n), 'board')}{_name_list(n)}" for s, n in names_by_stage.items() if n]
    silence = f"a board that sends nothing for {arguments.patience:g} minutes in its stage"
    lines += [f"{silence}, or has no launcher, counts as", "failed; --devices chooses the boards"]
    _print_outcome(arguments, "\n".join(lines), "begins")


def _print_outcome(arguments: argparse.Namespace, text: str, action: str) -> None:
    """Print the outcome of a command as JSON or text, and that nothing happens before a server runs."""
    if arguments.json:
        _print_latest(arguments)
    else:
        print(text)
        _note_without_server(arguments, action)


def _note_without_server(arguments: argparse.Namespace, action: str) -> None:
    state = arguments.state
    # Another database may be that of a server on another machine, whose lock can't be seen from here.
    is_own_database = database_url(state, chosen_database(arguments)) == database_url(state)
    if is_own_database and not has_lock_holder(state / LOCK_FILE):
        print(f"no server is running on this folder: it {action} when one is started")


def run_status(arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_latest(arguments)
        return
    entries = _entries(arguments)
    print(rollout_text(entries[-1]) if entries else "no release has been rolled out yet")
    if entries and entries[-1].rollout.phase.is_under_way:
        _note_without_server(arguments, "continues")


def _print_latest(arguments: argparse.Namespace) -> None:
    """The latest rollout as JSON; null without one."""
    entries = _entries(arguments)
    print_json(_entry_fields(entries[-1]) if entries else None)


def run_list(arguments: argparse.Namespace) -> None:
    entries = _entries(arguments)[::-1]
    if arguments.json:
        print_json([_entry_fields(e) for e in entries])
        return
    rows = []
    for entry in entries:
        release = entry.release
        fates = Counter(b.fate for b in entry.rollout.boards.values())
        begun = datetime.fromtimestamp(entry.started_at, timezone.utc).strftime("%Y-%m-%d %H:%M")
        boards = f"{fates[Fate.WELL]} of {len(entry.rollout.boards) - fates[Fate.GONE]}"
        state, failed = entry.rollout.phase.value, str(fates[Fate.FAILED])
        rows.append((str(entry.number), f"{release.number} ({release.version})", state, boards, failed, begun))
    columns = [Column("rollout", is_right_aligned=True), Column("release"), Column("state"),
               Column("updated", is_right_aligned=True), Column("failed", is_right_aligned=True, drop_order=1),
               Column("begun (UTC)", drop_order=2)]  # fmt: skip
    print_table(columns, rows)


def run_request(arguments: argparse.Namespace) -> None:
    _entries(arguments)
    with RolloutStore(arguments.state, chosen_database(arguments)) as store:
        message = request_action(store, arguments.action, arguments.reason)
    _print_outcome(arguments, message, {"pause": "pauses", "resume": "continues", "stop": "stops"}[arguments.action])


def run_back(arguments: argparse.Namespace) -> None:
    _entries(arguments)
    terms = replace(ALL_AT_ONCE, shares=arguments.groups or ALL_AT_ONCE.shares)
    started = take_back(
        arguments.state, arguments.reason, number=arguments.number, terms=terms, database=chosen_database(arguments)
    )
    _print_outcome(arguments, started.way_back_text(), "begins")


def _entries(arguments: argparse.Namespace) -> list[RolloutEntry]:
    """All rollouts, the oldest first. Makes no database where there is none: a look must not change a folder."""
    state, database = arguments.state, chosen_database(arguments)
    IdentityFolder(state).close()  # without an identity there is nothing to roll out
    if database is None and not has_database(state):
        return []
    with RolloutStore(state, database, read_only=True) as store:
        return store.entries()


def rollout_text(entry: RolloutEntry) -> str:
    rollout, release = entry.rollout, entry.release
    stage = f", stage {rollout.stage + 1} of {rollout.stage_count}" if rollout.stage >= 0 else ", not begun"
    counts = Counter(b.fate for b in rollout.boards.values())
    words = {Fate.WELL: "updated", Fate.GIVEN: "updating", Fate.FAILED: "failed", Fate.WAITING: "pending"}
    gone = sorted(n for n, b in rollout.boards.items() if b.fate is Fate.GONE)
    count = len(rollout.boards) - len(gone)
    phase = f"{rollout.phase.value}{stage}{_REQUEST_WORDS.get(entry.state, '')}"
    lines = [
        f"rollout {entry.number} of release {release.number} ({release.version}): {phase}",
        "  " + ", ".join(f"{counts[fate]} {word}" for fate, word in words.items()) + f", of {count}",
    ]
    if entry.left_release is not None:
        lines.append(f"  it rolls boards back from release {entry.left_release}")
    if rollout.why:
        lines.append(f"  {rollout.why}")
    if gone:
        lines.append(f"  {len(gone)} left the fleet, and don't count{_name_list(gone)}")
    for name, board in sorted(rollout.boards.items()):
        if board.fate is Fate.GIVEN:
            lines.append(f"  {name}: {_progress_text(entry.reports.get(name))}")
        elif board.fate is Fate.FAILED:
            lines.append(f"  {name}: failed: {board.reason}")
    return "\n".join(lines)


def _progress_text(report: dict[str, Any] | None) -> str:
    if report is None:
        return "nothing heard yet"
    if report.get("state") == DOWNLOADING and report.get("total"):
        return f"{DOWNLOADING}, {int(100 * report['done'] / report['total'])}% when it last said so"
    return str(report.get("state"))


def _entry_fields(entry: RolloutEntry) -> dict[str, Any]:
    release, body = entry.release, entry.rollout.to_dict()
    one_board = 1 / max(1, len(entry.rollout.boards))
    # In the plan a share of nearly nothing stands for the first stage's one board.
    stages = [{**stage, "share": max(stage["share"], one_board)} for stage in body["plan"]["stages"]]
    return {
        "number": entry.number,
        "at": entry.started_at,
        "release": release.number,
        "version": release.version,
        "stopping": entry.stop_reason,
        "pausing": entry.pause_reason,
        "leaves": entry.left_release,
        "committed": sorted(n for n, r in entry.reports.items() if r.get("state") == COMMITTED),
        "reports": entry.reports,
        **{k: v for k, v in body.items() if k != "format"},
        "plan": {**body["plan"], "stages": stages},
    }


def _name_list(names: list[str]) -> str:
    return f": {first_few(names, max_names=_MAX_NAMES_SHOWN)}" if names else ""
