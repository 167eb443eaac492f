"""What an export did, for people and programs: costs before and after, the plan, how exact the cut is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.core.text import amount
from fedprune.costs.costs import FLOAT, Costs, costs_at, layer_macs
from fedprune.model.selection import Selection
from fedprune.planning.cost_prediction import Prediction
from fedprune.runtime import session
from fedprune.runtime.bundle import TRAINING
from fedprune_export.bundles.board_plan import BoardPlan
from fedprune_export.checks.parity import SAMPLES
from fedprune_export.precision import Trial
from fedprune_export.pruning.model import Model
from fedprune_export.training.memory import Fitted


@dataclass(frozen=True)
class Accuracy:
    """How well the model does on given data before any training, whole and as cut.

    Attributes:
        measure: What was computed, in words; of an error less is better.
        samples: On how many samples.
        before: Of the whole model.
        after: Of the submodel.
    """

    measure: str
    samples: int
    before: float
    after: float


@dataclass(frozen=True)
class LayerRow:
    """A layer before and after.

    Attributes:
        name: Its node.
        op: Its operator.
        weight: Its weight tensor; empty where two values are multiplied.
        shapes: The weight's shape at full width and as cut; None without a weight.
        macs: MACs of one sample's forward pass, at full width and as cut.
        activation_bytes: What it makes of one sample, at full width and as cut.
    """

    name: str
    op: str
    weight: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    macs: tuple[int, int]
    activation_bytes: tuple[int, int]

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers in the weight, at full width and as cut."""
        before, after = (prod(s) if s is not None else 0 for s in self.shapes)
        return before, after

    @property
    def title(self) -> str:
        """What people know it by: its weight, else its node."""
        return self.weight or self.name

    def shown(self) -> tuple[str, str]:
        """The weight's shapes, for people."""
        before, after = (" × ".join(map(str, s)) if s is not None else "–" for s in self.shapes)
        return before, after


@dataclass(frozen=True)
class Figure:
    """A row of the table of costs.

    Attributes:
        key: Its name in `report.json`.
        title: What it is.
        unit: bytes, s, J, or "" for a number.
        before: Of the whole model.
        after: Of the submodel.
    """

    key: str
    title: str
    unit: str
    before: float
    after: float

    @property
    def kept(self) -> str:
        """What is left, in percent."""
        return f"{self.after / self.before if self.before else 1:.1%}"

    def shown(self) -> tuple[str, str]:
        """Before and after, for people."""
        if self.unit == "bytes":
            return amount(self.before, "bytes"), amount(self.after, "bytes")
        if not self.unit:
            return f"{round(self.before):,}", f"{round(self.after):,}"
        return amount(self.before, self.unit), amount(self.after, self.unit)


