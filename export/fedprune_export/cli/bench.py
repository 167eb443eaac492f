"""`bench BUNDLE`: time a bundle's training steps and predictions on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedprune.core.cli import add_json, print_json, whole_number
from fedprune.core.errors import UsageError
from fedprune.core.text import quantity
from fedprune.output import tables
from fedprune.planning import profile_store
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.precision_files import FLOAT32
from fedprune_export.cli.options import add_probe_option, add_profiles_option, read_probe


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        description="Time training steps and predictions of a bundle on this machine, with random samples, each in a "
        "process of its own. With --target, the planner's predictions for a board are shown next to it.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--runs", type=whole_number, default=30, metavar="N", help="timed runs of each (default: 30)")
    parser.add_argument(
        "--batch",
        type=_numbers,
        metavar="N,N",
        help="samples of a run (default: the recipe's for training, 1 and the recipe's for predictions)",
    )
    parser.add_argument("--threads", type=_numbers, default=(1,), metavar="N,N", help="threads (default: 1)")
    parser.add_argument("--target", metavar="PROFILE", help="hardware profile to predict for: a name or a TOML file")
    add_profiles_option(parser)
    add_probe_option(parser)
    add_json(parser)
    parser.set_defaults(function=bench)


def bench(arguments: argparse.Namespace) -> None:
    """Print what was measured."""
    profile = profile_store.chosen(arguments.target, arguments.profiles) if arguments.target else None
    probe = read_probe(arguments)
    if probe is not None and profile is None:
        raise UsageError("--probe is the measurement of a board", expected="its --target, too")
    from fedprune_export.profiling.benchmark import Stopwatch
    from fedprune_export.reports.bench_report import Benchmark

    bundle = open_bundle(arguments.bundle)
    watch, usual = Stopwatch(bundle, arguments.runs), bundle.recipe.micro_batch
    measured = []
    with tables.progress() as tell:
        for threads in arguments.threads:
            for batch in arguments.batch or (usual,):
                tell(f"training, {quantity(batch, 'sample')}, {quantity(threads, 'thread')}")
                measured.append(watch.training_step(batch, threads))
            for batch in arguments.batch or tuple(sorted({1, usual})):
                for precision in (FLOAT32, *bundle.precisions):
                    tell(f"predicting with {precision}, {quantity(batch, 'sample')}, {quantity(threads, 'thread')}")
                    measured.append(watch.prediction(batch, threads, precision))
    found = Benchmark(bundle, tuple(measured), profile, probe)
    if arguments.json:
        print_json(found.to_dict())
    else:
        found.table().print()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(whole_number(n) for n in text.split(","))
