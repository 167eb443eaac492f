"""The export of a model to one board: cut, checked, and written with its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType

from fedprune.core.validation import check_instance, check_texts
from fedprune.model.selection import Selection
from fedprune.runtime import tensorrt_config
from fedprune.runtime.bundle_folder import is_bundle, write_bundle
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune.strategies.importance.scoring import channel_scores, rank_channels
from fedprune_export.bundles.board_plan import BoardPlan
from fedprune_export.bundles.bundle import bundle_files
from fedprune_export.checks.labelled_data import LabelledData
from fedprune_export.checks.labelled_file import load_scored_data
from fedprune_export.checks.parity import check_parity, try_step
from fedprune_export.precision import PrecisionTrials
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from fedprune_export.reports.report import Accuracy, Report
from fedprune_export.reports.report_page import report_files
from fedprune_export.training.step_graph import training_step, unreached_notes


def export(
    model: Model,
    plan: BoardPlan,
    folder: str | Path,
    *,
    scorer: str | None = None,
    data: str | Path | LabelledData | None = None,
    precisions: Sequence[str] = (),
    opset: int | None = None,
    class_names: Sequence[str] = (),
) -> Report:
    """Write the bundle of one board, after checking that it computes what the whole model does.

    Args:
        plan: How wide it is on the board; see `fedprune_export.plan`.
        folder: Where to write; it is made, or must be empty or hold a bundle for the same board, which is replaced.
        scorer: How channels are ranked: "magnitude" or "ordered"; by default as the fleet that trained the model cut
            it, where the model has these ranks, else by magnitude.
        data: Samples to measure the model on, whole and as cut: a `.npz` file with x and y.
        precisions: Lower precisions to predict at, too: "float16", "int8" (which needs `data`, or a model that
            was read from a quantised file).
        opset: Opset of the inference graph; by default one that every supported onnxruntime loads.
        class_names: Names of the classes; by default those of the model's folder, if it has them.

    Raises:
        ConfigError: An argument is of another type, or there is no such scorer.
        ModelError: The model can't be trained, or the cut computes something else.
        DataError: The samples can't be read or don't fit the model.
        BundleError: The folder holds something else.
        StorageError: The folder can't be written.
    """
    check_instance("model", model, Model, "a model from fedprune_export.load")
    check_instance("plan", plan, BoardPlan, "a plan from fedprune_export.plan")
    check_instance("folder", folder, (str, Path), "the path of a folder")
    check_instance("data", data, (str, Path, LabelledData, NoneType), "a .npz file, or LabelledData")
    precisions, class_names = check_texts("precisions", precisions), check_texts("class_names", class_names)
    folder, recipe, profile = Path(folder), plan.recipe, plan.profile
    if isinstance(data, (str, Path)):
        data = load_scored_data(Path(data), model, recipe)
    if scorer is None and model.ranks is not None:
        ranking, ranked_by = model.ranks, "the fleet that trained the model"
    else:
        ranked_by = scorer or "magnitude"
        ranking = rank_channels(channel_scores(ranked_by, model.architecture, model.tensors))
    selection = Selection.of(model.architecture, plan.widths, ranking)
    # All checks come before anything is written: a bundle that computes something else never exists.
    step = training_step(model, recipe.features, plan.unit)
    files = bundle_files(model, selection, recipe, training=step.to_bytes(), opset=opset)
    parity = check_parity(model, selection, files)
    try_step(model, recipe, files)
    trials = tuple(map(PrecisionTrials(model, selection.widths, files, data).run, precisions)) if precisions else ()
    for trial in trials:
        files |= trial.files
    accuracy = None
    if data is not None:
        before = data.score_of(model.graph) if data.full_score is None else data.full_score
        accuracy = Accuracy(data.score_name, len(data.x), before, data.score_of(cut(model, selection)))
    report = Report(
        model=model,
        plan=plan,
        selection=selection,
        scorer=ranked_by,
        sizes={n: len(raw) for n, raw in files.items()},
        parity=parity.value,
        accuracy=accuracy,
        trials=trials,
        folder=folder,
        step_notes=(*unreached_notes(step.metadata), *parity.notes),
        replaced=is_bundle(folder),
    )
    files |= report_files(report)
    if profile.software.tier == "tensorrt":
        files[tensorrt_config.ENGINE_PLAN_FILE] = EnginePlan().to_json().encode()
    write_bundle(folder, files, selection, recipe, profile.name, class_names or model.class_names)
    return report
