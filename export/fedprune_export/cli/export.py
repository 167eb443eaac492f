"""The export itself: one model, one or several boards, a bundle for each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.core.cli import seconds, whole_number
from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.core.text import amount
from fedprune.terminal import tables
from fedprune.terminal.tables import Column
from fedprune_export.cli.explain import show
from fedprune_export.cli.export_job import ExportJob
from fedprune_export.cli.options import (
    MODEL_HELP,
    add_model_options,
    add_precision_option,
    add_probe_option,
    add_profiles_option,
    add_recipe_options,
    blocks,
    byte_count,
    density,
    names,
)

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.reports.report import Report

_SCORERS = ("ordered", "magnitude")
"""Those that look at a model alone; curvature needs what a fleet has learnt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what an export takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--target",
        required=True,
        action="append",
        metavar="PROFILE",
        help="hardware profile: a name or a TOML file; several, repeated or with commas, give a folder each",
    )
    add_profiles_option(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the bundle's folder, or the bundles'")
    parser.add_argument("--density", type=density, default=None, help="kept share of all channels, or auto (default)")
    parser.add_argument("--scorer", default="magnitude", choices=_SCORERS, help="how channels are ranked")
    parser.add_argument(
        "--samples",
        type=whole_number,
        default=1000,
        metavar="N",
        help="training samples that the board holds (default: 1000)",
    )
    parser.add_argument(
        "--bytes-per-round", type=whole_number, metavar="N", help="what a round may carry, down plus up"
    )
    parser.add_argument("--deadline", type=seconds, metavar="SECONDS", help="what a round may take")
    parser.add_argument(
        "--memory-limit",
        type=byte_count,
        metavar="BYTES",
        help="what the training process may take, such as 200MB: activations are computed again as far as it needs",
    )
    parser.add_argument("--opset", type=whole_number, metavar="N", help="opset of the inference graph (default: 17)")
    parser.add_argument("--class-names", type=names, default=(), metavar="A,B,C", help="names of the classes")
    parser.add_argument(
        "--data", type=Path, metavar="FILE.npz", help="samples to measure the model on, whole and as cut: x and y"
    )
    add_precision_option(parser)
    parser.add_argument(
        "--block",
        type=blocks,
        default=None,
        metavar="N,N",
        help="write a training step for x86 boards that compute blocks of 16 (AVX-512) or 8 channels, too (default: "
        "what --probe says)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="say where the time of a training step goes (one target; see explain)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_probe_option(parser)
    add_model_options(parser)
    add_recipe_options(parser)


def export(arguments: argparse.Namespace) -> int:
    """Export a model for every target; returns the exit code.

    Raises:
        FedpruneError: The model, the recipe or the data are wrong; or the only target is.
    """
    job = ExportJob(arguments)
    if len(job.profiles) == 1:
        with tables.progress() as tell:
            report = job.bundle(job.profiles[0], arguments.out, tell)
            explanation = job.explanation(report) if arguments.explain else None
        if arguments.json:
            body = report.to_dict()
            tables.print_json(body if explanation is None else {**body, "explanation": explanation.to_dict()})
        else:
            _print_replaced(job)
            if job.memory is not None:
                print(job.memory.describe())
            if job.without_blocks:
                print(job.without_blocks)
            _print_report(report, arguments.out)
            if explanation is not None:
                show(explanation)
        return int(ExitCode.OK)
    return _export_all(job, arguments)


def _export_all(job: ExportJob, arguments: argparse.Namespace) -> int:
    """Write what can be written; the exit code is that of the first target that failed."""
    rows: list[tuple[str, ...]] = []
    memory: list[str] = []
    notes: dict[str, list[str]] = {}  # and the targets that each is of: no note is printed twice
    advice: list[str] = []
    found: list[dict[str, Any]] = []
    failed: list[tuple[str, FedpruneError]] = []
    for i, profile in enumerate(job.profiles, 1):
        with tables.progress() as tell:
            stage = f"{profile.name} ({i} of {len(job.profiles)})"
            try:
                report = job.bundle(profile, arguments.out / profile.name, _staged(tell, stage))
            except FedpruneError as failure:
                if not job.begun:  # the model itself can't be imported or trained: it is no target's fault
                    raise
                failed.append((profile.name, failure))
                found.append({"target": profile.name, "error": str(failure), "exit_code": int(failure.exit_code)})
                continue
        found.append(report.to_dict())
        rows.append(_summary_row(report))
        for note in report.plan.notes:
            notes.setdefault(note, []).append(profile.name)
        if report.plan.warning:
            advice.append(f"warning: {profile.name}: {report.plan.warning}")
        if job.memory is not None:
            memory.append(f"{profile.name}: {job.memory.describe()}")
        if report.advice:
            advice.append(f"{profile.name} is of the second tier: {report.advice}")
    if arguments.json:
        tables.print_json(found)
    else:
        if rows:
            tables.print_table(_SUMMARY, rows)
        for line in (*memory, *(f"{', '.join(targets)}: {note}" for note, targets in notes.items()), *advice):
            print(line)
        for note in job.model.notes:
            print(f"note: {note}")
        _print_replaced(job)
        where = f" in {arguments.out} (each has a report.html)" if rows else ""
        print(f"bundles: {len(rows)} of {len(job.profiles)}{where}")
    for name, error in failed:
        print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return int(failed[0][1].exit_code) if failed else int(ExitCode.OK)


def _print_replaced(job: ExportJob) -> None:
    for out in job.replaced:
        print(f"replaced: the bundle that was in {out}")


def _staged(tell: Callable[[str], None], stage: str) -> Callable[[str], None]:
    return lambda text: tell(f"{stage}: {text}")


_SUMMARY = (
    Column("target"),
    Column("density", right=True),
    Column("bound by"),
    Column("parameters", right=True, drop=2),
    Column("MACs", right=True, drop=3),
    Column("weights", right=True, drop=1),
    Column("memory", right=True),
    Column("step", right=True),
    Column("parity", right=True, drop=4),
)


def _summary_row(report: Report) -> tuple[str, ...]:
    p = report.plan.prediction
    return (
        report.target,
        f"{report.plan.density:.3g}",
        report.plan.bound,
        f"{report.after.parameters:,}",
        f"{report.after.forward_macs:,}",
        amount(p.wire_bytes, "bytes"),
        amount(p.memory_bytes, "bytes"),
        amount(p.step_s, "s"),
        f"{report.parity:.1e}",
    )


def _print_report(report: Report, out: Path) -> None:
    before, after = report.before, report.after
    print(report.plan.describe(before.parameters))
    if report.plan.warning:
        print(f"warning: {report.plan.warning}")
    print(f"parameters: {before.parameters:,} -> {after.parameters:,}")
    print(f"MACs per sample: {before.forward_macs:,} -> {after.forward_macs:,}")
    print(f"weights: {before.wire_bytes:,} -> {after.wire_bytes:,} bytes")
    if report.accuracy is not None:
        from fedprune_export.reports.report import score as shown

        a = report.accuracy
        print(f"{a.measure} on {a.samples:,} samples, untrained: {shown(a, a.before)} -> {shown(a, a.after)}")
    print(f"parity with the masked model: {report.parity:.1e}")
    for trial in report.trials:
        print(f"{trial.lowered.precision}: {trial.describe()}")
    if report.advice:
        print(f"second tier: {report.advice}")
    for note in report.model.notes:
        print(f"note: {note}")
    print(f"bundle: {out} (report.html says more)")
