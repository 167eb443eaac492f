"""`fedprune-device probe` and `identify`: the board's profile and its speed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields

from fedprune.core.errors import ProfileError
from fedprune.planning.identification import identify
from fedprune_device.engines.board_tier import board_tier
from fedprune_device.hardware.probe import probe, table_summaries
from fedprune_device.hardware.readings import read_board_facts
from fedprune_device.hardware.runtime_process import check_runtime


def identify_board(arguments: argparse.Namespace) -> None:
    readings = read_board_facts()
    identification = identify(readings)
    if arguments.json:
        print(json.dumps({"board": asdict(readings), **identification.to_dict()}, sort_keys=True))
    else:
        print(identification.describe())


def probe_board(arguments: argparse.Namespace) -> None:
    # In a process of its own: a wheel with instructions that the board lacks would kill this one without a message.
    check_runtime()
    try:
        profile = identify(read_board_facts()).profile
    except ProfileError:  # no profile fits this board
        profile = None
    report = probe(arguments.threads, cuda=board_tier(arguments.tier, None, profile).cuda, begin=_report_measurement)
    if arguments.json:
        print(json.dumps(report.to_dict(), sort_keys=True))
        return
    tables = table_summaries(report)
    for field in fields(report):
        value = getattr(report, field.name)
        # Units follow from the names of the report's fields.
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


def _report_measurement(measurement: str, seconds: float) -> None:
    """Name a measurement that begins; on a terminal a spinner shows it."""
    if not sys.stderr.isatty():
        print(f"measuring {measurement}: about {seconds:.0f} s, longer on a slow board", file=sys.stderr, flush=True)
