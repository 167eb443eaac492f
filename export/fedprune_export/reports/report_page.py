"""Writes the report of an export as a page: tables of costs, groups and layers, and bars of what is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np

from fedprune import __version__
from fedprune.core.text import amount, first_few
from fedprune.model.architecture import LayerRow
from fedprune.model.selection import Selection
from fedprune.output.chart import share_strip
from fedprune.output.document import Bars, Block, Document, Table
from fedprune.output.page import Bar, stacked_segments
from fedprune.output.tables import Column
from fedprune.planning.width_plan import WidthPlan
from fedprune_export.checks.parity import PARITY_SAMPLES
from fedprune_export.reports.report import LayerCosts, Report

# Figures of `Costs` and `Prediction` by name, with title and unit: rows of the table of costs, in this order.
_FIGURES = (
    ("parameters", "parameters", ""),
    ("forward_macs", "MACs per sample, forward", ""),
    ("training_macs", "MACs per sample, training", ""),
    ("weights_bytes", "weights, which travel once each way", "bytes"),
    ("activation_bytes", "activations per sample, training", "bytes"),
    ("memory_bytes", "peak memory of training, predicted", "bytes"),
    ("inference_bytes", "peak memory of predictions, predicted", "bytes"),
    ("storage_bytes", "storage on the board", "bytes"),
    ("step_s", "a training step, predicted", "s"),
    ("train_s", "training of a round, predicted", "s"),
    ("transfer_s", "transfers of a round, predicted", "s"),
    ("latency_s", "a prediction of one sample, predicted", "s"),
    ("step_j", "energy of a training step, predicted", "J"),
    ("train_j", "energy of a round's training, predicted", "J"),
    ("latency_j", "energy of a prediction, predicted", "J"),
)
# The parts of the predicted memory, in the order of the bar's pieces.
_MEMORY_USES = ("process", "graph", "weights", "activations", "samples")
# Members of a channel group that are named: a residual stream has hundreds.
_MAX_MEMBERS = 40


def _number_columns(*titles: str) -> list[Column]:
    return [Column(title, is_right_aligned=True) for title in titles]


_COST_COLUMNS = [Column(""), *_number_columns("whole model", "this bundle", "kept")]
_GROUP_COLUMNS = [Column("group"), *_number_columns("channels", "kept"), Column("members")]
_WHOLE_AND_CUT = _number_columns("weight", "as cut", "MACs", "as cut", "activations", "as cut")
_LAYER_COLUMNS = [Column("layer"), Column("operator"), *_WHOLE_AND_CUT]
_FILE_COLUMNS = [Column("file"), *_number_columns("size")]
_PARITY_TEXT = (
    "On {} random inputs the bundle differs from the whole model with the pruned channels masked by at most {:.1e} of "
    "the largest output."
)
_CHANNEL_BARS = "One bar per channel group, its channels in the model's own order: filled ones are kept."
_LAYER_BARS = "Output channels of every layer: the pale bar is the whole model, the filled part is kept."
_PRECISION_COLUMNS = (Column("precision"), Column("compared with float32"))


def report_files(report: Report) -> dict[str, bytes]:
    """The report as it is stored in the bundle, by file name."""
    page = _document(report)
    return {
        "report.json": (json.dumps(report.to_dict(), indent=2) + "\n").encode(),
        "report.md": page.to_markdown().encode(),
        "report.html": page.to_html().encode(),
    }


def _document(report: Report) -> Document:
    architecture, widths, plan = report.model.architecture, report.selection.widths, report.plan.width_plan
    lines = [*plan.summary_lines(report.plan.full_prediction.parameters), plan.unbound_line(), *plan.notes]
    warning = f"warning: {plan.warning}" if plan.warning else ""
    groups = [
        (g.name, f"{g.size:,}", f"{w:,}", first_few(architecture.summary(i), max_names=_MAX_MEMBERS))
        for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
    ]
    layers = [_layer_row(*row) for row in report.layers]
    sections: dict[str, Sequence[Block]] = {
        "": (
            f"Limited support: {report.advice}" if report.advice else "",
            _PARITY_TEXT.format(PARITY_SAMPLES, report.parity),
            Table(_COST_COLUMNS, _cost_rows(report), "Costs"),
        ),
        "Plan": (*lines, warning, Bars(_limit_bars(plan), "Limits of the plan", is_listed=True)),
        "Memory in training, predicted": (
            Bars(_memory_bars(report), "Memory in training", _MEMORY_USES, is_listed=True),
        ),
        "Lower precision": (
            Table(_PRECISION_COLUMNS, [(t.lowered.precision, t.describe()) for t in report.trials]),
            tuple(f"warning: {t.warning}" for t in report.trials if t.warning),
        ),
        "Channels": (
            Bars(_channel_bars(report.selection), "Kept channels of every group", caption=_CHANNEL_BARS),
            Table(_GROUP_COLUMNS, groups, summary="Members of the groups"),
        ),
        "Layers": (
            Bars(_layer_bars(report), "Output channels of every layer", caption=_LAYER_BARS),
            Table(_LAYER_COLUMNS, layers, summary="Shapes, MACs and activations of one sample"),
        ),
        "Files": (Table(_FILE_COLUMNS, [(name, amount(size, "bytes")) for name, size in report.sizes.items()]),),
        "Notes of the import": (report.notes,),
    }
    return Document(f"{architecture.name} for {report.target}", _facts(report), sections)


def _facts(report: Report) -> dict[str, str]:
    recipe = report.plan.recipe
    batch_parts = f", in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
    return {
        "Model": report.model.architecture.name,
        "Board": report.target,
        "Batch size": f"{recipe.batch_size}{batch_parts}",
        "Samples on the board": f"{report.plan.samples:,}",
        "Recipe": f"{recipe.optimizer}, learning rate {recipe.lr:g}, loss {recipe.loss}",
        "Channels ranked by": report.scorer,
        "fedprune": __version__,
        "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cost_rows(report: Report) -> list[tuple[str, ...]]:
    rows, (before, after) = [], report.figures
    # A figure is missing where a board's profile lacks it, such as its power.
    for key, title, unit in _FIGURES:
        before_value, after_value = before.get(key), after.get(key)
        if before_value is not None and after_value is not None:
            texts = [amount(n, unit) if unit else f"{round(n):,}" for n in (before_value, after_value)]
            rows.append((title, *texts, f"{after_value / before_value if before_value else 1:.1%}"))
    if report.accuracy is not None:
        title = f"{report.accuracy.measure} on {report.accuracy.samples:,} given samples"
        rows.append((title, *report.accuracy.score_texts(), ""))
    return rows


def _memory_bars(report: Report) -> list[Bar]:
    """Bars of the peak memory of training by its uses: of the whole model and of this bundle."""
    uses = {"whole model": report.plan.full_prediction.memory, "this bundle": report.plan.width_plan.prediction.memory}
    # Both bars have one scale.
    widest = max(use.total for use in uses.values())
    return [
        Bar(
            name,
            stacked_segments([getattr(use, kind) for kind in _MEMORY_USES], widest),
            amount(use.total, "bytes"),
            f"{name}: " + ", ".join(f"{kind} {amount(getattr(use, kind), 'bytes')}" for kind in _MEMORY_USES),
        )
        for name, use in uses.items()
    ]


def _limit_bars(plan: WidthPlan) -> list[Bar]:
    """One bar per limit, filled by the submodel's need."""
    return [
        Bar(
            f"{limit.name} (binds)" if limit.name == plan.bound else limit.name,
            (("part two" if limit.name == plan.bound else "held", 0.0, min(1.0, limit.used_share)),),
            limit.describe().partition(": ")[2],
        )
        for limit in plan.limits
    ]


