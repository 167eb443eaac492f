"""`fedprune-device probe` and `identify`: what the board is and how fast it computes."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields

from fedprune.core.errors import ProfileError
from fedprune.planning.identification import identify
from fedprune_device.engines.engine_selector import accelerator_of
from fedprune_device.hardware.probe import probe, table_summaries
from fedprune_device.hardware.readings import facts
from fedprune_device.hardware.runtime_process import check_runtime


def identify_board(arguments: argparse.Namespace) -> None:

    read = facts()
    found = identify(read)
    if arguments.json:
        print(json.dumps({"board": asdict(read), **found.to_dict()}, sort_keys=True))
    else:
        print(found.describe())


def probe_board(arguments: argparse.Namespace) -> None:

    check_runtime()
    try:
        profile = identify(facts()).profile
    except ProfileError:  # no profile fits this board
        profile = None
    report = probe(arguments.threads, cuda=accelerator_of(arguments.tier, None, profile).cuda, begin=_begin)
    if arguments.json:
        print(json.dumps(report.to_dict(), sort_keys=True))
        return
    tables = table_summaries(report)
    for field in fields(report):
        value = getattr(report, field.name)
        if field.name.endswith("_rate") and value is not None:
            value = f"{value / 1e9:.2f} GFLOP/s"
        elif field.name.startswith("memory_"):
            value = f"{value / 1e6:.0f} MB"
        elif field.name == "seconds":
            value = f"{value:.1f}"
        elif field.name in tables:
            value = tables[field.name]
        if value not in (None, ""):
            print(f"{field.name}: {value}")


def _begin(what: str, seconds: float) -> None:
    """Name a measurement that begins, where no spinner turns."""
    if not sys.stderr.isatty():
        print(f"measuring {what}: about {seconds:.0f} s, longer on a slow board", file=sys.stderr, flush=True)
