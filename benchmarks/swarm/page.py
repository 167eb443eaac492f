"""The swarm's numbers as a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

_SHAPE = """\
Every device has a connection of its own to Mosquitto, speaks the protocol with the messages that boards speak, fetches
the weights that it is offered and checks each leaf, waits as long as the planner expects training to take on its kind
of board (seven kinds in the shares of a mixed fleet), and hands in a whole update of 103 kB. Graphs are fetched by one
device of a process only: the others are as boards that have them from the round before. The server is
`fedprune-server run` as anybody starts it, with its database and its disk.

What is meant to hold at 10,000 devices on two cores: none lost and none counted twice, the server below 500 MB, and
the 95th percentile of control messages below 250 ms while the round continues."""

_COUNTED = """\
*Counted*: devices whose update is in the global model, by the server's own summary. *Marks*: every update adds 1 to a
coordinate of its own, so the model itself says how often each counts; least and most of all devices. *Off*: largest
distance of the model from the mean that numpy makes anew of all updates in float64, in units in the last place of
float32. A round's *updates* last from the first offer to the last `accepted`, *close* is from there to the next model,
*evaluate* to the round's end."""

_ASKED = """\
Seconds from a device's message to its answer while updates come in, ten questions a second of each kind, from a
process that does nothing else. *Call off*: an update of another job, which is called off without a look at the job.
*Say again*: an update that was accepted already, which takes the way of every event; one is asked when the last is
answered. *Open*: questions that had no answer at the end."""

_USED = """\
*Peak* is a process's largest memory, *with children* what it and the processes below it held, shared pages in parts;
CPU seconds of the whole run, and the server's per update without its start."""

_ROUND = (
    "| devices | round | counted | marks | off | arrive s | offers s | updates s | close s | evaluate s | round s "
    "| updates/s |"
)
_LASTED = {"offers": 1, "updates": 1, "close": 2, "evaluate": 2, "round": 1}
"""Digits of the seconds that a round's parts lasted."""

_LATENCY = "| devices | round | question | asked | p50 | p95 | p99 | largest | open |"
_PROCESS = (
    "| devices | server peak MB | with children MB | server CPU s | ms per update | broker MB | broker CPU s "
    "| swarm MB | swarm CPU s | MB on the wire | broken connections | wall s |"
)


def page(rows: list[Row], about: Row, settings: Row) -> str:
    """Markdown.

    Args:
        rows: What `benchmarks.swarm.run.measure` gave, by size.
        about: Machine, versions and date.
        settings: Of all sizes.
    """
    sizes = " ".join(map(str, settings["devices"]))
    heading = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores for broker, server and swarm together, "
        f"{about['broker']}, Python {about['python']}, numpy {about['numpy']}, SQLAlchemy {about['SQLAlchemy']}. "
        f"`python -m benchmarks.swarm --devices {sizes}`; training times × {settings['scale']:g}, "
        f"{settings['arrivals']:g} devices arrive in a second, `pulls = {settings['pulls']}`."
    )
    parts = ["# Swarm", heading, _SHAPE, "![Growth with the fleet](swarm.png)"]
    parts += ["## Rounds", _COUNTED, _table(rows, _ROUND, _of_rounds)]
    parts += ["## Control messages", _ASKED, _table(rows, _LATENCY, _of_latencies)]
    parts += ["## Processes", _USED, _table(rows, _PROCESS, _of_processes), *_faults(rows)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Row], heading: str, lines: Callable[[Row], list[str]]) -> str:
    columns = heading.count("|") - 1
    return "\n".join([heading, "|" + "---:|" * columns, *(line for row in rows for line in lines(row))])


def _of_rounds(row: Row) -> list[str]:
    found = {r["round"]: r for r in row["audit"]["rounds"]}
    lines = []
    for each in row["rounds"]:
        checked = found.get(each["round"], {})
        marks = f"{checked['least_times']:.4f}–{checked['most_times']:.4f}" if "least_times" in checked else "–"
        rate = each["accepted"] / each["updates_s"] if each.get("updates_s") else None
        lasted = " | ".join(_number(each.get(f"{name}_s"), digits) for name, digits in _LASTED.items())
        lines.append(
            f"| {row['devices']:,} | {each['round']} | {checked.get('counted', 0):,} | {marks} "
            f"| {_number(checked.get('ulps'), 2)} | {_number(row['connect_s'], 1)} | {lasted} | {_number(rate, 0)} |"
        )
    return lines


def _of_latencies(row: Row) -> list[str]:
    return [
        f"| {row['devices']:,} | {each['round']} | {kind} | {found['count']} | {_number(found.get('p50'), 3)} "
        f"| {_number(found.get('p95'), 3)} | {_number(found.get('p99'), 3)} | {_number(found.get('max'), 3)} "
        f"| {each['unanswered'] if kind == 'call off' else '–'} |"
        for each in row["rounds"]
        for kind, found in each.get("latency", {}).items()
    ]


def _of_processes(row: Row) -> list[str]:
    server, broker = row["watched"]["server"], row["watched"]["broker"]
    swarm = [row["watched"][name] for name in ("fleet", "probes")]
    updates = sum(each.get("accepted", 0) for each in row["rounds"])
    each_ms = 1e3 * (server["cpu_s"] - row["server_start_cpu_s"]) / updates if updates else None
    line = (
        f"| {row['devices']:,} | {server['peak'] / 1e6:.0f} | {server['shared_peak'] / 1e6:.0f} "
        f"| {server['cpu_s']:.1f} | {_number(each_ms, 1)} | {broker['peak'] / 1e6:.0f} | {broker['cpu_s']:.1f} "
        f"| {sum(s['peak'] for s in swarm) / 1e6:.0f} | {sum(s['cpu_s'] for s in swarm):.1f} "
        f"| {sum(row['traffic'].values()) / 1e6:,.0f} | {row['lost_connections']} | {row['wall_s']:.0f} |"
    )
    return [line]


def _faults(rows: list[Row]) -> list[str]:
    lines = [f"- {row['devices']:,} devices: {fault}." for row in rows for fault in row["audit"]["faults"]]
    return ["## Not as it should be", "\n".join(lines)] if lines else []


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