def _channel_bars(selection: Selection) -> list[Bar]:
    """One bar per channel group, its kept channels filled, in the model's own order."""
    architecture, bars = selection.architecture, []
    for i, (group, width) in enumerate(zip(architecture.groups, selection.widths, strict=True)):
        # Ranks list the best channels first; the bar shows them where they are in the model.
        is_kept = np.zeros(group.size)
        is_kept[selection.ranks[i][:width]] = 1
        members = architecture.summary(i)
        first = members[0].partition("[")[0].removesuffix(".weight") if members else ""
        bars.append(
            Bar(
                f"{group.name} {first}",
                (share_strip(group.name, is_kept),),
                f"{width:,} of {group.size:,}",
                f"{group.name}: {', '.join(members[:8])}",
            )
        )
    return bars


def _layer_bars(report: Report) -> list[Bar]:
    """One bar per layer: as long as its output channels, the kept part filled."""
    # Products of two activations have no channels of their own.
    sizes = [
        (layer, _output_channels(layer, whole), _output_channels(layer, cut))
        for layer, whole, cut in report.layers
        if whole.shape is not None
    ]
    widest = max((full for _, full, _ in sizes), default=1)
    return [
        Bar(
            layer.weight.removesuffix(".weight"),
            (("whole", 0.0, full / widest), ("held", 0.0, now / widest)),
            f"{full:,} → {now:,}" if now != full else f"{full:,}",
            f"{layer.name} ({layer.weight})",
        )
        for layer, full, now in sizes
    ]


def _output_channels(layer: LayerRow, costs: LayerCosts) -> int:
    return costs.shape[layer.output_axis] if costs.shape else 1


def _layer_row(layer: LayerRow, before: LayerCosts, after: LayerCosts) -> tuple[str, ...]:
    shapes = (" × ".join(map(str, s.shape)) if s.shape is not None else "–" for s in (before, after))
    macs = (f"{s.macs:,}" for s in (before, after))
    return (
        layer.weight or layer.name,
        layer.op,
        *shapes,
        *macs,
        *(amount(s.activation_bytes, "bytes") for s in (before, after)),
    )
