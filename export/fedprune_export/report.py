"""What an export did, for people and programs: sizes before and after, the plan, the parity of the cut."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprune import __version__, session
from fedprune.bundle import INFERENCE, TRAINING, WEIGHTS
from fedprune.costs import Costs, costs_at
from fedprune.plan import Plan
from fedprune.selection import Selection
from fedprune.session import Session
from fedprune.step import LOGITS, X
from fedprune_export.cut import masked
from fedprune_export.imported import Model
from fedprune_export.trace import sample_input

SAMPLES = 7
"""Random inputs of the parity check."""


@dataclass(frozen=True)
class Report:
    """An export.

    Attributes:
        model: The whole model.
        selection: What the bundle holds of it.
        target: Name of the hardware profile.
        plan: Why it is as wide as it is.
        scorer: How channels were ranked.
        sizes: Bytes of every file.
        parity: Largest difference between the bundle's outputs and those of the whole model with the lost channels
            masked, relative to the largest output.
    """

    model: Model
    selection: Selection
    target: str
    plan: Plan
    scorer: str
    sizes: Mapping[str, int]
    parity: float

    @property
    def before(self) -> Costs:
        """Costs of the whole model."""
        return costs_at(self.model.architecture, self.model.architecture.sizes)

    @property
    def after(self) -> Costs:
        """Costs of the submodel."""
        return costs_at(self.model.architecture, self.selection.widths)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        architecture, widths = self.model.architecture, self.selection.widths
        return {
            "format": "fedprune.report/1",
            "fedprune": __version__,
            "onnxruntime": session.version(),
            "model": architecture.name,
            "target": self.target,
            "scorer": self.scorer,
            "before": _figures(self.before),
            "after": _figures(self.after),
            "groups": [
                {"name": g.name, "channels": g.size, "kept": w, "members": list(architecture.members(i))}
                for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
            ],
            "plan": self.plan.to_dict(),
            "parity": {"samples": SAMPLES, "max_relative_error": self.parity},
            "files": dict(self.sizes),
            "notes": list(self.model.notes),
        }

    def to_markdown(self) -> str:
        """As a page to read."""
        architecture, widths = self.model.architecture, self.selection.widths
        before, after = _figures(self.before), _figures(self.after)
        lines = [
            f"# {architecture.name} for {self.target}",
            "",
            "| | whole model | this bundle | kept |",
            "|---|---:|---:|---:|",
            *(f"| {_TITLES[k]} | {n:,} | {after[k]:,} | {after[k] / n if n else 1:.1%} |" for k, n in before.items()),
            "",
            "## Plan",
            "",
            *(f"    {line}" for line in self.plan.describe().splitlines()),
            "",
            "## Parity",
            "",
            f"On {SAMPLES} random inputs the bundle differs from the whole model with the lost channels masked",
            f"by at most {self.parity:.1e} of the largest output.",
            "",
            "## Channel groups",
            "",
            f"Channels were ranked by `{self.scorer}`.",
            "",
            "| group | channels | kept | lives in |",
            "|---|---:|---:|---|",
        ]
        for i, (group, width) in enumerate(zip(architecture.groups, widths, strict=True)):
            members = architecture.members(i)
            more = f" and {len(members) - 6} more" if len(members) > 6 else ""
            places = ", ".join(f"`{m}`" for m in members[:6])
            lines.append(f"| {group.name} | {group.size} | {width} | {places}{more} |")
        lines += ["", "## Files", "", "| file | bytes |", "|---|---:|"]
        lines += [f"| {name} | {size:,} |" for name, size in self.sizes.items()]
        if self.model.notes:
            lines += ["", "## Notes of the import", "", *(f"- {note}" for note in self.model.notes)]
        return "\n".join(lines) + "\n"


_TITLES = {
    "parameters": "parameters",
    "forward_macs": "multiplications per sample, forward",
    "training_macs": "multiplications per sample, training",
    "weights_bytes": "bytes of weights",
    "activation_bytes": "bytes of activations per sample, training",
}


def _figures(costs: Costs) -> dict[str, int]:
    return {
        "parameters": costs.parameters,
        "forward_macs": costs.forward_macs,
        "training_macs": costs.training_macs,
        "weights_bytes": costs.wire_bytes,
        "activation_bytes": costs.kept_bytes,
    }


def parity(model: Model, selection: Selection, files: Mapping[str, bytes]) -> float:
    """How far the files of a bundle are from the masked whole model on random inputs.

    Args:
        model: The whole model.
        selection: What the bundle holds of it.
        files: The bundle's files by name.

    Raises:
        ModelError: onnxruntime doesn't load the training step, or doesn't load or run the inference graph.
    """
    Session(files[TRAINING], training=True)
    x = sample_input(model.graph.inputs[0], SAMPLES)
    with tempfile.TemporaryDirectory(prefix="fedprune-") as name:
        for file in (INFERENCE, WEIGHTS):
            (Path(name) / file).write_bytes(files[file])
        small = Session(Path(name) / INFERENCE).run({X: x})[LOGITS]
    whole = Session(masked(model, selection).to_bytes()).run({X: x})[LOGITS]
    scale = max(float(np.abs(whole).max(initial=0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(small - whole).max(initial=0)) / scale
