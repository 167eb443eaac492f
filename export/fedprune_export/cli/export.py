"""The export itself: cuts one model for one or several boards, and writes a bundle for each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import fedprune_export as fx
from fedprune.core import cli
from fedprune.core.errors import BundleError, ExitCode, FedpruneError, UsageError
from fedprune.core.text import amount
from fedprune.output import tables
from fedprune.output.tables import Column
from fedprune.planning import profile_store
from fedprune.runtime.bundle_folder import check_bundle_folder, is_bundle
from fedprune.runtime.precision_files import PRECISIONS
from fedprune.updates import PLAIN
from fedprune_export.cli import options
from fedprune_export.model_options import add_model_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an export."""
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument(
        "--target",
        required=True,
        action="extend",
        type=options.comma_separated_names,
        metavar="PROFILE",
        help="hardware profile: a name or a TOML file; several, repeated or with commas, give a folder each",
    )
    parser.add_argument(
        "--profiles",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of own profiles that --target takes by name; repeatable",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the bundle's folder; several go into folders in it"
    )
    _add_plan_options(parser)
    parser.add_argument(
        "--opset", type=cli.positive_integer, metavar="N", help="opset of the inference graph (default: 17)"
    )
    parser.add_argument(
        "--class-names",
        type=options.comma_separated_names,
        default=(),
        metavar="A,B,C",
        help="names of the classes (default: those of a folder's config.json)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE.npz", help="samples to measure the model on, whole and as cut: x and y"
    )
    parser.add_argument(
        "--precision",
        type=options.parse_precisions,
        default=(),
        metavar="P,P",
        help=f"lower precisions to predict at, too: {', '.join(PRECISIONS)}; int8 needs --data, or a model from a "
        "quantised file",
    )
    cli.add_json_option(parser, "the report as JSON, for programs")
    parser.add_argument(
        "--probe",
        type=Path,
        metavar="FILE.json",
        help="the board's own measurements (fedprune-device probe --json), which beat the profile's figures",
    )
    add_model_options(parser)
    options.add_recipe_options(parser)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit the submodel: its width, and the bytes, seconds and joules of a round."""
    parser.add_argument(
        "--density", type=options.parse_density, default=None, help="kept share of all channels, or auto (default)"
    )
    parser.add_argument(
        "--scorer",
        choices=("ordered", "magnitude"),  # others need measurements of a fleet's training
        help="how channels are ranked (default: as the fleet that trained the model cut it, if the model says so, else "
        "magnitude)",
    )
    parser.add_argument(
        "--samples",
        type=cli.positive_integer,
        default=1000,
        metavar="N",
        help="training samples that the board holds (default: 1000)",
    )
    parser.add_argument(
        "--bytes-per-round",
        type=cli.byte_count,
        metavar="BYTES",
        help="bytes that a round may transfer, down plus up, such as 1MB",
    )
    parser.add_argument(
        "--compression",
        type=options.parse_codec,
        default=PLAIN,
        metavar="CODEC",
        help="codec in which transferred weights and updates are counted, as in the job, such as int8 (default: none)",
    )
    parser.add_argument(
        "--joules-per-round",
        type=cli.positive_joules,
        metavar="J",
        help="energy of a round's training in addition to the idle board's",
    )
    parser.add_argument(
        "--deadline", type=cli.positive_seconds, metavar="SECONDS", help="seconds that a round may take"
    )


def export_command(arguments: argparse.Namespace) -> int:
    """Export a model for every target; returns the exit code, which is that of the first target that failed."""
    # All that doesn't depend on the model is checked before its import, which may take minutes.
    profiles = [profile_store.find_typed_profile(name, arguments.profiles) for name in arguments.target]
    if not profiles:
        raise UsageError("--target", expected="the name of a hardware profile, or a file")
    recipe, probe = options.read_recipe(arguments), options.read_probe(arguments)
    if probe is not None and len(profiles) > 1:
        raise UsageError("--probe is of one board", expected="one --target", got=len(profiles))
    folders = _bundle_folders(arguments.out, [p.name for p in profiles])
    results: dict[str, fx.Report | FedpruneError] = {}
    with tables.progress() as tell:
        tell(f"importing {arguments.model}")
        model = options.read_model(arguments, recipe=recipe)
        # The samples of --data; the number of class names is checked, too, where outputs belong to classes.
        from fedprune_export.checks import labelled_file

        classes = model.architecture.classes
        if model.loss is None and arguments.class_names and len(arguments.class_names) != classes:
            raise UsageError("--class-names", expected=f"{classes} names", got=len(arguments.class_names))
        data = arguments.data and labelled_file.load_scored_data(arguments.data, model, recipe)
        tell("deriving the training step")
        # Before the boards: a model that can't be trained fails once, and not for each board.
        fx.training_step(model, recipe.features)
        for profile, folder in zip(profiles, folders, strict=True):
            tell(f"exporting for {profile.name} ({len(results) + 1} of {len(profiles)})")
            try:
                plan = fx.plan(
                    model,
                    profile,
                    recipe=recipe,
                    samples=arguments.samples,
                    density=arguments.density,
                    bytes_per_round=arguments.bytes_per_round,
                    deadline_s=arguments.deadline,
                    joules_per_round=arguments.joules_per_round,
                    compression=arguments.compression,
                    probe=probe,
                )
                results[profile.name] = fx.export(
                    model,
                    plan,
                    folder,
                    scorer=arguments.scorer,
                    data=data,
                    precisions=arguments.precision,
                    opset=arguments.opset,
                    class_names=arguments.class_names,
                )
            except FedpruneError as error:
                if len(profiles) == 1:
                    raise
                results[profile.name] = error
    return _print_results(arguments, results, model.notes)


def _bundle_folders(out: Path, targets: Sequence[str]) -> tuple[Path, ...]:
    """The folder of each target's bundle, each of which may be written to."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", expected="a folder, which is made if missing")
    if len(set(targets)) < len(targets):
        raise UsageError("two targets have the same name", got=", ".join(targets))
    if len(targets) > 1 and is_bundle(out):
        raise BundleError(f"{out} is itself a bundle", hint="Give another --out for several targets.")
    folders = (out,) if len(targets) == 1 else tuple(out / name for name in targets)
    # Before the first export: with several boards the last one's folder must not fail after an hour.
    for folder, target in zip(folders, targets, strict=True):
        check_bundle_folder(folder, target)
    return folders


