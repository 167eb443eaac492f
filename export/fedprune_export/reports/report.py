"""Reports on an export: costs before and after, the plan, and how exact the cut is, as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.model.architecture import LayerRow
from fedprune.model.selection import Selection
from fedprune.planning.costs import FLOAT, Costs, costs_at, layer_macs
from fedprune.planning.prediction import Prediction
from fedprune.runtime import session
from fedprune_export.bundles.board_plan import BoardPlan
from fedprune_export.checks.parity import PARITY_SAMPLES
from fedprune_export.precision import PrecisionTrial
from fedprune_export.pruning.model import Model


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
        step_notes: What the training step doesn't do.
        trials: The lower precisions that the bundle has, too.
    """

    model: Model
    plan: BoardPlan
    selection: Selection
    scorer: str
    sizes: Mapping[str, int]
    parity: float
    folder: Path
    step_notes: tuple[str, ...] = ()
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
        """The import's changes, the parts that it could not analyse, and what no step trains."""
        return self.model.notes + self.step_notes

    @cached_property
    def figures(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Figures of the whole model and of the bundle, by name."""
        architecture = self.model.architecture
        return (
            _figure_values(self.plan.full_prediction, costs_at(architecture, architecture.sizes)),
            _figure_values(self.plan.width_plan.prediction, costs_at(architecture, self.selection.widths)),
        )

    @cached_property
    def layers(self) -> tuple[tuple[LayerRow, LayerCosts, LayerCosts], ...]:
        """All layers that take time, with their costs whole and as cut, in the model's order."""
        architecture = self.model.architecture
        full, cut = self._layer_costs(architecture.sizes), self._layer_costs(self.selection.widths)
        return tuple(zip(architecture.layers, full, cut, strict=True))

    def _layer_costs(self, widths: tuple[int, ...]) -> list[LayerCosts]:
        architecture = self.model.architecture
        shapes = architecture.shapes(widths)
        return [
            LayerCosts(
                shapes.get(layer.weight),
                layer_macs(architecture, layer, widths, shapes),
                FLOAT * layer.output_volume.size(widths, architecture.sizes),
            )
            for layer in architecture.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        architecture, widths = self.model.architecture, self.selection.widths
        before, after = self.figures
        return {
            "format": "fedprune.report/1",
            "fedprune": __version__,
            "onnxruntime": session.onnxruntime_version(),
            "model": architecture.name,
            "target": self.target,
            "advice": self.advice,
            "scorer": self.scorer,
            "before": before,
            "after": after,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "groups": [
                {"name": g.name, "channels": g.size, "kept": w, "members": list(architecture.members(i))}
                for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
            ],
            "layers": [
                {"name": r.name, "op": r.op, "weight": r.weight, "before": whole.to_dict(), "after": cut.to_dict()}
                for r, whole, cut in self.layers
            ],
            "plan": self.plan.width_plan.to_dict(),
            "parity": {"samples": PARITY_SAMPLES, "max_relative_error": self.parity},
            "precisions": [t.to_dict() for t in self.trials],
            "files": dict(self.sizes),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        before, after = self.figures
        lines = [f"replaced: the bundle that was in {self.folder}"] if self.replaced else []
        lines += [
            str(self.plan),
            f"parameters: {before['parameters']:,} -> {after['parameters']:,}",
            f"MACs per sample: {before['forward_macs']:,} -> {after['forward_macs']:,}",
            f"weights: {before['weights_bytes']:,} -> {after['weights_bytes']:,} bytes",
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


def _figure_values(prediction: Prediction, costs: Costs) -> dict[str, Any]:
    """Counted and predicted figures, without those for which the board's profile lacks a base."""
    values = {k: v for k, v in asdict(prediction).items() if isinstance(v, (int, float))}
    return {"weights_bytes": values.pop("wire_bytes"), "activation_bytes": costs.kept_bytes, **values}
