"""The numbers of a fleet behind two aggregators as a page."""

from __future__ import annotations

from typing import Any

from benchmarks.swarm.page import number

Row = dict[str, Any]

_SERVERS = {"server": "root", "north": "north", "south": "south"}

_SHAPE = """\
The root is `fedprune-server run --aggregators`, the regions are two `fedprune-server aggregate --uploads s3`, each with
a prefix of its own in one bucket. All of them have the fleet's identity, and each has its own Mosquitto, to which it
connects with TLS and a certificate. Every board is a member with a key of its own, which the root sends to the
aggregators. Boards come in turns: all boards of a turn connect, half of them at each region, announce themselves, and
leave before the next turn. In some turns a round begins as soon as the last board is there, and asks a quarter of them.
Those fetch the weights over MQTT and check each leaf, wait as long as the planner expects training to take, sign what
they send, put an update of 103 kB into the bucket by a presigned PUT, and leave once it is accepted.

Differences from real boards: they use a listener of the same Mosquitto without TLS, on this machine alone, and
don't verify the server's signatures, since they share the processors with what is measured. Graphs are fetched by one
board of a process only."""

_EXACT = """\
*Counted*: updates in the global model, by the root's own summary. *One server*: the digest of the model compared with
that of coordinator and worker in one process, without aggregators, given the same boards' updates; *marks* and *off* as
in [swarm](swarm.md)."""

_CPU = """\
CPU seconds of each server with the processes below it, from the beginning of a phase until all servers are idle.
*Connecting* is all of a turn's boards except one; the *round* ends with the next model, evaluated, and includes the
asked boards' leaving; *leaving* the rest. Mosquitto, the bucket and the boards are not in it."""

_ASKED = """\
Seconds from a board's message to its region's answer while updates come in, as in [swarm](swarm.md); 10 questions a
second of *call off* at each region, and as many as there are answers of *say again*."""


def page(row: Row, about: Row, command: str) -> str:
    """Markdown of the result of `benchmarks.regions.run.measure`."""
    heading = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores for all processes together (load {about['load']:g} "
        f"at the end, other programs included), {about['broker']}, {_bucket(row)}, Python {about['python']}, "
        f"numpy {about['numpy']}, SQLAlchemy {about['SQLAlchemy']}, boto3 {about['boto3']}. `{command}`."
    )
    if "note" in about:
        heading += f" {about['note']}"
    parts = ["# Regions", heading, _SHAPE, "## Sums", *_summary(row)]
    parts += ["## Rounds", _EXACT, _rounds(row), "## CPU of the servers", _CPU, _cpu(row)]
    parts += ["## Control messages", _ASKED, _latencies(row), "## Processes", _processes(row), *_faults(row)]
    return "\n\n".join(parts) + "\n"


def _bucket(row: Row) -> str:
    return "Ceph's S3 gateway" if row["bucket"] == "Ceph" else "moto (a mock of S3)"


def _updates(row: Row) -> int:
    return sum(each.get("accepted", 0) for each in row["rounds"])


def _ms(row: Row, *phases: str) -> dict[str, float]:
    """CPU per update in milliseconds, by server."""
    used = dict.fromkeys(_SERVERS, 0.0)
    for phase in row["phases"]:
        if phase["phase"] in phases:
            used = {name: used[name] + phase["cpu_s"][name] for name in used}
    return {name: 1e3 * seconds / max(1, _updates(row)) for name, seconds in used.items()}


