"""`fedprune-server status`: what a state folder holds, as JSON for programs, or as text for people (`status_text`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.coordination.job_end import early_end_reason
from fedprune.core.cli import print_json
from fedprune.core.disk import has_lock_holder
from fedprune.core.metrics import METRICS
from fedprune.core.text import amount, quantity, round_text, sentences
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, Progress, outcome
from fedprune.model.recipe import judging_metric
from fedprune.planning.width_plan import NOTHING_BINDS
from fedprune.updates.privacy import Privacy
from fedprune_server.devices.plan_vs_actual import compare_device, comparison_text, planned_figures, training_processor
from fedprune_server.devices.quarantine import STRANGERS, read_quarantine_rows
from fedprune_server.executor.accountant import privacy_spending
from fedprune_server.maintenance.identity_check import find_revoked_devices
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.alerts import INFO, server_command
from fedprune_server.monitoring.display import board_texts, metric_texts
from fedprune_server.monitoring.monitor_record import MonitorRecord, read_monitor_record, read_running_monitor
from fedprune_server.monitoring.situation import Situation, suspended_server
from fedprune_server.storage.folder_layout import DATABASE_FILE, job_folders, stored_url
from fedprune_server.storage.folder_lock import LOCK_FILE
from fedprune_server.storage.lease import leader_elsewhere
from fedprune_server.storage.storage import Storage

# The phase of a job that was never started.
NOT_BEGUN = "not begun"

# Rounds that the text shows by default: they fit on a screen with the devices of a small fleet.
DEFAULT_ROUNDS = 10


def run_status(arguments: argparse.Namespace) -> None:
    body = server_status(arguments.state)
    if arguments.json:
        for job in (body, *body.get("jobs", [])):
            job["rounds"] = job["rounds"][-(arguments.rounds or len(job["rounds"])) :]
        print_json(body)
    else:
        print(status_text(body, arguments.rounds or DEFAULT_ROUNDS))


def server_status(state: Path) -> dict[str, Any]:
    """The first job of a state folder as `job_status` has it, with its further jobs under `jobs`, if it has any.

    A device works for one job at a time: `job` names it while a server runs, and a device that is connected and free
    is online, too. Without a connection to the broker `online` is None. `alerts` are the running server's open alerts
    whose cause lasts.
    """
    first = job_status(state)
    recorded = read_running_monitor(state) if first["running"] else read_monitor_record(state)
    first["alerts"] = _open_alerts(state, recorded, running=first["running"])
    folders = [f for f in job_folders(state) if (f / DATABASE_FILE).exists() or stored_url(f)]
    further = [job_status(folder, state) for folder in folders]
    bodies = [first, *further]
    job_of_device = {d["name"]: body["job"].get("name") for body in bodies for d in body["devices"] if d["online"]}
    # Without its broker the server knows no board's state: what it stored last would pass for the present.
    free = recorded.free_boards if first["running"] else ()
    cut_off = any(a["kind"] == "broker" for a in first["alerts"])
    for body in bodies:
        for device in body["devices"]:
            if further:
                device["job"] = job_of_device.get(device["name"])
                device["online"] = (device["job"] is not None or device["name"] in free) and not device["revoked"]
            if cut_off:
                device["online"] = None
    return first | {"jobs": further} if further else first


def job_status(folder: Path, identity: Path | None = None) -> dict[str, Any]:
    """A job as it is stored, as JSON; a server may be running on it.

    It has the job's settings, round and phase, all finished rounds, a row per device and, if the job is private, its
    costs (`fedprune_server.executor.accountant.privacy_spending`). `best` is the round whose global model scored best,
    and `latest` the last round that was evaluated; None without any. `heard_at` is the time of the last event, in
    seconds since 1970; None while a server runs, or where that isn't stored. `identity` is the state folder with the
    server's identity, if it is another folder.

    Raises `StorageError` or `IdentityError` if the folder holds no job, or job or identity are damaged.
    """
    leader = leader_elsewhere(folder)
    # The lock is this machine's; a lease in the database shows a server on another one.
    running = has_lock_holder(folder / LOCK_FILE) or bool(leader)
    with Storage.open_existing(folder) as storage:
        settings, state, rows = storage.settings(), storage.load(), storage.devices()
        outsiders = storage.unplanned_devices()
        last_event, last_messages = storage.log.last_message_times()
    job = (settings or {}).get("job", {})
    judge = judging_metric(job)
    stored_names = {row["name"] for row in rows}
    rows = [row | {"excluded": outsiders[n]["excluded"] if (n := row["name"]) in outsiders else row["excluded"]}
            for row in rows]  # fmt: skip
    defaults = {"online": False, "profile": "?", "samples": 0, "excluded": "unknown"}
    nothing: dict[str, Any] = {"widths": [], "plan": None, "bytes_down": 0, "bytes_up": 0}
    rows += [{**defaults, **b, "name": n, **nothing} for n, b in outsiders.items() if n not in stored_names]
    for row in rows:
        times = last_messages.get(row["name"]), outsiders.get(row["name"], {}).get("seen_at")
        row["seen_at"] = max((at for at in times if at is not None), default=None)
    rounds = [] if state is None else state.history
    latest = next((row for row in reversed(rounds) if judge in row["metrics"]), None)
    return {
        "folder": str(folder),
        "server": str(identity or folder),
        "running": running,
        "leader": leader,
        "heard_at": None if running else last_event,
        "job": job,
        "round": state.round if state is not None else 0,
        "phase": state.phase.value if state is not None else NOT_BEGUN,
        "ended_early": (state is not None and early_end_reason(Job.from_dict(job), state)) or None,
        "paused": state is not None and state.paused,
        "rounds": rounds,
        "best": None if state is None else _score_fields(state.best_round(judge), judge),
        "latest": _score_fields(latest, judge),
        "devices": _device_rows(rows, identity or folder, state, running=running),
        "strangers": read_quarantine_rows(identity or folder).get(STRANGERS),
        **({"privacy": costs} if (costs := privacy_spending(Privacy.from_dict(job["privacy"]), state)) else {}),
    }


def _device_rows(
    rows: Iterable[Mapping[str, Any]], identity: Path, state: State | None, *, running: bool
) -> list[dict[str, Any]]:
    """The stored rows of devices, with what the state and the folder `identity` know of each.

    Each has the outcome of the device's last part in a round. Without a server no device is online.
    """
    revoked, quarantine_rows = find_revoked_devices(identity), read_quarantine_rows(identity)
    devices: Mapping[str, JobDevice] = {} if state is None else state.devices
    return [
        {
            **row,
            "unit": "" if (device := devices.get(row["name"])) is None else training_processor(device),
            "measured": device is not None and device.probe is not None,
            **_last_part_fields(row["name"], state),
            # `compared` shows how good the planner's own prediction was, `corrected` what rounds have taught it since.
            "compared": compare_device(row["name"], state, planned_figures(row["plan"]) if row["plan"] else None),
            "corrected": compare_device(row["name"], state, row["plan"] and row["plan"]["prediction"]),
            "online": row["online"] and running and row["name"] not in revoked,
            "revoked": row["name"] in revoked,
            "quarantine": quarantine_rows.get(row["name"]),
        }
        for row in sorted(rows, key=lambda r: str(r["name"]))
    ]


def _score_fields(row: Mapping[str, Any] | None, judge: str) -> dict[str, Any] | None:
    """A round's number, model and score, as JSON."""
    if row is None:
        return None
    return {"round": row["round"], "model": row["model"], "metric": judge, "score": row["metrics"][judge]}


