"""`fedprune-server demo`: a whole fleet on this machine, beside a fleet that trains the whole model everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedprune.core.cli import with_extra


def register(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="six devices, a broker and a server on this machine: narrow models against FedAvg",
        description="Start a broker, a server and six device processes, each with its own mixture of digits; then the "
        "same devices with FedAvg at full width; compare accuracies and bytes, and write a report. It ends with exit "
        "code 5 if a claim fails.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-run"), metavar="DIR", help="folder of the run (default: demo-run)"
    )
    demo.add_argument("--rounds", type=int, metavar="N", help="rounds of each job")
    demo.add_argument("--seed", type=int, default=0, help="keys every random number (default: 0)")
    demo.add_argument("--quick", action="store_true", help="two rounds: does it run at all? Too few to judge it by")
    demo.set_defaults(run=with_extra("server", run))


def run(arguments: argparse.Namespace) -> int:
    # What the demo needs is heavy (database, pictures); other subcommands shall start without it.
    from fedprune_server.cli.demo_run import run_demo

    return run_demo(arguments.out, seed=arguments.seed, rounds=arguments.rounds, quick=arguments.quick)
