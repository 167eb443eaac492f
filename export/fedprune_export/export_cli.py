"""The export itself: one model, one or several boards, a bundle for each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune import engine_plan, profile_store
from fedprune.blocks import block_size, turned_off
from fedprune.bundle import TRAINING, blocked_file
from fedprune.cli import seconds, whole_number
from fedprune.engine_plan import EnginePlan
from fedprune.errors import BundleError, DataError, ExitCode, FedpruneError, ModelError, UsageError
from fedprune.plan import DENSITIES, plan
from fedprune.precision import INT8
from fedprune.prediction import predict
from fedprune.probe_report import ProbeReport
from fedprune.profile import HardwareProfile
from fedprune.recipe import Recipe
from fedprune.scoring import ranks, score
from fedprune.selection import Selection
from fedprune.session import Array, Session
from fedprune.step import LOGITS, X
from fedprune_export import terminal
from fedprune_export.explain_cli import bounds, show
from fedprune_export.options import (
    MODEL_HELP,
    add_model_options,
    add_precision_option,
    add_probe_option,
    add_profiles_option,
    add_recipe_options,
    amount,
    blocks,
    density,
    labels_of,
    names,
    read_model,
    read_probe,
    read_recipe,
    targets,
)

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.explanation import Explanation
    from fedprune_export.imported import Model
    from fedprune_export.labelled_data import LabelledData
    from fedprune_export.precision import Trial
    from fedprune_export.report import Accuracy, Report
    from fedprune_export.training_memory import Fitted

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
        type=amount,
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
    job = _Job(arguments)
    if len(job.profiles) == 1:
        with terminal.progress() as tell:
            report = job.bundle(job.profiles[0], arguments.out, tell)
            explanation = job.explanation(report) if arguments.explain else None
        if arguments.json:
            body = report.to_dict()
            terminal.print_json(body if explanation is None else {**body, "explanation": explanation.to_dict()})
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


def _export_all(job: _Job, arguments: argparse.Namespace) -> int:
    """Write what can be written; the exit code is that of the first target that failed."""
    rows: list[tuple[str, ...]] = []
    memory: list[str] = []
    advice: list[str] = []
    found: list[dict[str, Any]] = []
    failed: list[tuple[str, FedpruneError]] = []
    for i, profile in enumerate(job.profiles, 1):
        with terminal.progress() as tell:
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
        if job.memory is not None:
            memory.append(f"{profile.name}: {job.memory.describe()}")
        if report.advice:
            advice.append(f"{profile.name} is of the second tier: {report.advice}")
    if arguments.json:
        terminal.print_json(found)
    else:
        if rows:
            terminal.print_table(_SUMMARY, rows)
        for line in (*memory, *advice):
            print(line)
        for note in job.model.notes:
            print(f"note: {note}")
        _print_replaced(job)
        where = f" in {arguments.out} (each has a report.html)" if rows else ""
        print(f"bundles: {len(rows)} of {len(job.profiles)}{where}")
    for name, error in failed:
        print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return int(failed[0][1].exit_code) if failed else int(ExitCode.OK)


def _print_replaced(job: _Job) -> None:
    for out in job.replaced:
        print(f"replaced: the bundle that was in {out}")


def _staged(tell: Callable[[str], None], stage: str) -> Callable[[str], None]:
    return lambda text: tell(f"{stage}: {text}")


_SUMMARY = ("target", "density", "bound by", "parameters", "multiplications", "weights", "memory", "step", "parity")


def _summary_row(report: Report) -> tuple[str, ...]:
    p = report.plan.prediction
    return (
        report.target,
        f"{report.plan.density:.3g}",
        report.plan.bound,
        f"{report.after.parameters:,}",
        f"{report.after.forward_macs:,}",
        terminal.amount(p.wire_bytes, "bytes"),
        terminal.amount(p.memory_bytes, "bytes"),
        terminal.amount(p.step_s, "s"),
        f"{report.parity:.1e}",
    )


def _print_report(report: Report, out: Path) -> None:
    before, after = report.before, report.after
    print(report.plan.describe(before.parameters))
    print(f"parameters: {before.parameters:,} -> {after.parameters:,}")
    print(f"multiplications per sample: {before.forward_macs:,} -> {after.forward_macs:,}")
    print(f"weights: {before.wire_bytes:,} -> {after.wire_bytes:,} bytes")
    if report.accuracy is not None:
        from fedprune_export.report import score as shown

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


class _Job:
    """What all targets of an export share; the model is imported when the first one needs it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        turned_off()  # says what is wrong with the setting before the work begins
        self.arguments = arguments
        self.profiles = [profile_store.chosen(name, arguments.profiles) for name in targets(arguments.target)]
        self.recipe: Recipe = read_recipe(arguments)
        self.probe: ProbeReport | None = read_probe(arguments)
        if INT8 in arguments.precision and arguments.data is None:
            raise UsageError("--precision int8", expected="--data, too: samples that show what activations are like")
        if self.probe is not None and len(self.profiles) > 1:
            raise UsageError("--probe is of one board", expected="one --target", got=len(self.profiles))
        if arguments.block and self.recipe.ordered_dropout:
            raise UsageError("--block", expected="a recipe that trains at one width", got="ordered dropout")
        if arguments.block and not any(p.arch == "x86_64" for p in self.profiles):
            got = ", ".join(sorted({p.arch for p in self.profiles}))
            raise UsageError("--block is for x86 boards", expected="a target of x86_64", got=got)
        if arguments.block and arguments.memory_limit is not None:
            raise UsageError("--memory-limit is for training.onnx", expected="no --block beside it")
        if arguments.explain and len(self.profiles) > 1:
            raise UsageError("--explain is of one board", expected="one --target", got=len(self.profiles))
        self.begun = False
        self.memory: Fitted | None = None
        self.replaced: list[Path] = []
        self._check_folders()

    def _check_folders(self) -> None:
        """Refuse what can't be written to before the work begins."""
        from fedprune_export.bundle_folder import check_folder, is_bundle

        out = self.arguments.out
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file", expected="a folder, which is made if missing")
        named = [p.name for p in self.profiles]
        if len(set(named)) < len(named):
            raise UsageError("two targets have the same name", got=", ".join(named))
        if len(named) == 1:
            check_folder(out, named[0])
            return
        if is_bundle(out):
            raise BundleError(f"{out} is itself a bundle", hint="Give another --out for several targets.")
        for name in named:
            check_folder(out / name, name)

    def _begin(self, tell: Callable[[str], None]) -> None:
        """Import the model and what depends on nothing else."""
        from fedprune_export import labelled_data
        from fedprune_export.bundle import training_step

        arguments = self.arguments
        tell(f"importing {arguments.model}")
        self.model: Model = read_model(arguments)
        architecture = self.model.architecture
        if arguments.class_names and len(arguments.class_names) != architecture.classes:
            raise UsageError("--class-names", expected=f"{architecture.classes} names", got=len(arguments.class_names))
        self.data: LabelledData | None = None
        if arguments.data is not None:
            dtype = self.model.graph.inputs[0].dtype
            self.data = labelled_data.read(arguments.data, architecture, dtype, labels_of(self.recipe))
            tell("measuring the whole model")
            self.whole_score = _score(self.data, self.model.graph.to_bytes())
        tell("deriving the training step")
        self.training = training_step(self.model, self.recipe)
        self.order = ranks(score(arguments.scorer, architecture, self.model.tensors))
        self.begun = True

    def explanation(self, report: Report) -> Explanation:
        """Where the time of the bundle's training step goes on its board, by what the profile promises."""
        from fedprune_export.explanation import explain

        widths, batch = report.selection.widths, self.recipe.micro_batch
        return explain(self.model, widths, self.recipe, bounds(self.profiles[0], 0), batch=batch)

    def bundle(self, profile: HardwareProfile, out: Path, tell: Callable[[str], None]) -> Report:
        """Write one target's bundle.

        Raises:
            FedpruneError: The model doesn't fit the board, the cut is wrong, or the folder can't be written.
        """
        from fedprune_export.bundle import bundle_files, write_bundle
        from fedprune_export.bundle_folder import is_bundle
        from fedprune_export.parity import parity, try_step
        from fedprune_export.report import Report
        from fedprune_export.report_page import page

        if not self.begun:
            self._begin(tell)
        arguments, model, recipe = self.arguments, self.model, self.recipe
        tell("planning")
        chosen = plan(
            model.architecture,
            profile,
            recipe,
            arguments.samples,
            byte_budget=arguments.bytes_per_round,
            deadline_s=arguments.deadline,
            probe=self.probe,
            densities=DENSITIES if arguments.density is None else (arguments.density,),
        )
        full = model.architecture.sizes
        whole = predict(model.architecture, full, profile, recipe, arguments.samples, probe=self.probe)
        selection = Selection.of(model.architecture, chosen.widths, self.order)
        tell("cutting")
        blocks = self._blocks(profile)
        training, self.memory = self.training, None
        if arguments.memory_limit is not None:
            tell("fitting the training step")
            self.memory = self._within(chosen.widths, arguments.memory_limit)
            training = self.memory.graph.to_bytes()
        files = bundle_files(model, selection, recipe, training=training, opset=arguments.opset, blocks=blocks)
        tell("checking the cut")
        error = parity(model, selection, files)
        tell("trying a training step")
        for name in (TRAINING, *(blocked_file(b) for b in blocks if b == block_size())):
            try_step(model, recipe, files, name)
        trials = self._trials(selection.widths, files, tell)
        for trial in trials:
            files |= trial.files
        sizes = {n: len(raw) for n, raw in files.items()}
        report = Report(
            model,
            selection,
            profile.name,
            chosen,
            whole,
            arguments.scorer,
            sizes,
            error,
            self._accuracy(selection),
            profile.advice,
            trials,
        )
        files["report.json"] = (json.dumps(report.to_dict(), indent=2) + "\n").encode()
        files["report.md"] = report.to_markdown().encode()
        files["report.html"] = page(report).encode()
        if profile.software.tier == "tensorrt":
            files[engine_plan.NAME] = EnginePlan().to_json().encode()
        tell("writing")
        replaces = is_bundle(out)
        write_bundle(out, files, selection, recipe, profile.name, tuple(arguments.class_names))
        if replaces:
            self.replaced.append(out)
        return report

    @property
    def without_blocks(self) -> str:
        """Why there is no step for the blocks that the probe says; empty where a limit of memory is not why."""
        usual = self.arguments.block is None and not self.recipe.ordered_dropout and self.profiles[0].arch == "x86_64"
        if self.arguments.memory_limit is None or self.probe is None or not self.probe.block or not usual:
            return ""
        return f"no step in blocks of {self.probe.block} channels, which --probe says: --memory-limit is for {TRAINING}"

    def _blocks(self, profile: HardwareProfile) -> tuple[int, ...]:
        """For which blocks a target gets a training step: what the command line or its probe says, and no Arm board."""
        if profile.arch != "x86_64" or self.recipe.ordered_dropout or self.arguments.memory_limit is not None:
            return ()
        if self.arguments.block is not None:
            return tuple(self.arguments.block)
        return (self.probe.block,) if self.probe is not None and self.probe.block else ()

    def _within(self, widths: tuple[int, ...], limit: int) -> Fitted:
        """The training step within a limit of memory at a board's widths."""
        from fedprune_export.training import training_graph
        from fedprune_export.training_memory import fitted

        graph = training_graph(self.model, self.recipe.features)
        batch = min(self.recipe.micro_batch, self.arguments.samples)
        return fitted(graph, self.model.architecture, widths, batch, limit)

    def _trials(
        self, widths: tuple[int, ...], files: dict[str, bytes], tell: Callable[[str], None]
    ) -> tuple[Trial, ...]:
        if not self.arguments.precision:
            return ()
        from fedprune_export.precision import Trials

        tell("lowering")
        trials = Trials(self.model, widths, files, self.data)
        return tuple(trials.of(p) for p in self.arguments.precision)

    def _accuracy(self, selection: Selection) -> Accuracy | None:
        if self.data is None:
            return None
        from fedprune_export.cut import cut
        from fedprune_export.report import Accuracy

        small = _score(self.data, cut(self.model, selection).to_bytes())
        return Accuracy(self.data.measure, len(self.data.x), self.whole_score, small)


def _score(data: LabelledData, graph: bytes) -> float:
    session = Session(graph)

    def outputs(x: Array) -> Array:
        try:
            return session.run({X: x})[LOGITS]
        except ModelError as error:
            raise DataError(f"the model doesn't take the samples of --data ({error})") from error

    return data.score(outputs)
