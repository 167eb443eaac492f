"""What an export does: a model is imported once, then planned, cut, checked and written for every board."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune.core.errors import BundleError, DataError, ModelError, UsageError
from fedprune.hardware import profile_store
from fedprune.hardware.probe_report import ProbeReport
from fedprune.hardware.profile import HardwareProfile
from fedprune.importance.scoring import ranks, score
from fedprune.model.selection import Selection
from fedprune.planning.cost_prediction import TOO_LOW, predict
from fedprune.planning.plan import DENSITIES, plan
from fedprune.runtime import tensorrt_config
from fedprune.runtime.blocks import block_size, turned_off
from fedprune.runtime.bundle import TRAINING, blocked_file
from fedprune.runtime.precision import INT8
from fedprune.runtime.session import Array, Session
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune.training.recipe import Recipe
from fedprune.training.step_contract import LOGITS, X
from fedprune_export.cli.explain import bounds
from fedprune_export.cli.options import labels_of, read_model, read_probe, read_recipe, targets

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.checks.labelled_data import LabelledData
    from fedprune_export.precision import Trial
    from fedprune_export.profiling.roofline import Explanation
    from fedprune_export.pruning.model import Model
    from fedprune_export.reports.report import Accuracy, Report
    from fedprune_export.training.memory import Fitted


class ExportJob:
    """What all targets of an export share; the model is imported when the first one needs it.

    Args:
        arguments: The command line, with all that `fedprune_export.cli.export.add_arguments` names.

    Attributes:
        begun: Whether the model could be imported and trained.
        memory: How the last bundle's training step was fitted to a limit of memory; None without a limit.
        replaced: Folders whose bundles were replaced.

    Raises:
        UsageError: The command line contradicts itself.
        FedpruneError: A profile, the recipe or the probe can't be read, or a folder is not for bundles.
    """

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
        from fedprune.runtime.bundle_folder import check_folder, is_bundle

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
        from fedprune_export.bundles.bundle import training_step
        from fedprune_export.checks import labelled_data

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
        self._training = {self.recipe.features: training_step(self.model, self.recipe)}
        self.order = ranks(score(arguments.scorer, architecture, self.model.tensors))
        self.begun = True

    def explanation(self, report: Report) -> Explanation:
        """Where the time of the bundle's training step goes on its board, by what the profile promises."""
        from fedprune_export.profiling.roofline import explain

        recipe, widths = self.recipe.in_parts(report.plan.accumulate), report.selection.widths
        return explain(self.model, widths, recipe, bounds(self.profiles[0], 0), batch=recipe.micro_batch)

    def bundle(self, profile: HardwareProfile, out: Path, tell: Callable[[str], None]) -> Report:
        """Write one target's bundle.

        Raises:
            FedpruneError: The model doesn't fit the board, the cut is wrong, or the folder can't be written.
        """
        from fedprune.runtime.bundle_folder import is_bundle, write_bundle
        from fedprune_export.bundles.bundle import bundle_files, training_step
        from fedprune_export.checks.parity import parity, try_step
        from fedprune_export.reports.page import page
        from fedprune_export.reports.report import Report

        if not self.begun:
            self._begin(tell)
        arguments, model = self.arguments, self.model
        tell("planning")
        chosen = plan(
            model.architecture,
            profile,
            self.recipe,
            arguments.samples,
            byte_budget=arguments.bytes_per_round,
            deadline_s=arguments.deadline,
            probe=self.probe,
            densities=DENSITIES if arguments.density is None else (arguments.density,),
            frozen=model.frozen,
            margin=TOO_LOW if self.probe is None else 0.0,
        )
        recipe, full = self.recipe.in_parts(chosen.accumulate), model.architecture.sizes
        whole = predict(
            model.architecture, full, profile, recipe, arguments.samples, probe=self.probe, frozen=model.frozen
        )
        selection = Selection.of(model.architecture, chosen.widths, self.order)
        tell("cutting")
        blocks = self._blocks(profile)
        if recipe.features not in self._training:
            self._training[recipe.features] = training_step(model, recipe)
        training, self.memory = self._training[recipe.features], None
        if arguments.memory_limit is not None:
            tell("fitting the training step")
            self.memory = self._within(chosen.widths, recipe, arguments.memory_limit)
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
            recipe,
            arguments.samples,
        )
        files["report.json"] = (json.dumps(report.to_dict(), indent=2) + "\n").encode()
        files["report.md"] = report.to_markdown().encode()
        files["report.html"] = page(report).encode()
        if profile.software.tier == "tensorrt":
            files[tensorrt_config.NAME] = EnginePlan().to_json().encode()
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

    def _within(self, widths: tuple[int, ...], recipe: Recipe, limit: int) -> Fitted:
        """The training step within a limit of memory at a board's widths."""
        from fedprune_export.training.memory import fitted
        from fedprune_export.training.step_graph import training_graph

        graph = training_graph(self.model, recipe.features)
        batch = min(recipe.micro_batch, self.arguments.samples)
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
        from fedprune_export.pruning.cut import cut
        from fedprune_export.reports.report import Accuracy

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