def _summary(row: Row) -> list[str]:
    ours, others = _ms(row, "round"), _ms(row, "connect", "no round", "leave")
    both, each = sum(ours.values()), row["devices"] / max(1, _updates(row))
    quantiles = [found["p95"] for each in row["rounds"] for found in each["latency"].values() if "p95" in found]
    updates, turns = _updates(row), len({p["turn"] for p in row["phases"]})
    put = row["uploads"]
    same = "yes" if row["models"] == row["one_server"] else "**no**"
    lines = [
        ("identities registered", "100,000", f"{row['devices']:,}, known to root and both aggregators"),
        ("connected at a time", "20,000", f"{row['connected']:,}, in {turns} turns"),
        ("updates counted once", "15,000", f"{updates:,} of {row['asked'] * len(row['rounds']):,}"),
        ("models bit-identical to one server's", "yes", same),
        ("servers' CPU per update, in rounds", "6 ms", f"{both:.1f} ms, of which root {ours['server']:.1f}"),
        ("more, for connecting and leaving", "", f"{sum(others.values()):.1f} ms, with {each:.1f} boards per update"),
        ("root's memory, largest", "300 MB", f"{row['watched']['server']['peak'] / 1e6:.0f} MB"),
        ("control messages, largest p95", "0.25 s", f"{number(max(quantiles, default=None), 2)} s"),
        ("PUT into the bucket", "", f"{put['bytes'] / 1e6:,.0f} MB, repetitions included; {put['failed']} PUTs failed"),
        ("whole run", "", f"{row['wall_s'] / 60:.0f} min"),
    ]  # fmt: skip
    table = "\n".join(f"| {what} | {meant} | {value} |" for what, meant, value in lines)
    return [f"| | target at 100,000 | found |\n|---|---:|---|\n{table}"]


def _rounds(row: Row) -> str:
    found = {r["round"]: r for r in row["audit"]["rounds"]}
    lines = ["| round | turn | counted | one server | marks | off | offers s | updates s | close s | updates/s |"]
    lines.append("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|")
    for each, turn, ours, theirs in zip(row["rounds"], row["active"], row["models"], row["one_server"], strict=True):
        checked, same = found[each["round"]], "the same digest" if ours == theirs else "another"
        rate = each["accepted"] / each["updates_s"] if each.get("updates_s") else None
        lines.append(
            f"| {each['round']} | {turn} | {checked['counted']:,} | {same} "
            f"| {checked['least_times']:.4f}–{checked['most_times']:.4f} | {number(checked['ulps'], 2)} "
            f"| {number(each['offers_s'], 1)} | {number(each['updates_s'], 1)} | {number(each.get('close_s'), 2)} "
            f"| {number(rate, 0)} |"
        )
    return "\n".join(lines)


def _cpu(row: Row) -> str:
    lines = ["| turn | phase | wall s | root s | north s | south s |", "|---:|---|---:|---:|---:|---:|"]
    for phase in row["phases"]:
        used = " | ".join(f"{phase['cpu_s'][name]:.1f}" for name in _SERVERS)
        lines.append(f"| {phase['turn']} | {phase['phase']} | {phase['wall_s']:.0f} | {used} |")
    return "\n".join(lines)


def _latencies(row: Row) -> str:
    lines = [
        "| round | question | asked | p50 | p95 | p99 | largest | open |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in row["rounds"]:
        for kind, found in each["latency"].items():
            seconds = " | ".join(number(found.get(key), 3) for key in ("p50", "p95", "p99", "max"))
            unanswered = each["unanswered"] if kind == "call off" else "–"
            lines.append(f"| {each['round']} | {kind} | {found['count']} | {seconds} | {unanswered} |")
    return "\n".join(lines)


def _processes(row: Row) -> str:
    lines = ["| process | peak MB | CPU s |", "|---|---:|---:|"]
    for name, used in row["watched"].items():
        lines.append(f"| {_SERVERS.get(name, name)} | {used['peak'] / 1e6:.0f} | {used['cpu_s']:.1f} |")
    wire = (
        f"{sum(row['traffic'].values()) / 1e6:,.0f} MB between boards and brokers, "
        f"{row['uploads']['bytes'] / 1e6:,.0f} MB by PUT, {row['lost_connections']} broken connections."
    )
    return "\n".join(lines) + "\n\n" + wire


def _faults(row: Row) -> list[str]:
    found = row["audit"]["faults"]
    return ["## Faults", "\n".join(f"- {fault}." for fault in found)] if found else []
