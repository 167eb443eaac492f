"""The command: `python -m benchmarks.weather [--minutes 30] [--devices 20]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from synthetic_nets import setting, write

from benchmarks.weather.run import RESTART_S, SQUALL, STORM, compare, verdict

NOISE = 0.03
"""By how much an accuracy of 449 digits may differ: one and a half standard errors."""

FETCHED = 1.3


def main() -> int:
    """Run both jobs; returns 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weather", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long the bad weather lasts (default: 30)")
    parser.add_argument("--devices", type=int, default=20, metavar="N", help="boards (default: 20)")
    parser.add_argument("--squall", action="store_true", help="a milder one that shows something in a minute or two")
    parser.add_argument("--no-page", action="store_true", help="print the numbers and leave the results as they are")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        weather = SQUALL if options.squall else STORM
        found = compare(Path(folder), options.devices, 60 * options.minutes, weather)
    faults = verdict(found, NOISE, FETCHED)
    about = setting("onnxruntime", "paho-mqtt")
    text = page(found, about, faults)
    if options.no_page:
        print(json.dumps(found), text, sep="\n")
    else:
        write("weather", {"setting": about, "found": found, "faults": faults}, text)
    return int(bool(faults))


def page(found: dict[str, Any], about: dict[str, Any], faults: list[str]) -> str:
    """The numbers as Markdown."""
    weather, events = found["weather"], found["events"]
    minutes = found["seconds"]["storm"] / 60
    heading = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores with a load of {about['load']:g}, Python "
        f"{about['python']}, onnxruntime {about['onnxruntime']}. "
        f"`python -m benchmarks.weather --devices {found['devices']}`: as many processes "
        f"`fedprune-device run` that train on the demo's digits, and a server, for {minutes:.1f} minutes."
    )
    bad = (
        f"Between boards and broker lies a proxy with {weather['round_trip_s']:g} s of round trip; "
        f"{weather['loss']:.0%} of all segments are lost and sent again; {weather['bytes_s'] / 1e3:g} kB/s; "
        f"{weather['repeats']:.0%} of all PUBLISH packets come twice and {weather['swaps']:.0%} change places with the "
        f"next; connections are reset after {weather['lifetime_s']:g} s on average; every {weather['cut_every_s']:g} s "
        f"a share of {weather['cut_share']:.0%} of the boards is cut off for {weather['cut_s']:g} s. Mosquitto is "
        f"killed every {RESTART_S:g} s. In all: {events.get('connections', 0)} connections, {events.get('lost', 0)} "
        f"round trips of repairs, {events.get('repeated', 0)} packets twice, {events.get('swapped', 0)} pairs swapped, "
        f"{events.get('reset', 0)} resets, {found['restarts']} brokers killed."
    )
    rounds = ["| round | boards counted | accuracy | in calm weather | the same model |", "|---:|---:|---:|---:|---|"]
    both = zip(
        found["counted"], found["accuracy"]["storm"], found["accuracy"]["calm"], found["same_model"], strict=True
    )
    for number, (counted, one, other, same) in enumerate(both, start=1):
        rounds.append(f"| {number} | {counted} | {one:.3f} | {other:.3f} | {'yes' if same else 'no'} |")
    ways = ["| bytes of blobs, per byte needed | all | worst blob |", "|---|---:|---:|"]
    ways += [f"| {name} | {together:.2f} | {worst:.2f} |" for name, (together, worst) in found["ratios"].items()]
    parts = ["# Bad weather", heading, bad, "\n".join(rounds), "\n".join(ways), _EXPLAINED]
    if faults:
        parts += ["Not as it should be:", "\n".join(f"- {f}." for f in faults)]
    return "\n\n".join(parts) + "\n"


_EXPLAINED = """\
*Down* is to the boards, *up* from them. *Asked for* is what the receivers' wants name, *sent* what chunks put into a
link at the sender's end, *arrived* what came out of it at the receiver's, which is what was fetched: all three without
the packets that the proxy itself repeated, but with the answers to askings that it repeated. The last lines add the
chunks that it repeated. What was sent and never arrived was on the way when a connection broke."""


if __name__ == "__main__":
    sys.exit(main())
