"""The report of an export: costs before and after, the plan, and how exact the cut is, as text, JSON and pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fedprune import __version__
from fedprune.core.text import amount, first_few
from fedprune.model.architecture import Architecture, LayerRow
from fedprune.model.selection import Selection
from fedprune.output.chart import share_strip
from fedprune.output.document import Bars, Block, Document, Table
from fedprune.output.page import Bar, stacked_segments
from fedprune.output.tables import Column
from fedprune.planning.costs import FLOAT, Costs, costs_at, layer_macs
from fedprune.planning.prediction import Prediction
from fedprune.planning.width_plan import WidthPlan
from fedprune.runtime import session
from fedprune_export.bundles.board_plan import BoardPlan
from fedprune_export.checks.parity import PARITY_SAMPLES
from fedprune_export.precision import PrecisionTrial
from fedprune_export.pruning.model import Model

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

_COST_COLUMNS = (
    Column(""),
    *(Column(title, is_right_aligned=True) for title in ("whole model", "this bundle", "kept")),
)
_GROUP_COLUMNS = (
    Column("group"),
    Column("channels", is_right_aligned=True),
    Column("kept", is_right_aligned=True),
    Column("members"),
)
_LAYER_COLUMNS = (
    Column("layer"),
    Column("operator"),
    *(Column(title, is_right_aligned=True) for what in ("weight", "MACs", "activations") for title in (what, "as cut")),
)
_PARITY_TEXT = (
    "On {} random inputs the bundle differs from the whole model with the pruned channels masked by at most {:.1e} of "
    "the largest output."
)
_CHANNEL_BARS = "One bar per channel group, its channels in the model's own order: filled ones are kept."
_LAYER_BARS = "Output channels of every layer: the pale bar is the whole model, the filled part is kept."
_PRECISION_COLUMNS = (Column("precision"), Column("compared with float32"))
_FILE_COLUMNS = (Column("file"), Column("size", is_right_aligned=True))


@dataclass(frozen=True)
class Accuracy:
    """The model's scores on given data before any training, whole and as cut.

    Attributes:
        measure: The name of the score; of an error less is better.
    """

    measure: str
    samples: int
    before: float
    after: float

    def score_texts(self) -> tuple[str, str]:
        form = ".1%" if "accuracy" in self.measure else ".4g"
        return f"{self.before:{form}}", f"{self.after:{form}}"


@dataclass(frozen=True)
class LayerCosts:
    """The costs of a layer, whole or as cut.

    Attributes:
        shape: The weight's shape; None where two values are multiplied.
        macs: MACs of one sample's forward pass.
        activation_bytes: Bytes of its output for one sample.
    """

    shape: tuple[int, ...] | None
    macs: int
    activation_bytes: int

    def to_dict(self) -> dict[str, Any]:
        parameters = 0 if self.shape is None else prod(self.shape)
        return {**asdict(self), "shape": list(self.shape or ()), "parameters": parameters}


@dataclass(frozen=True, repr=False)
class Report:
    """The files of an export and their cost on the board; prints as text.

    Attributes:
        plan: The widths with their reasons, and how the board trains.
        parity: Largest difference between the bundle's outputs and those of the whole model with the pruned channels
            masked, relative to the largest output.
        trials: The lower precisions that the bundle has, too.
    """

    model: Model
    plan: BoardPlan
    selection: Selection
    scorer: str
    sizes: Mapping[str, int]
    parity: float
    folder: Path
    accuracy: Accuracy | None = None
    trials: tuple[PrecisionTrial, ...] = ()
    replaced: bool = False

    @property
    def target(self) -> str:
        return self.plan.profile.name

    @property
    def advice(self) -> str:
        """Advice for a board with limited support; empty for others."""
        return self.plan.profile.advice

    @property
    def notes(self) -> tuple[str, ...]:
        """The import's changes, and the parts that it could not analyse."""
        return self.model.notes

    @cached_property
    def full_costs(self) -> Costs:
        return costs_at(self.model.architecture, self.model.architecture.sizes)

    @cached_property
    def cut_costs(self) -> Costs:
        return costs_at(self.model.architecture, self.selection.widths)

    @cached_property
    def layers(self) -> tuple[tuple[LayerRow, LayerCosts, LayerCosts], ...]:
        """All layers that take time, with their costs whole and as cut, in the model's order."""
        architecture = self.model.architecture
        return tuple(
            (layer, self._layer_costs(layer, architecture.sizes), self._layer_costs(layer, self.selection.widths))
            for layer in architecture.layers
        )

    def _layer_costs(self, layer: LayerRow, widths: tuple[int, ...]) -> LayerCosts:
        architecture, shapes = self.model.architecture, self.model.architecture.shapes(widths)
        makes = FLOAT * layer.output_volume.size(widths, architecture.sizes)
        return LayerCosts(shapes.get(layer.weight), layer_macs(architecture, layer, widths, shapes), makes)

    def to_dict(self) -> dict[str, Any]:
        architecture, widths = self.model.architecture, self.selection.widths
        return {
            "format": "fedprune.report/1",
            "fedprune": __version__,
            "onnxruntime": session.onnxruntime_version(),
            "model": architecture.name,
            "target": self.target,
            "advice": self.advice,
            "scorer": self.scorer,
            "before": _figure_values(self.full_costs, self.plan.full_prediction),
            "after": _figure_values(self.cut_costs, self.plan.width_plan.prediction),
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "groups": [
                {"name": g.name, "channels": g.size, "kept": w, "members": list(architecture.members(i))}
                for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
            ],
            "layers": [
                {"name": r.name, "op": r.op, "weight": r.weight, "before": before.to_dict(), "after": after.to_dict()}
                for r, before, after in self.layers
            ],
            "plan": self.plan.width_plan.to_dict(),
            "parity": {"samples": PARITY_SAMPLES, "max_relative_error": self.parity},
            "precisions": [t.to_dict() for t in self.trials],
            "files": dict(self.sizes),
            "notes": list(self.notes),
        }

    def files(self) -> dict[str, bytes]:
        """The report as it is stored in the bundle, by file name."""
        page = self.document()
        return {
            "report.json": (json.dumps(self.to_dict(), indent=2) + "\n").encode(),
            "report.md": page.to_markdown().encode(),
            "report.html": page.to_html().encode(),
        }

    def __str__(self) -> str:
        before, after = self.full_costs, self.cut_costs
        lines = [f"replaced: the bundle that was in {self.folder}"] if self.replaced else []
        lines += [
            str(self.plan),
            f"parameters: {before.parameters:,} -> {after.parameters:,}",
            f"MACs per sample: {before.forward_macs:,} -> {after.forward_macs:,}",
            f"weights: {before.wire_bytes:,} -> {after.wire_bytes:,} bytes",
        ]
        if self.accuracy is not None:
            a, scores = self.accuracy, " -> ".join(self.accuracy.score_texts())
            lines.append(f"{a.measure} on {a.samples:,} samples, before local training: {scores}")
        lines.append(f"parity with the masked model: {self.parity:.1e}")
        lines += [f"{t.lowered.precision}: {t.describe()}" for t in self.trials]
        lines += [f"warning: {t.warning}" for t in self.trials if t.warning]
        lines += [f"limited support: {self.advice}"] if self.advice else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"bundle: {self.folder} (report.html says more)"])

    __repr__ = __str__

    def document(self) -> Document:
        architecture, widths, plan = self.model.architecture, self.selection.widths, self.plan.width_plan
        lines = [*plan.summary_lines(self.full_costs.parameters), plan.unbound_line(), *plan.notes]
        warning = f"warning: {plan.warning}" if plan.warning else ""
        groups = [
            (g.name, f"{g.size:,}", f"{w:,}", first_few(architecture.summary(i), max_names=_MAX_MEMBERS))
            for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
        ]
        sections: dict[str, Sequence[Block]] = {
            "": (
                f"Limited support: {self.advice}" if self.advice else "",
                _PARITY_TEXT.format(PARITY_SAMPLES, self.parity),
                Table(_COST_COLUMNS, self._cost_rows(), "Costs"),
            ),
            "Plan": (*lines, warning, Bars(limit_bars(plan), "Limits of the plan", is_listed=True)),
            "Memory in training, predicted": (
                Bars(self._memory_bars(), "Memory in training", _MEMORY_USES, is_listed=True),
            ),
            "Lower precision": (
                Table(_PRECISION_COLUMNS, [(t.lowered.precision, t.describe()) for t in self.trials]),
                tuple(f"warning: {t.warning}" for t in self.trials if t.warning),
            ),
            "Channels": (
                Bars(channel_bars(self.selection), "Kept channels of every group", caption=_CHANNEL_BARS),
                Table(_GROUP_COLUMNS, groups, summary="Members of the groups"),
            ),
            "Layers": (
                Bars(layer_bars(architecture, widths), "Output channels of every layer", caption=_LAYER_BARS),
                Table(
                    _LAYER_COLUMNS,
                    [_layer_row(*row) for row in self.layers],
                    "",
                    "Shapes, MACs and activations of one sample",
                ),
            ),
            "Files": (Table(_FILE_COLUMNS, [(name, amount(size, "bytes")) for name, size in self.sizes.items()]),),
            "Notes of the import": (self.notes,),
        }
        return Document(f"{architecture.name} for {self.target}", self._facts(), sections)

    def _facts(self) -> dict[str, str]:
        recipe = self.plan.recipe
        batch_parts = f", in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
        return {
            "Model": self.model.architecture.name,
            "Board": self.target,
            "Batch size": f"{recipe.batch_size}{batch_parts}",
            "Samples on the board": f"{self.plan.samples:,}",
            "Recipe": f"{recipe.optimizer}, learning rate {recipe.lr:g}, loss {recipe.loss}",
            "Channels ranked by": self.scorer,
            "fedprune": __version__,
            "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }

    def _cost_rows(self) -> list[tuple[str, ...]]:
        before = _figure_values(self.full_costs, self.plan.full_prediction)
        after = _figure_values(self.cut_costs, self.plan.width_plan.prediction)
        rows = []
        # A figure is missing where a board's profile lacks it, such as its power.
        for key, title, unit in _FIGURES:
            before_value, after_value = before.get(key), after.get(key)
            if before_value is not None and after_value is not None:
                texts = [amount(n, unit) if unit else f"{round(n):,}" for n in (before_value, after_value)]
                rows.append((title, *texts, f"{after_value / before_value if before_value else 1:.1%}"))
        if self.accuracy is not None:
            title = f"{self.accuracy.measure} on {self.accuracy.samples:,} given samples"
            rows.append((title, *self.accuracy.score_texts(), ""))
        return rows

    def _memory_bars(self) -> list[Bar]:
        """Bars of the peak memory of training by its uses: of the whole model and of this bundle."""
        uses = {"whole model": self.plan.full_prediction.memory, "this bundle": self.plan.width_plan.prediction.memory}
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


def limit_bars(plan: WidthPlan) -> list[Bar]:
    """One bar per limit, filled by the submodel's need."""
    return [
        Bar(
            f"{limit.name} (binds)" if limit.name == plan.bound else limit.name,
            (("part two" if limit.name == plan.bound else "held", 0.0, min(1.0, limit.overshoot)),),
            limit.describe().partition(": ")[2],
        )
        for limit in plan.limits
    ]


def channel_bars(selection: Selection) -> list[Bar]:
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


def layer_bars(architecture: Architecture, widths: Sequence[int]) -> list[Bar]:
    """One bar per layer: as long as its output channels, the kept part filled."""
    # Products of two activations have no channels of their own.
    layers = [layer for layer in architecture.layers if layer.weight in architecture.by_name]
    sizes = [_output_channels(architecture, widths, layer) for layer in layers]
    widest = max((full for full, _ in sizes), default=1)
    return [
        Bar(
            layer.weight.removesuffix(".weight"),
            (("whole", 0.0, full / widest), ("held", 0.0, now / widest)),
            f"{full:,} → {now:,}" if now != full else f"{full:,}",
            f"{layer.name} ({layer.weight})",
        )
        for layer, (full, now) in zip(layers, sizes, strict=True)
    ]


def _output_channels(architecture: Architecture, widths: Sequence[int], layer: LayerRow) -> tuple[int, int]:
    """Output channels of a layer at full width and as cut."""
    axes = architecture.by_name[layer.weight].axes
    if not axes:
        return 1, 1
    axis = axes[layer.output_axis]
    return axis.length, axis.size(widths, architecture.sizes)


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


def _figure_values(costs: Costs, prediction: Prediction) -> dict[str, Any]:
    predicted_values = {k: v for k, v in asdict(prediction).items() if isinstance(v, (int, float))}
    counted_names = ("parameters", "forward_macs", "training_macs", "wire_bytes")
    return {
        "parameters": costs.parameters,
        "forward_macs": costs.forward_macs,
        "training_macs": costs.training_macs,
        "weights_bytes": costs.wire_bytes,
        "activation_bytes": costs.kept_bytes,
        **{k: v for k, v in predicted_values.items() if k not in counted_names},
    }