@dataclass(frozen=True, repr=False)
class Report:
    """What an export wrote, and what it costs the board; prints as text.

    Attributes:
        model: The whole model.
        plan: Why the submodel is as wide as it is, and how the board trains it.
        selection: What the bundle holds of the model.
        scorer: How channels were ranked.
        sizes: Bytes of every file.
        parity: Largest difference between the bundle's outputs and those of the whole model with the lost channels
            masked, relative to the largest output.
        folder: Where the bundle was written.
        accuracy: On given data, if any was given.
        trials: The lower precisions that the bundle has, too.
        memory: How the training step was fitted to a memory limit, if there was one.
        skipped_blocks: Blocks of channels that got no training step because of the memory limit.
        replaced: Whether another bundle was in the folder.
    """

    model: Model
    plan: BoardPlan
    selection: Selection
    scorer: str
    sizes: Mapping[str, int]
    parity: float
    folder: Path
    accuracy: Accuracy | None = None
    trials: tuple[Trial, ...] = ()
    memory: Fitted | None = None
    skipped_blocks: tuple[int, ...] = ()
    replaced: bool = False

    @property
    def target(self) -> str:
        """Name of the hardware profile."""
        return self.plan.profile.name

    @property
    def advice(self) -> str:
        """What to do on a board of the second tier; empty on others."""
        return self.plan.profile.advice

    @property
    def notes(self) -> tuple[str, ...]:
        """What the import changed or could not analyse."""
        return self.model.notes

    @property
    def before(self) -> Costs:
        """Costs of the whole model."""
        return costs_at(self.model.architecture, self.model.architecture.sizes)

    @property
    def after(self) -> Costs:
        """Costs of the submodel."""
        return costs_at(self.model.architecture, self.selection.widths)

    def facts(self) -> dict[str, str]:
        """The header: what was exported, for which board, trained how, by which version."""
        recipe, samples = self.plan.recipe, self.plan.samples
        parts = f", in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
        return {
            "Model": self.model.architecture.name,
            "Board": self.target,
            "Batch size": f"{recipe.batch_size}{parts}",
            "Samples on the board": f"{samples:,}",
            "Recipe": f"{recipe.optimizer}, learning rate {recipe.lr:g}, loss {recipe.loss}",
            "Channels ranked by": self.scorer,
            "fedprune": __version__,
            "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }

    def figures(self) -> tuple[Figure, ...]:
        """The table of costs, as far as they are known."""
        before, after = _figures(self.before, self.plan.whole), _figures(self.after, self.plan.chosen.prediction)
        return tuple(
            Figure(key, title, unit, before[key], after[key])
            for key, title, unit in _TITLES
            if before.get(key) is not None and after.get(key) is not None
        )

    def plan_text(self) -> str:
        """The plan in lines for people, with what it gained over uniform width."""
        plan = self.plan.chosen
        warning = plan.warning and f"warning: {plan.warning}"
        return "\n".join(filter(None, (plan.describe(self.before.parameters), plan.gains(), warning)))

    def layers(self) -> tuple[LayerRow, ...]:
        """Everything that takes time, before and after, in the model's order."""
        architecture, widths = self.model.architecture, self.selection.widths
        full = {t.name: t.shape for t in architecture.tensors}
        now = self.selection.shapes()
        rows = []
        for layer in architecture.layers:
            before, after = (
                (layer_macs(architecture, layer, w, shapes), FLOAT * layer.makes.size(w, architecture.sizes))
                for w, shapes in ((architecture.sizes, full), (widths, now))
            )
            shapes = full.get(layer.weight), now.get(layer.weight)
            rows.append(
                LayerRow(
                    layer.name,
                    layer.op,
                    layer.weight,
                    shapes,
                    macs=(before[0], after[0]),
                    activation_bytes=(before[1], after[1]),
                )
            )
        return tuple(rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        architecture, widths = self.model.architecture, self.selection.widths
        return {
            "format": "fedprune.report/1",
            "fedprune": __version__,
            "onnxruntime": session.version(),
            "model": architecture.name,
            "target": self.target,
            "advice": self.advice,
            "scorer": self.scorer,
            "before": _figures(self.before, self.plan.whole),
            "after": _figures(self.after, self.plan.chosen.prediction),
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "groups": [
                {"name": g.name, "channels": g.size, "kept": w, "members": list(architecture.members(i))}
                for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
            ],
            "layers": [
                {
                    "name": r.name,
                    "op": r.op,
                    "weight": r.weight,
                    **{side: _layer_figures(r, i) for i, side in enumerate(("before", "after"))},
                }
                for r in self.layers()
            ],
            "plan": self.plan.chosen.to_dict(),
            "parity": {"samples": SAMPLES, "max_relative_error": self.parity},
            "precisions": [t.to_dict() for t in self.trials],
            "files": dict(self.sizes),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        before, after = self.before, self.after
        lines = [f"replaced: the bundle that was in {self.folder}"] if self.replaced else []
        lines += [] if self.memory is None else [self.memory.describe()]
        lines += [
            f"no step in blocks of {b} channels, which --probe says: --memory-limit is for {TRAINING}"
            for b in self.skipped_blocks
        ]
        lines += [
            str(self.plan),
            f"parameters: {before.parameters:,} -> {after.parameters:,}",
            f"MACs per sample: {before.forward_macs:,} -> {after.forward_macs:,}",
            f"weights: {before.wire_bytes:,} -> {after.wire_bytes:,} bytes",
        ]
        if self.accuracy is not None:
            a = self.accuracy
            shares = f"{score(a, a.before)} -> {score(a, a.after)}"
            lines.append(f"{a.measure} on {a.samples:,} samples, untrained: {shares}")
        lines.append(f"parity with the masked model: {self.parity:.1e}")
        lines += [f"{t.lowered.precision}: {t.describe()}" for t in self.trials]
        lines += [f"second tier: {self.advice}"] if self.advice else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"bundle: {self.folder} (report.html says more)"])

    __repr__ = __str__

    def _precisions(self) -> list[str]:
        """The section on lower precisions, if there are any."""
        lines = [f"- **{t.lowered.precision}**: {_line(t.describe())}" for t in self.trials]
        return ["## Lower precision", "", *lines, ""] if lines else []

    def to_markdown(self) -> str:
        """As a page to read."""
        architecture, widths = self.model.architecture, self.selection.widths
        lines = [
            f"# {architecture.name} for {self.target}",
            "",
            *((f"Second tier: {_line(self.advice)}", "") if self.advice else ()),
            "| | whole model | this bundle | kept |",
            "|---|---:|---:|---:|",
            *(f"| {f.title} | {f.shown()[0]} | {f.shown()[1]} | {f.kept} |" for f in self.figures()),
            "",
            ", ".join(f"{k}: {v}" for k, v in self.facts().items() if v),
            "",
        ]
        if self.accuracy is not None:
            a = self.accuracy
            lines += [
                f"On {a.samples:,} given samples, before any training: {a.measure}",
                f"{score(a, a.before)} of the whole model, {score(a, a.after)} of this bundle.",
                "",
            ]
        lines += [
            "## Plan",
            "",
            *(f"    {line}" for line in self.plan_text().splitlines()),
            "",
            "## Parity",
            "",
            f"On {SAMPLES} random inputs the bundle differs from the whole model with the lost channels masked",
            f"by at most {self.parity:.1e} of the largest output.",
            "",
            *self._precisions(),
            "## Channel groups",
            "",
            f"Channels were ranked by `{self.scorer}`.",
            "",
            "| group | channels | kept | lives in |",
            "|---|---:|---:|---|",
        ]
        for i, (group, width) in enumerate(zip(architecture.groups, widths, strict=True)):
            lines.append(f"| {group.name} | {group.size} | {width} | {_cell(places(architecture.summary(i)))} |")
        lines += ["", "## Layers", "", "| layer | operator | before | after | MACs | after |"]
        lines.append("|---|---|---:|---:|---:|---:|")
        for r in filter(lambda row: row.macs[0], self.layers()):
            before, after = r.shown()
            lines.append(f"| {_cell(f'`{r.title}`')} | {r.op} | {before} | {after} | {r.macs[0]:,} | {r.macs[1]:,} |")
        lines += ["", "## Files", "", "| file | size |", "|---|---:|"]
        lines += [f"| {name} | {amount(size, 'bytes')} |" for name, size in self.sizes.items()]
        if self.notes:
            lines += ["", "## Notes of the import", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


_TITLES = (
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
    ("latency_j", "energy of a prediction, predicted", "J"),
)
"""Figures of `Costs` and `Prediction` by name, with title and unit."""


def _layer_figures(row: LayerRow, side: int) -> dict[str, Any]:
    return {
        "shape": list(row.shapes[side] or ()),
        "parameters": row.parameters[side],
        "macs": row.macs[side],
        "activation_bytes": row.activation_bytes[side],
    }


def score(accuracy: Accuracy, value: float) -> str:
    """A score for people."""
    return f"{value:.1%}" if "accuracy" in accuracy.measure else f"{value:.4g}"


def places(members: tuple[str, ...], most: int = 6) -> str:
    """Where a group lives, shortened."""
    more = f" and {len(members) - most} more" if len(members) > most else ""
    return ", ".join(f"`{m}`" for m in members[:most]) + more


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return text.replace("\n", " ")


def _figures(costs: Costs, prediction: Prediction) -> dict[str, Any]:
    predicted = {k: v for k, v in asdict(prediction).items() if isinstance(v, (int, float))}
    return {
        "parameters": costs.parameters,
        "forward_macs": costs.forward_macs,
        "training_macs": costs.training_macs,
        "weights_bytes": costs.wire_bytes,
        "activation_bytes": costs.kept_bytes,
        **{
            k: v for k, v in predicted.items() if k not in ("parameters", "forward_macs", "training_macs", "wire_bytes")
        },
    }