def _print_results(
    arguments: argparse.Namespace, results: Mapping[str, fx.Report | FedpruneError], notes: Sequence[str]
) -> int:
    """Print the reports, and a line per target that failed; returns the first one's exit code."""
    from fedprune_export.importing import is_factory_source

    reports = {name: r for name, r in results.items() if not isinstance(r, FedpruneError)}
    failures = {name: r for name, r in results.items() if isinstance(r, FedpruneError)}
    if arguments.json:
        rows = {name: {"target": name, "error": str(e), "exit_code": int(e.exit_code)} for name, e in failures.items()}
        rows |= {name: report.to_dict() for name, report in reports.items()}
        cli.print_json([rows[name] for name in results] if len(results) > 1 else next(iter(rows.values())))
    elif len(results) == 1:
        print(*reports.values())
    else:
        if reports:
            tables.print_table(_SUMMARY, map(_summary_row, reports.values()))
        for line in _remark_lines(reports, notes):
            print(line)
        where = f" in {arguments.out} (each has a report.html)" if reports else ""
        # Torch's export is most of the command's time.
        once = f"; torch exported {arguments.model} once for all" if is_factory_source(arguments.model) else ""
        print(f"bundles: {len(reports)} of {len(results)}{where}{once}")
    for name, failure in failures.items():
        print(f"error: {name}: {' '.join(str(failure).split())}", file=sys.stderr)
    return int(next((failure.exit_code for failure in failures.values()), ExitCode.OK))


def _remark_lines(reports: Mapping[str, fx.Report], model_notes: Sequence[str]) -> Iterator[str]:
    """Notes, warnings and advice; a note of several targets comes once."""
    for note in dict.fromkeys(note for r in reports.values() for note in r.plan.width_plan.notes):
        yield f"{', '.join(n for n, r in reports.items() if note in r.plan.width_plan.notes)}: {note}"
    for name, report in reports.items():
        if report.plan.width_plan.warning:
            yield f"warning: {name}: {report.plan.width_plan.warning}"
        yield from (f"warning: {name}: {t.warning}" for t in report.trials if t.warning)
        if report.advice:
            yield f"{name} has limited support: {report.advice}"
    for note in dict.fromkeys([*model_notes, *(note for r in reports.values() for note in r.notes)]):
        yield f"note: {note}"
    yield from (f"replaced: the bundle that was in {r.folder}" for r in reports.values() if r.replaced)


_SUMMARY = (
    Column("target"),
    Column("density", is_right_aligned=True),
    Column("bound by"),
    Column("parameters", is_right_aligned=True, drop_order=2),
    Column("MACs", is_right_aligned=True, drop_order=3),
    Column("weights", is_right_aligned=True, drop_order=1),
    Column("memory", is_right_aligned=True),
    Column("step", is_right_aligned=True),
    Column("parity", is_right_aligned=True, drop_order=4),
)


def _summary_row(report: fx.Report) -> tuple[str, ...]:
    p = report.plan.width_plan.prediction
    return (
        report.target,
        f"{report.plan.density:.3g}",
        report.plan.width_plan.bound,
        f"{p.parameters:,}",
        f"{p.forward_macs:,}",
        amount(p.wire_bytes, "bytes"),
        amount(p.memory_bytes, "bytes"),
        amount(p.step_s, "s"),
        f"{report.parity:.1e}",
    )