def _open_alerts(folder: Path, recorded: MonitorRecord, *, running: bool) -> list[dict[str, Any]]:
    """Open alerts of a running server, and that it hangs or was suspended; of one that ended, none."""
    if recorded.turned_at is None or not running:
        return []
    now = time.time()
    since_turn_s = max(0.0, now - recorded.turned_at)
    situation = Situation(folder, since_turn_s=since_turn_s, suspended_process=suspended_server(folder))
    alerts = [*evaluate_alerts(situation, now), *recorded.current_alerts]
    keys = ("kind", "severity", "since", "what", "todo", "job", "device")
    return [{key: getattr(alert, key) for key in keys} for alert in alerts]


def _last_part_fields(name: str, state: State | None) -> dict[str, Any]:
    """The outcome of a device's last part in a round: in the current one, or the last round that asked the device."""
    if state is not None:
        if (task := state.tasks.get(name)) is not None:
            fields = {"progress": task.progress.value, "reason": task.reason, "kind": task.kind}
            return {"round": state.round_of(task), **fields}
        for row in reversed(state.history):
            if (device_part := row["devices"].get(name)) is not None:
                fields = {key: device_part.get(key, "") for key in ("progress", "reason", "kind")}
                return {"round": row["round"], **fields}
    return {"round": None, "progress": None, "reason": "", "kind": ""}


