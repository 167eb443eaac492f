"""The comparison as a page."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

_SAME = """\
Both train the same net (two convolutions, two linear layers, {weights} bytes of weights) on the same shards of the
embedded digits with the same recipe: SGD with momentum 0.9, learning rate 0.05, {epochs} epochs in batches of 32, the
mean weighted by samples. On both sides the very same code trains: fedprune's `Trainer` on one training graph in
onnxruntime, on one thread; Flower's ClientApp calls it. What differs is the systems. Neither encrypts nor signs. The
server evaluates after every round, the clients don't, but that fedprune's measure themselves in the last.

*Flower* is a SuperLink, one `flower-supernode` per client and a ServerApp with Flower's `FedAvg`, in the isolation that
is its default, `subprocess`: each SuperNode has a SuperExec, which starts a process for every message. Its state is
in memory, as by default. It is used as it comes: a SuperNode that had nothing to do asks again after 3 s, so does the
ServerApp for replies, a SuperExec every second. *fedprune* is `fedprune-server run` with SQLite, Mosquitto, and one
`fedprune-device run` per client, which stays; it trains at the lowest priority (nice 19), Flower's at the usual one."""

_READ = """\
*Rounds* are seconds from when all clients were connected to the end of the last; *round* is the median of one.
*Bytes* are those of the TCP connections between clients and Mosquitto or SuperLink, counted by a proxy, both ways and
from the first connection to the end, per round and client: graphs or apps that are fetched once are in there.
*Server* is the largest memory (PSS) of all processes that aren't clients, added up: `fedprune-server`, its worker and
Mosquitto; SuperLink, its SuperExec and the ServerApp. *Client* is that of the first client with all its *processes*."""

_KILLED = """\
Four clients, four rounds, {epochs} epochs, so that a round has a middle; updates are waited for {deadline:.0f} s. In
round {at}, while the first client trains, a process is killed (SIGKILL) with all that it has started. Seconds count
from there. *Apart* is the largest difference of a weight of the last model from that of the same job by fedprune
without a kill."""

_HEADING = (
    "| clients | | rounds run | rounds s | round s | bytes down | bytes up | server MB | server CPU s | client MB "
    "| processes | accuracy |"
)


def page(found: Row) -> str:
    """Markdown of what was found, as the JSON beside it has it."""
    about, rows, kills = found["setting"], found["rows"], found["kills"]
    heading = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores for everything, Python {about['python']}, numpy "
        f"{about['numpy']}, onnxruntime {about['onnxruntime']}, paho-mqtt {about['paho-mqtt']}, Mosquitto "
        f"{about['mosquitto']}, flwr {about['flwr']}. `python -m benchmarks.flower`"
    )
    weights = f"{rows[0]['weight_bytes']:,}" if rows else "–"
    same = _SAME.format(weights=weights, epochs=found["epochs"])
    parts = ["# Side by side with Flower", heading, same, "## Undisturbed", _READ]
    parts.append("\n".join([_HEADING, "|---:|---|" + "---:|" * 10, *map(_of_size, rows)]))
    parts += [_beside(rows), *found.get("notes", [])]
    told = {"epochs": found["kill_epochs"], "deadline": found["deadline_s"], "at": found["kill_round"]}
    parts += ["## Kills", _KILLED.format(**told), *found.get("kill_notes", [])]
    kinds = list(dict.fromkeys(k["kind"] for k in kills))
    for kind in kinds:
        both = [k for k in kills if k["kind"] == kind]
        parts.append(f"### Killed: {both[0]['killed']}")
        parts += [_of_kill(k) for k in both]
    return "\n\n".join(p for p in parts if p) + "\n"


def _of_size(row: Row) -> str:
    each = row["rounds"] * row["clients"]
    return (
        f"| {row['clients']} | {row['side']} | {row['rounds']} | {row['seconds']:.1f} | {row['median_round_s']:.2f} "
        f"| {row['down'] / each:,.0f} | {row['up'] / each:,.0f} | {row['server_bytes'] / 1e6:.0f} "
        f"| {row['server_cpu_s']:.1f} | {row['client_bytes'] / 1e6:.0f} | {row['client_processes']} "
        f"| {row['accuracy'][-1]:.4f} |"
    )


def _beside(rows: list[Row]) -> str:
    """How far the models of both sides are apart where they ran as many rounds, and what didn't fit into memory."""
    lines = [
        f"The global models of both sides after {row['rounds']} rounds of {row['clients']} clients differ by "
        f"at most {row['apart']:.1e} in any weight; every round counted every client on both."
        if row["all_counted"]
        else f"The models of {row['clients']} clients differ by up to {row['apart']:.1e}; not every client counted."
        for row in rows
        if row.get("apart") is not None
    ]
    lines += [
        f"{row['side']} with {row['clients']} clients took up to {row['swapped'] / 1e9:.1f} GB of swap."
        for row in rows
        if row.get("swapped", 0) > 1e9
    ]
    return "\n".join(lines)


def _of_kill(kill: Row) -> str:
    end = "finished" if kill["finished"] else "not finished"
    accuracy = f", accuracy {kill['rounds'][-1][2]:.4f}" if kill["rounds"] else ""
    distance = "" if kill.get("apart") is None else f", apart {kill['apart']:.1e}"
    lines = [f"**{kill['side']}**: {end}{accuracy}{distance}.", ""]
    lines += [f"- {e['s']:.1f} s: {e['what']}" for e in kill["events"]]
    return "\n".join(lines)
