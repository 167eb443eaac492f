"""`fedprune-simulate`: run a fleet on a virtual clock and write its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune import __version__
from fedprune.core import cli
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import ExitCode, UsageError
from fedprune.output.tables import print_verdicts, progress
from fedprune_server.cli.advise import build_advise_parser
from fedprune_server.cli.sweep_runs import continuation_hint, failure_rows, output_folder, print_remarks, run_variants

if TYPE_CHECKING:
    from fedprune_server.simulation.results.record import Record

PROG = "fedprune-simulate"
COMPARE, SWEEP, NEW, ADVISE = "compare", "sweep", "new", "advise"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    builders = _parser_builders()
    if arguments and arguments[0] in builders:
        return cli.run_command(PROG, builders[arguments[0]], arguments[1:])

    def build_checked_parser() -> CommandParser:
        if arguments:
            cli.check_command(arguments[0], tuple(builders), f"See `{PROG} --help`.")
        return build_parser()

    return cli.run_command(PROG, build_checked_parser, arguments)


def _parser_builders() -> dict[str, Callable[[], CommandParser]]:
    builders = build_compare_parser, build_sweep_parser, build_new_parser, build_advise_parser
    return dict(zip((COMPARE, SWEEP, NEW, ADVISE), builders, strict=True))


def command_parsers() -> dict[str, CommandParser]:
    """The grammar of each command other than the simulation."""
    return {name: build() for name, build in _parser_builders().items()}


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog=PROG,
        description="Simulate a fleet on a virtual clock and write its report.",
        epilog=f"`{PROG} {COMPARE} DIR... --out DIR` puts several runs into one report; "
        f"`{PROG} {SWEEP} FILE --out DIR` does many runs side by side; "
        f"`{PROG} {NEW} DIR` writes a fleet to begin with; "
        f"`{PROG} {ADVISE} --config FILE --out DIR` says which strategy, core and codec to take. "
        "Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="a fleet.toml with a [[devices]] table")
    source.add_argument("--demo", action="store_true", help="the fleet of `fedprune-server demo`, next to FedAvg")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the run; a run that was killed continues there, and a finished one with more --rounds",
    )
    parser.add_argument("--reference", action="store_true", help="run FedAvg at full width on the same devices, too")
    parser.add_argument("--strategy", metavar="NAME", help="instead of the job's, as in `fedprune-server run`")
    parser.add_argument("--seed", type=cli.setting_of(int), metavar="N", help="instead of the job's")
    parser.add_argument("--rounds", type=cli.setting_of(int), metavar="N", help="instead of the job's")
    parser.add_argument("--workers", type=cli.positive_integer, metavar="N", help="processes that train side by side")
    parser.add_argument("--cuda", action="store_true", help="train on an NVIDIA GPU, if that works")
    parser.add_argument(
        "--track",
        metavar="TOOL[:DESTINATION],...",
        help="experiment trackers that get every round: the setting `track` of a simulation",
    )
    cli.add_json_option(parser)
    parser.set_defaults(run=cli.with_extra("server", _run))
    return parser


def build_compare_parser() -> CommandParser:
    parser = CommandParser(
        prog=f"{PROG} {COMPARE}",
        description="Put runs side by side: curves, finals, scores at equal cost, and what a target cost.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folders or files of runs, or a sweep's")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--target",
        type=float,
        action="append",
        metavar="X",
        help="accuracy (or loss) whose cost is compared; repeatable",
    )
    _add_csv(parser)
    cli.add_json_option(parser)
    parser.set_defaults(run=cli.with_extra("server", _compare))
    return parser


def build_sweep_parser() -> CommandParser:
    parser = CommandParser(
        prog=f"{PROG} {SWEEP}", description="Simulate a fleet several times, with other settings each time."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a TOML file: config, seeds, and [[runs]]")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the runs' folders; finished runs are kept"
    )
    parser.add_argument("--workers", type=cli.positive_integer, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster, which must see DIR and the data")
    _add_csv(parser)
    cli.add_json_option(parser)
    parser.set_defaults(run=cli.with_extra("server", _sweep))
    return parser


def _add_csv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a row per run and round, for a spreadsheet; written over"
    )


def build_new_parser() -> CommandParser:
    parser = CommandParser(
        prog=f"{PROG} {NEW}",
        description="Write a fleet to begin with: fleet.toml, a model, samples of digits, a hardware profile per "
        "board, and a strategy of your own.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that is empty or new")
    parser.add_argument(
        "--boards",
        type=_starter_boards,
        metavar="NAME=PROFILE[:BYTES],...",
        help="its boards, each with a shipped hardware profile and what its link carries in a round, such as 40KB "
        "(default: attic, yard and dock, with links of 40 kB, 150 kB and 1 MB)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="keys every random number (default: 0)")
    parser.set_defaults(run=cli.with_extra("server", _new))
    return parser


def _starter_boards(text: str) -> list[tuple[str, str, int]]:
    """Name, profile and bytes of each board, 0 for those of the profile."""
    boards = []
    for item in text.split(","):
        name, equals, rest = item.partition("=")
        profile, colon, amount = rest.partition(":")
        if not (name and equals and profile):
            raise argparse.ArgumentTypeError(f"expected NAME=PROFILE or NAME=PROFILE:BYTES, got {item[:80]!r}")
        boards.append((name, profile, cli.byte_count(amount) if colon else 0))
    return boards


def _new(options: argparse.Namespace) -> None:
    import numpy as np

    from fedprune_server.simulation.digits import CLASS_COUNT
    from fedprune_server.simulation.starter import FLEET_FILE, STARTER_BOARDS, StarterBoard, write_starter

    boards = STARTER_BOARDS if options.boards is None else [StarterBoard(*board) for board in options.boards]
    for name, data in write_starter(options.folder, boards, options.seed).items():
        counts = " ".join(map(str, np.bincount(data.y_train, minlength=CLASS_COUNT)))
        print(f"{name}: {len(data.y_train)} samples to learn from, by class {counts}")
    print(f"\nWhich strategy to take: {PROG} advise --config {options.folder / FLEET_FILE} --out advice")
    print(f"Next: {PROG} --config {options.folder / FLEET_FILE} --out run")


def _run(options: argparse.Namespace) -> None:
    # Imports take a while, too: `--help` and a wrong option must not wait for onnxruntime.
    with progress("reading the fleet"):
        from fedprune_server.config.track_targets import track_targets
        from fedprune_server.simulation.api import simulate
        from fedprune_server.simulation.fleet.demo_fleet import demo_plan, too_few_rounds
        from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
        from fedprune_server.simulation.results.report import claims, closing_text
        from fedprune_server.simulation.results.tables import final_figures, print_results

        out = _run_folder(options.out)
        if options.track is not None:  # before the model is read, which may take long
            track_targets(options.track, "--track")
        changes = {"strategy": options.strategy, "seed": options.seed, "rounds": options.rounds}
        plan = (
            demo_plan(**changes)
            if options.demo
            else read_fleet_plan(options.config, reference=options.reference, **changes)
        )
    with continuation_hint(out):
        run = simulate(plan, folder=out, workers=options.workers, cuda=options.cuda, track=options.track, progress=True)
    # What the demo claims was chosen for its own fleet, budget and rounds.
    unjudged = too_few_rounds(plan.job.rounds) if options.demo else ""
    judged = options.demo and not unjudged
    with progress("writing the report"):
        report = run.report(out, judged=judged)
    if options.json:
        reference = run.reference
        verdicts = claims(run.record, reference) if judged and reference is not None else ()
        cli.print_json(
            {
                "run": final_figures(run.record),
                "reference": None if reference is None else final_figures(reference),
                "claims": [{"text": c.text, "measured": c.measured, "held": c.passes} for c in verdicts],
                "report": str(report),
            }
        )
        return
    print_results([run.record] if run.reference is None else [run.record, run.reference])
    if text := closing_text(run.record, run.reference, judged=judged):
        print_verdicts(f"\n{text}")
    if unjudged:
        print(f"\n{unjudged}")
    print(f"\nGlobal model: {run.record.last.model}")
    print(f"Report: {report}")


def _compare(options: argparse.Namespace) -> None:
    with progress("reading the runs"):
        from fedprune_server.simulation.results.comparison import group_by_seed, read_runs

        _check_csv(options.csv, output_folder(options.out))
        runs = read_runs(options.runs)
    _show_runs(options, runs, group_by_seed(runs))


def _sweep(options: argparse.Namespace) -> int:
    from fedprune_server.simulation.sweep import read_sweep

    _check_csv(options.csv, output_folder(options.out))
    with progress("reading the sweep"):
        runs = read_sweep(options.file)
    variants, failed = run_variants(runs, options.out, workers=options.workers, ray=options.ray)
    records = list(chain.from_iterable(variants.values()))
    _show_runs(options, records, variants, failed=failure_rows(failed))
    print_remarks(records, failed, options.out)
    return int(ExitCode.TRAINING if failed else ExitCode.OK)


def _show_runs(
    options: argparse.Namespace, runs: Sequence[Record], variants: Mapping[str, Sequence[Record]], **lists: object
) -> None:
    """Write the page of runs, and their rounds for a spreadsheet, and print their tables, or JSON with these `lists`.
    A failed sweep may have no runs."""
    from fedprune_server.simulation.results import comparison
    from fedprune_server.simulation.results.rows import write_csv
    from fedprune_server.simulation.results.tables import final_figures

    targets: Sequence[float] = getattr(options, "target", None) or ()
    shown_variants = variants if any(len(group) > 1 for group in variants.values()) else None
    page = comparison.write_comparison(options.out, runs, targets, shown_variants) if runs else None
    if runs and options.csv is not None:
        write_csv(options.csv, runs)
    if options.json:
        rows = [final_figures(r, runs) | {"targets": [comparison.target_figures(r, t) for t in targets]} for r in runs]
        tables = {"variants": comparison.variant_figures(variants), "equal_cost": comparison.equal_cost_figures(runs)}
        report = {"boards": comparison.board_figures(runs), "report": None if page is None else str(page)}
        cli.print_json({"runs": rows, **tables, **lists, **report})
    elif page is not None:
        comparison.print_comparison(runs, targets, shown_variants)
        print(f"\nReport: {page}")


def _check_csv(path: Path | None, out: Path) -> None:
    """Raise `UsageError` if the table can't be written: before hours of runs, not after them."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--csv {path} is a folder", expected="a file")
    if not path.parent.is_dir() and path.parent.absolute() != out.absolute():
        raise UsageError(f"--csv {path}", expected=f"a folder {path.parent}", got="none")


def _run_folder(out: Path) -> Path:
    """The folder of `--out`. Raises `UsageError` if it holds anything but a run: that would be written over."""
    from fedprune_server.simulation.results.run_folder import is_run

    if output_folder(out).is_dir() and any(out.iterdir()) and not is_run(out):
        raise UsageError(f"--out {out} holds something that is not a run's", expected="an empty folder, or a run's own")
    return out


if __name__ == "__main__":
    sys.exit(main())
