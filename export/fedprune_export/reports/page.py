"""The report of an export as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from fedprune.core.text import amount
from fedprune.model.architecture import Architecture, Layer
from fedprune.model.selection import Selection
from fedprune.planning.plan import Plan
from fedprune.report.chart import tiles
from fedprune.report.page import (
    Bar,
    bars,
    boxes,
    details,
    document,
    items,
    paragraph,
    section,
    stacked,
    table,
)
from fedprune_export.checks.parity import SAMPLES
from fedprune_export.reports.report import Report, places, score

_LAYERS = ("layer", "operator", "weight", "as cut", "MACs", "as cut", "activations", "as cut")


def files(report: Report) -> dict[str, bytes]:
    """The report in the three forms that a bundle has it in, by their file names."""
    return {
        "report.json": (json.dumps(report.to_dict(), indent=2) + "\n").encode(),
        "report.md": report.to_markdown().encode(),
        "report.html": page(report).encode(),
    }


def page(report: Report) -> str:
    """The page.

    Args:
        report: What to show.
    """
    architecture, widths = report.model.architecture, report.selection.widths
    rows = [(f.title, *f.shown(), f.kept) for f in report.figures()]
    if report.accuracy is not None:
        a = report.accuracy
        rows.append((f"{a.measure} on {a.samples:,} given samples", score(a, a.before), score(a, a.after), ""))
    groups = [
        (g.name, f"{g.size:,}", f"{w:,}", places(architecture.summary(i), 40).replace("`", ""))
        for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
    ]
    layers = [
        (r.title, r.op, *r.shown(), *(f"{n:,}" for n in r.macs), *(amount(n, "bytes") for n in r.activation_bytes))
        for r in report.layers()
    ]
    trials = [(t.lowered.precision, t.describe()) for t in report.trials]
    parts = [
        paragraph(f"Second tier: {report.advice}") if report.advice else "",
        paragraph(
            f"On {SAMPLES} random inputs the bundle differs from the whole model with the lost channels masked by at "
            f"most {report.parity:.1e} of the largest output."
        ),
        table(("", "whole model", "this bundle", "kept"), rows, label="Costs"),
        section("Plan", plan(report), bars(limits(report.plan.chosen), "Limits of the plan")),
        section("Memory in training, predicted", memory(report)),
        section("Lower precision", table(("", "compared with float32"), trials, words=(1,)) if trials else ""),
        section(
            "Channels",
            paragraph("One bar per channel group, its channels in the model's own order: filled ones are kept."),
            bars(channel_bars(report.selection), "Kept channels of every group"),
            details("Members of the groups", table(("group", "channels", "kept", "members"), groups, words=(3,))),
        ),
        section(
            "Layers",
            paragraph("Output channels of every layer: the pale bar is the whole model, the filled part is kept."),
            bars(layer_bars(architecture, widths), "Output channels of every layer"),
            details("Shapes, MACs and activations of one sample", table(_LAYERS, layers, words=(1,))),
        ),
        section("Files", table(("file", "size"), [(n, amount(size, "bytes")) for n, size in report.sizes.items()])),
        section("Notes of the import", items(report.model.notes)),
    ]
    return document(f"{architecture.name} for {report.target}", parts, report.facts())


def plan(report: Report) -> str:
    """The plan's lines, except for its limits and memory, which are bars."""
    found = report.plan.chosen
    lines = [*found.summary(report.before.parameters), found.unbound(), *found.notes, found.gains()]
    warning = paragraph(f"warning: {found.warning}", "warning") if found.warning else ""
    return "".join(paragraph(line) for line in lines if line) + warning


def limits(plan: Plan) -> list[Bar]:
    """One bar per limit: filled is what the submodel needs."""
    return [
        Bar(
            f"{limit.name} (binds)" if limit.name == plan.bound else limit.name,
            (("part two" if limit.name == plan.bound else "held", 0.0, min(1.0, limit.overshoot)),),
            limit.describe().partition(": ")[2],
        )
        for limit in plan.limits
    ]


def memory(report: Report) -> str:
    """Peak memory of training by what takes it: of the whole model and of this bundle."""
    kinds = ["process", "graph", "weights", "activations", "samples"]
    uses = {"whole model": report.plan.whole.memory, "this bundle": report.plan.chosen.prediction.memory}
    widest = max(use.total for use in uses.values())
    return boxes(kinds) + bars(
        [
            Bar(
                name,
                stacked([getattr(use, kind) for kind in kinds], widest),
                amount(use.total, "bytes"),
                f"{name}: " + ", ".join(f"{kind} {amount(getattr(use, kind), 'bytes')}" for kind in kinds),
            )
            for name, use in uses.items()
        ],
        "Memory in training",
    )


def channel_bars(selection: Selection) -> list[Bar]:
    """One bar per channel group, its kept channels filled, in the model's own order."""
    architecture, found = selection.architecture, []
    for i, (group, width) in enumerate(zip(architecture.groups, selection.widths, strict=True)):
        kept = np.zeros(group.size)
        kept[selection.ranks[i][:width]] = 1
        members = architecture.summary(i)
        home = members[0].partition("[")[0].removesuffix(".weight") if members else ""
        found.append(
            Bar(
                f"{group.name} {home}",
                (tiles(group.name, kept),),
                f"{width:,} of {group.size:,}",
                f"{group.name}: {', '.join(members[:8])}",
            )
        )
    return found


def layer_bars(architecture: Architecture, widths: Sequence[int]) -> list[Bar]:
    """One bar per layer: as long as its output channels, the kept part filled."""
    sizes = [
        (layer, *_outputs(architecture, widths, layer))
        for layer in architecture.layers
        if layer.weight in architecture.by_name
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


def _outputs(architecture: Architecture, widths: Sequence[int], layer: Layer) -> tuple[int, int]:
    """Output channels of a layer at full width and as cut."""
    axes = architecture.by_name[layer.weight].axes
    if not axes:
        return 1, 1
    axis = axes[layer.output_axis]
    return axis.length, axis.size(widths, architecture.sizes)
