"""`fedprune-simulate advise`: which strategy, core and codec suit a fleet, by short runs of each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedprune.core.cli import add_json_option, positive_integer, print_json, with_extra
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import ExitCode
from fedprune.core.text import quantity
from fedprune.output.tables import progress
from fedprune_server.cli.sweep_runs import failure_rows, output_folder, print_remarks, run_variants

# A shared core is trained for four fifths of the rounds: ten leave two in which boards train all that they can hold.
# One seed can't show what is noise.
ADVISED_ROUNDS, ADVISED_SEEDS = 10, 2


def build_advise_parser() -> CommandParser:
    parser = CommandParser(
        prog="fedprune-simulate advise",
        description="Try the usual strategies, cores and codecs in short runs of your fleet, and say which to take.",
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a fleet.toml with a [[devices]] table"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the runs' folders; finished runs are kept"
    )
    parser.add_argument(
        "--rounds",
        type=positive_integer,
        metavar="N",
        help=f"of each run (default: {ADVISED_ROUNDS}, or the job's where it has fewer)",
    )
    parser.add_argument(
        "--seeds",
        type=positive_integer,
        default=ADVISED_SEEDS,
        metavar="N",
        help=f"runs of each variant, with the job's seed and those after it (default: {ADVISED_SEEDS})",
    )
    parser.add_argument(
        "--judge",
        choices=("global", "served", "worst"),
        help="score that decides: the global model's on the server's samples, or of the models that boards serve the "
        "mean or the worst (default: global, or served where the server has no samples)",
    )
    parser.add_argument("--workers", type=positive_integer, default=1, metavar="N", help="runs at a time")
    add_json_option(parser)
    parser.set_defaults(run=with_extra("server", _advise))
    return parser


def _advise(options: argparse.Namespace) -> int:
    # These imports take a while, in which the user sees that something happens.
    with progress("reading the fleet"):
        from fedprune.jobs.job import NO_UPDATE_LIMITS
        from fedprune_server.simulation.advisor import VariantRuns, advice_figures, advice_rows, advise
        from fedprune_server.simulation.fleet.fleet_tables import read_fleet_tables
        from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
        from fedprune_server.simulation.job_variants import choose_variants
        from fedprune_server.simulation.results.comparison import write_comparison
        from fedprune_server.simulation.results.tables import final_figures, print_rows
        from fedprune_server.simulation.sweep import variant_runs

        out, plan = output_folder(options.out), read_fleet_plan(options.config)
        (variants, refused), job_rounds = choose_variants(options.config, plan), plan.job.rounds
        rounds = options.rounds or min(ADVISED_ROUNDS, job_rounds)
        seeds = range(plan.job.seed, plan.job.seed + options.seeds)
        # A server will run the job, with its limits on updates. A total is the whole job's: these runs are short by
        # their rounds.
        limits = {k: getattr(read_fleet_tables(options.config).config.job, k) for k in NO_UPDATE_LIMITS}
        short = {"rounds": rounds, "total_bytes": 0, "total_macs": 0, "total_hours": 0, **limits}
        rows = [{"name": v.name, "job": {**v.job, **short}} for v in variants]
        runs = variant_runs(options.config.resolve(), rows, seeds, str(options.config))
    records, failed = run_variants(runs, out, workers=options.workers)
    # A variant with a failed run is left out: its mean would be over other seeds than the others'.
    trials = [VariantRuns(v, tuple(records[v.name])) for v in variants if len(records.get(v.name, ())) == len(seeds)]
    finished_records = [record for trial in trials for record in trial.runs]
    advice = page = None
    if trials:
        samples = 0 if plan.evaluation is None else len(plan.evaluation[1])
        advice = advise(trials, job_rounds, samples, options.judge)
        page = write_comparison(out, finished_records, variants={t.variant.name: t.runs for t in trials})
    if options.json:
        print_json(
            {
                "rounds": rounds,
                "job_rounds": job_rounds,
                "seeds": list(seeds),
                "variants": advice_figures(trials, job_rounds) if trials else [],
                "refused": [{"variant": name, "why": str(error)} for name, error in refused.items()],
                "advice": None if advice is None else advice.to_dict(),
                "runs": [final_figures(record) for record in finished_records],
                "failed": failure_rows(failed),
                "report": None if page is None else str(page),
            }
        )
    elif advice is not None:
        print_rows(advice_rows(trials, job_rounds))
        print(
            f"\nScores after {quantity(rounds, 'round')}, as means over {quantity(len(seeds), 'seed')}. "
            f"MACs are a share of {trials[0].variant.name}'s; MB, energy (of training) and time are those of the job's "
            f"{quantity(job_rounds, 'round')} at this pace.\n"
        )
        print("\n".join(filter(None, (advice.reason, *advice.doubts, advice.worth))))
        if advice.taken is not None:
            print(
                f"\nPut these lines in place of the job's strategy, codecs and [job.options]:\n\n{advice.taken.toml()}"
            )
        print(f"\nReport: {page}")
    for name, error in refused.items():
        print(f"{name} is left out: {error}", file=sys.stderr)
    print_remarks(finished_records, failed, out)
    return int(ExitCode.TRAINING if failed else ExitCode.OK)
