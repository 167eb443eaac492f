"""The output of `fedprune-server status` for people: a line per job, device and round, made of `server_status`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprune.coordination import Phase
from fedprune.core.metrics import METRICS
from fedprune.core.text import amount, quantity, round_text, sentences
from fedprune.jobs.state import Progress, outcome
from fedprune.model.recipe import judging_metric
from fedprune.planning.width_plan import NOTHING_BINDS
from fedprune_server.devices.plan_vs_actual import comparison_text
from fedprune_server.monitoring.alerts import INFO, server_command
from fedprune_server.monitoring.display import board_texts, metric_texts

# The phase of a job that was never started.
NOT_BEGUN = "not begun"

# Rounds that the text shows by default: they fit on a screen with the devices of a small fleet.
DEFAULT_ROUNDS = 10


def status_text(body: dict[str, Any], rounds: int = DEFAULT_ROUNDS) -> str:
    job, history = body["job"], body["rounds"]
    title = "no job yet"
    if job:
        title = f"job {job['name']}: round {round_text(body['round'], job['rounds'])}, {_phase_text(body)}"
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


def _phase_text(body: dict[str, Any]) -> str:
    paused = ", paused" if body["paused"] else ""
    if body["running"] or body["phase"] in (Phase.FINISHED.value, NOT_BEGUN):
        return f"{body['phase']}{paused}"
    return f"stopped while {body['phase']}{paused}"


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
