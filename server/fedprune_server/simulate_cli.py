"""`fedprune-simulate`: run a fleet on a virtual clock and write its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune import __version__
from fedprune.cli import run_command, whole_number, with_extra
from fedprune.errors import ExitCode, UsageError

if TYPE_CHECKING:  # what follows needs packages of an extra; the command line doesn't
    from fedprune.job import Job
    from fedprune_server.record import Record
    from fedprune_server.simulated_fleet import Plan
    from fedprune_server.simulation import Simulation


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command("fedprune-simulate", build_parser, argv)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="fedprune-simulate",
        description="Simulate a fleet on a virtual clock and write its report.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="a fleet.toml with a [[devices]] table")
    source.add_argument("--demo", action="store_true", help="the fleet of `fedprune-server demo`, beside FedAvg")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; one that was killed goes on"
    )
    parser.add_argument("--reference", action="store_true", help="run FedAvg at full width on the same devices, too")
    parser.add_argument("--seed", type=int, metavar="N", help="instead of the job's")
    parser.add_argument("--rounds", type=whole_number, metavar="N", help="instead of the job's")
    parser.set_defaults(run=with_extra("server", _run))
    return parser


def _run(options: argparse.Namespace) -> int:
    from fedprune_server.report import summary_text, write_report
    from fedprune_server.simulated_fleet import demo_plan, read_plan

    out = options.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", expected="a folder, which is made if missing")
    changes = {"seed": options.seed, "rounds": options.rounds}
    plan = demo_plan(**changes) if options.demo else read_plan(options.config, reference=options.reference, **changes)
    run, reference = _one(plan.title, plan.job, plan, out / "run"), None
    run.save(out / "metrics.json")
    if plan.reference is not None:
        from fedprune_server.reference import TITLE

        reference = _one(TITLE, plan.reference, plan, out / "reference")
        reference.save(out / "metrics-reference.json")
    # What the demo claims was chosen for its own fleet and budget.
    report = write_report(out, run, reference, judged=options.demo)
    print(summary_text(run, reference, judged=options.demo))
    print(f"\nReport: {report.html}")
    return int(ExitCode.OK)


def _one(title: str, job: Job, plan: Plan, folder: Path) -> Record:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedprune.blobs import BlobStore
    from fedprune_server.simulation import Simulation

    folder.mkdir(parents=True, exist_ok=True)
    simulation = Simulation(
        job,
        plan.model,
        plan.devices,
        plan.evaluation,
        BlobStore(folder / "blobs"),
        folder=folder,
        dropouts=plan.dropouts,
        calibration=plan.calibration,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        rounds = bar.add_task(title, total=job.rounds, completed=len(simulation.state.history), note="")

        def show(simulation: Simulation) -> None:
            state = simulation.state
            done = sum(t.progress.over for t in state.tasks.values()) / max(1, len(state.tasks))
            metrics = state.history[-1]["metrics"] if state.history else {}
            note = f"loss {metrics['loss']:.4g}" if "loss" in metrics else ""
            if "accuracy" in metrics:
                note = f"accuracy {metrics['accuracy']:.1%}"
            shown = min(job.rounds, len(state.history) + (done if state.round > len(state.history) else 0))
            bar.update(rounds, completed=round(shown, 2), note=note)

        simulation.run(show)
    return simulation.record(title)


if __name__ == "__main__":
    sys.exit(main())