def status_text(body: dict[str, Any], rounds: int = DEFAULT_ROUNDS) -> str:
    job, history = body["job"], body["rounds"]
    title = "no job yet"
    if job:
        is_stopped = not body["running"] and body["phase"] not in (Phase.FINISHED.value, NOT_BEGUN)
        phase = "stopped while " * is_stopped + body["phase"] + ", paused" * bool(body["paused"])
        title = f"job {job['name']}: round {round_text(body['round'], job['rounds'])}, {phase}"
    lines = [title]
    if body["ended_early"]:
        lines.append(f"  {body['ended_early']}")
    if not body["running"]:
        lines.append(_stopped_text(body))
    elif body["leader"]:
        lines.append(f"  a server elsewhere has the job: {body['leader']}; one that stands by here waits for its end")
    alerts = [
        (a["severity"], f"  {a['severity']}: {sentences(a['what'], 'To do: ' + a['todo'])}")
        for a in body.get("alerts", ())
    ]
    lines += [line for severity, line in alerts if severity != INFO]
    if "privacy" in body:
        lines.append(_privacy_text(body["privacy"]))
    for device in body["devices"]:
        lines += _device_lines(device, body.get("privacy", {}).get("epsilon", {}).get(device["name"]))
    if strangers := body.get("strangers"):
        lines.append(
            f"  strangers: {strangers['bad']} messages that are in a member's name and not its own, or make no sense; "
            f"{strangers['dropped']} dropped unread. Check who uses your broker"
        )
    latest_rounds = history[-rounds:]
    if len(latest_rounds) < len(history):
        lines.append(f"  the last {len(latest_rounds)} of {quantity(len(history), 'round')}:")
    for row in latest_rounds:
        counted_devices = sum(d["progress"] == "folded" for d in row["devices"].values())
        metrics = metric_texts(row["metrics"]) or ["not evaluated"]
        devices_asked = quantity(len(row["devices"]), "device")
        figures = [f"{counted_devices} of {devices_asked}", *metrics, *board_texts(row, judging_metric(job))]
        lines.append(f"  round {row['round']}: {', '.join(figures)}")
        lines += [f"    {note}" for note in row.get("notes", ())]
        lines += [
            f"    {name}: {_outcome_word(device_part)}: {device_part['reason']}"
            for name, device_part in sorted(row["devices"].items())
            if device_part["reason"]
        ]
    if body["best"]:
        lines.append(f"  best model: {_score_text(body['best'])}; latest: {_score_text(body['latest'])}")
    lines += [line for severity, line in alerts if severity == INFO]
    return "\n".join([*lines, *(status_text(further, rounds) for further in body.get("jobs", []))])


def _score_text(scored: Mapping[str, Any]) -> str:
    return f"{METRICS[scored['metric']].titled_value(scored['score'])} after round {scored['round']}"


def _outcome_word(device_part: Mapping[str, Any]) -> str:
    """The outcome of a part that has a reason; an update that counted nevertheless counted in part."""
    limited = device_part["progress"] == Progress.FOLDED.value
    return "limited" if limited else outcome(device_part["progress"], device_part.get("kind", ""))


