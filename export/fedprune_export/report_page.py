"""The report of an export as one HTML page: tables and pictures, with nothing that is fetched from elsewhere."""

from __future__ import annotations

from fedprune_export import pictures
from fedprune_export.page_parts import details, document, paragraph, picture, table, text
from fedprune_export.parity import SAMPLES
from fedprune_export.report import Report, places, score

_LAYERS = ("layer", "operator", "weight", "as cut", "multiplications", "as cut", "bytes made", "as cut")


def page(report: Report) -> str:
    """The page.

    Args:
        report: What to show.
    """
    architecture, widths = report.model.architecture, report.selection.widths
    title = f"{architecture.name} for {report.target}"
    rows = [(f.title, *f.shown(), f.kept) for f in report.figures()]
    if report.accuracy is not None:
        a = report.accuracy
        rows.append((f"{a.measure} on {a.samples:,} given samples", score(a, a.before), score(a, a.after), ""))
    groups = [
        (g.name, f"{g.size:,}", f"{w:,}", places(architecture.summary(i), 40).replace("`", ""))
        for i, (g, w) in enumerate(zip(architecture.groups, widths, strict=True))
    ]
    layers = [(r.title, r.op, *r.shown(), *(f"{n:,}" for n in (*r.macs, *r.activation_bytes))) for r in report.layers()]
    parts = [
        f"<h1>{text(title)}</h1>",
        *([paragraph(f"Second tier: {report.advice}")] if report.advice else []),
        paragraph(
            f"Channels were ranked by {report.scorer}. On {SAMPLES} random inputs the bundle differs from the whole "
            f"model with the lost channels masked by at most {report.parity:.1e} of the largest output."
        ),
        table(("", "whole model", "this bundle", "kept"), rows),
        f"<h2>Plan</h2><pre>{text(report.plan_text())}</pre>",
        *_precisions(report),
        "<h2>What was cut</h2>",
        paragraph("One bar per channel group, its channels in the model's own order: dark ones are kept."),
        picture(pictures.channel_bars(report.selection)),
        details("Where the groups live", table(("group", "channels", "kept", "lives in"), groups, words=(3,))),
        "<h2>Layers</h2>",
        paragraph("Output channels of every layer: the whole bar before, its dark part after."),
        picture(pictures.layer_widths(architecture, widths)),
        details(
            "Shapes, multiplications and activations of one sample",
            table(_LAYERS, layers, words=(1,)),
        ),
        "<h2>Files</h2>",
        table(("file", "bytes"), [(n, f"{size:,}") for n, size in report.sizes.items()]),
    ]
    if report.model.notes:
        parts += ["<h2>Notes of the import</h2><ul>", *(f"<li>{text(n)}</li>" for n in report.model.notes), "</ul>"]
    return document(title, parts)


def _precisions(report: Report) -> list[str]:
    rows = [(t.lowered.precision, t.describe()) for t in report.trials]
    return ["<h2>Lower precision</h2>", table(("", "beside float32"), rows, words=(1,))] if rows else []