def _privacy_text(body: dict[str, Any]) -> str:
    epsilons = {name: value for name, value in body["epsilon"].items() if value is not None}
    epsilon = "ε unknown without the extra privacy"
    if epsilons:
        most_spent = max(epsilons, key=lambda n: epsilons[n])
        epsilon = f"ε at most {epsilons[most_spent]:.3g} ({most_spent})"
    budget = f", budget {body['epsilon_budget']:g}" if body["epsilon_budget"] else ""
    noise = f"{body['noise']} noise of {body['noise_multiplier']:g} times the clip {body['clip']:g}"
    return f"  private: {epsilon} at δ {body['delta']:g}{budget}; {noise}"


def _stopped_text(body: dict[str, Any]) -> str:
    since = "" if body["heard_at"] is None else f"; the last event was at {_local_time(body['heard_at'])}"
    folder = Path(body["server"])
    if not body["job"]:
        command = server_command(folder, "run", options=("--model", "MODEL"))
        return f"  no server is running{since}; to start a job: {command}"
    is_finished = body["phase"] == Phase.FINISHED.value
    end = "" if is_finished else f"; to go on: {server_command(folder, 'run')}"
    return f"  no server is running{since}{end}"


def _connection_text(device: dict[str, Any]) -> str:
    if device["revoked"]:
        return "revoked"
    if device["online"] is None:
        return "connection not known"
    if device["online"]:
        if "job" in device:
            return f"at work for {device['job']}" if device["job"] else "free"
        return "online"
    return "offline" if device["seen_at"] is None else f"offline, last heard from at {_local_time(device['seen_at'])}"


def _local_time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _device_lines(device: dict[str, Any], epsilon: float | None = None) -> list[str]:
    plan = device["plan"]
    width = f"widths {device['widths']}"
    if plan:
        bound = "no limit binds" if plan["bound"] == NOTHING_BINDS else f"bound by {plan['bound']}"
        asked = (plan.get("asked") or plan)["density"]
        lowered = f" instead of {asked:.3g}" if asked > plan["density"] else ""
        width = f"density {plan['density']:.3g}{lowered}, {bound}"
    if device["unit"] == "GPU":
        width += ", trains on its GPU" if device["measured"] else ", planned for its GPU"
    if plan and plan["prediction"].get("train_j") is not None:
        width += f", {amount(plan['prediction']['train_j'], 'J')} per round"
    lines = [
        f"  device {device['name']} ({device['profile']}): {_connection_text(device)}, "
        f"{quantity(device['samples'], 'sample')}, "
        + (f"excluded: {device['excluded']}" if device["excluded"] else width)
        + f", {amount(device['bytes_down'], 'bytes')} down, {amount(device['bytes_up'], 'bytes')} up"
        + ("" if epsilon is None else f", ε {epsilon:.3g}")
    ]
    times = comparison_text(device["compared"], device["corrected"])
    if times:
        lines.append(f"    {times}")
    if device["quarantine"]:
        lines.append(f"    {_misbehaviour_text(device['quarantine'])}")
    if device["reason"]:
        lines.append(f"    round {device['round']}: {_outcome_word(device)}: {device['reason']}")
    return lines


def _misbehaviour_text(row: dict[str, Any]) -> str:
    """A device's rejected messages, and whether it is in quarantine."""
    kinds = {
        "dropped": "messages dropped unread", "bad": "messages that make no sense", "unasked": "chunks unasked for",
        "refused": "malformed updates",
    }  # fmt: skip
    texts = [f"{row[key]} {what}" for key, what in kinds.items() if row[key]]
    if row["until"] is not None and row["until"] > time.time():
        texts.insert(0, f"in quarantine until {_local_time(row['until'])} (no. {row['times']}): {row['reason']}")
    elif row["times"]:
        texts.insert(0, f"was in quarantine {row['times']} times, lastly: {row['reason']}")
    return "; ".join(texts)
