"""The report of a run: a self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.core.metrics import TRAINED_SUFFIX
from fedprune.core.text import amount, first_few, quantity
from fedprune.output.document import Block, Document, Drawing
from fedprune_server.devices import plan_vs_actual
from fedprune_server.executor.divergence import diagnose_losses
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.coverage import on_common_boards
from fedprune_server.simulation.results.record import DeviceRow, Record, score_text
from fedprune_server.simulation.results.tables import (
    TAIL_ROUNDS,
    drop_empty_columns,
    final_rows,
    result_table,
    tail_note,
    write_page,
)

MAX_LOST_POINTS = 2.0  # points by which the fleet's accuracies may fall below the reference's
MAX_LOSS_EXCESS = 0.05  # relative excess of the fleet's losses over the reference's, for regression
_MAX_LISTED = 10  # devices without updates, and warnings, that are listed, at most
_MACHINE_NOTE = "Predicted: for the board of the profile. Measured: on the machine where the device ran."
MAX_BYTES_SHARE = 0.15  # share of the reference's bytes that the fleet may use, each way


@dataclass(frozen=True)
class Claim:
    """A statement about two runs and its verdict."""

    text: str
    measured: str
    passes: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.passes else 'FAIL'}: {self.text} ({self.measured})"


def claims(run: Record, reference: Record) -> tuple[Claim, ...]:
    """Claims about narrow models, relative to a reference that trains the whole model on every device."""
    final_scores, reference_scores = (r.final(TAIL_ROUNDS) for r in on_common_boards(run, reference))
    losses = [_shortfall(run, a, b) for a, b in zip(final_scores, reference_scores, strict=True)]
    metric = run.metric
    limit = MAX_LOST_POINTS / 100 if metric.is_share else MAX_LOSS_EXCESS
    side = "below" if metric.higher_is_better else "above"
    rounds = quantity(min(TAIL_ROUNDS, len(run.rounds)), "round")
    allowed = f"{MAX_LOST_POINTS:.0f} points {side}" if metric.is_share else f"{MAX_LOSS_EXCESS:.0%} {side}"
    shares = [_ratio(run.last.down, reference.last.down), _ratio(run.last.up, reference.last.up)]
    return (
        Claim(
            f"local and global {run.measure}, as means over the last {rounds}, at most {allowed} {reference.title}",
            f"local {_shortfall_text(run, losses[0])}, global {_shortfall_text(run, losses[1])}",
            all(d <= limit for d in losses),  # NaN compares false: a claim about something unmeasured fails
        ),
        Claim(
            f"at most {MAX_BYTES_SHARE:.0%} of its bytes, down and up",
            f"down {_percent_text(shares[0])}, up {_percent_text(shares[1])}",
            all(s <= MAX_BYTES_SHARE for s in shares),
        ),
    )


def round_table(run: Record) -> list[tuple[str, ...]]:
    """Rows of the table of rounds; the first is the header.

    It has scores of each round's new global model on the server's samples, and of the models that devices received and
    trained on theirs, as means of each device's latest.
    """
    kind = run.measure
    columns = {
        f"global {kind}": run.global_values(),
        f"local {kind} as received": run.own_means(f"{kind}_before"),
        f"local {kind} as trained": run.own_means(f"{kind}_{TRAINED_SUFFIX}"),
    }
    values = zip(run.rounds, *columns.values(), strict=True)
    rows = [(str(row.round), *(score_text(value, run.metric) for value in scores)) for row, *scores in values]
    return drop_empty_columns([("round", *columns), *rows])


def plan_rows(run: Record) -> list[tuple[str, ...]]:
    """Rows of the plan table; the first is the header."""
    latest = run.latest
    has_gpus = any(d.unit == "GPU" for d in run.devices)
    head = ("device", "profile", "trains on", "samples", "density", "bound by", "widths", "parameters")
    rows: list[tuple[str, ...]] = [(*head, "energy a round", f"local {run.measure}", "why not")]
    for d in run.devices:
        board = (d.name, d.profile, d.unit if has_gpus else "", str(d.samples))
        width = (f"{d.density:.3f}" if d.widths else "–", d.bound or "the job", " · ".join(map(str, d.widths)))
        costs = (f"{d.parameters:,}", "–" if d.train_j is None else amount(d.train_j, "J"))
        rows.append((*board, *width, *costs, score_text(latest.get(d.name), run.metric), _absence_reason(run, d)))
    return drop_empty_columns(rows)


def absences(run: Record) -> list[str]:
    """A sentence for each device that no longer takes part, or never delivered an update that counts; those that plans
    leave out are in `tail_note`."""
    delivered = run.delivered
    lost = [d for d in run.devices if d.widths and (d.excluded or (d.missed and d.name not in delivered))]
    sentences = [f"{d.name}: {_absence_reason(run, d)}" for d in lost[:_MAX_LISTED]]
    return sentences if len(lost) <= _MAX_LISTED else [*sentences, f"and {len(lost) - _MAX_LISTED:,} more devices"]


def remarks(run: Record) -> list[str]:
    """Caveats about a run's figures: an early end, devices that were lost, a training that diverged."""
    return [line for line in (run.ended_early, *absences(run), divergence_text(run)) if line]


def divergence_text(run: Record) -> str:
    """Whether training diverged, with advice; empty if it didn't."""
    losses = [r.metrics.get("loss") for r in run.rounds if r.metrics]
    mixes_widths = run.uncalibrated and any(share < 1 for r in run.rounds for share in r.density.values())
    return diagnose_losses(losses, [d.kind for d in run.devices], run.job, mixed=mixes_widths)


def _absence_reason(run: Record, device: DeviceRow) -> str:
    """Why a device took no part, in some rounds or all; empty if it always did."""
    if device.excluded:
        return device.excluded
    text = f"no update in {device.missed} of {quantity(len(run.rounds), 'round')}" if device.missed else ""
    return f"{text}, lastly: {device.why}" if device.why else text


def closing_text(run: Record, reference: Record | None = None, *, judged: bool = True) -> str:
    """The text below a run's results: caveats, and the verdicts if the run is judged."""
    verdicts = claims(run, reference) if reference is not None and judged else ()
    return "\n".join([*remarks(run), *map(str, verdicts)])


def run_document(run: Record, reference: Record | None = None, *, judged: bool = True) -> Document:
    """A run's report.

    `judged`: whether the comparison tests the claims. Raises `StorageError` if the run has no finished round.
    """
    runs = [run] + ([reference] if reference is not None else [])
    intro = (
        f"{quantity(len(run.devices), 'device')}, {quantity(run.last.round, 'round')}. "
        + (f"The run {run.ended_early}. " if run.ended_early else "")
        + f"{tail_note(runs)} {_local_note(run)}{_trained_note(run)}"
        + (f" Bytes: {run.measured}." if run.measured else "")
    )
    verdicts = tuple(map(str, claims(run, reference))) if reference is not None and judged else ()
    compared = [(d.name, d.compared) for d in run.devices if d.widths]
    predictions = drop_empty_columns(plan_vs_actual.comparison_rows(compared))
    warned_devices: dict[str, list[str]] = {}
    for d in run.devices:
        if d.warning:
            warned_devices.setdefault(d.warning, []).append(d.name)
    warnings = tuple(f"{first_few(names)}: {text}" for text, names in warned_devices.items())[:_MAX_LISTED]
    sections: dict[str, Sequence[Block]] = {
        "": [intro],
        "Summary": [result_table(list(zip(*final_rows(runs), strict=True))), verdicts],  # as narrow as a phone
        "Learning": [
            Drawing(charts.learning_curves(runs)),
            replace(result_table(round_table(run)), summary="Scores of each round"),
        ],
        "Devices": [Drawing(charts.device_score_charts(run, reference))],
        "Data of the devices": [Drawing(run.partition.heat_map())],
        "Channels of the devices": [Drawing(charts.channel_map(run))],
        "Channels over the rounds": [Drawing(charts.coverage_map(run))],
        "Plans": [result_table(plan_rows(run)), warnings],
        "Predicted and measured": [
            _MACHINE_NOTE * any("measured" in title for title in predictions[0]),
            result_table(predictions),
        ],
    }
    return Document(run.title, run.facts(), sections)


def _local_note(run: Record) -> str:
    if run.is_private and not run.latest:
        return f"Local {run.measure} is withheld: devices of a private job report nothing that is measured on samples."
    return (
        f"Local {run.measure} is that of the model that a device serves, on its own test data, as measured last; its "
        f"mean is over the {len(run.latest)} of {len(run.devices)} devices that delivered."
    )


def _trained_note(run: Record) -> str:
    """The shares of the channels that boards trained, and from which rounds on, if they changed.

    While a fleet shares a core, boards train less than their plans say.
    """
    phases: list[tuple[int, str]] = []
    for row in run.rounds:
        if not row.density:
            continue
        low, high = min(row.density.values()), max(row.density.values())
        share = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        if not phases or phases[-1][1] != share:
            phases.append((row.round, share))
    # More phases than a sentence can hold are no phases, but widths that vary.
    if not 1 < len(phases) <= TAIL_ROUNDS:
        return ""
    phase_texts = first_few([f"{share} from round {number} on" for number, share in phases], max_names=TAIL_ROUNDS)
    return f" Boards trained these shares of the channels: {phase_texts}."


def write_report(folder: Path, run: Record, reference: Record | None = None, *, judged: bool = True) -> Path:
    """Write `report.html`, and return it; arguments and errors as `run_document`."""
    return write_page(run_document(run, reference, judged=judged), folder / "report.html")


def _ratio(part: float, total: float) -> float:
    return part / total if total else math.nan


def _percent_text(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _shortfall(run: Record, score: float, reference: float) -> float:
    """How much worse a score is than the reference's: a difference of shares, a relative one of other numbers."""
    difference = reference - score if run.metric.higher_is_better else score - reference
    if run.metric.is_share:
        return difference
    # A loss has no unit: 0.1 more is much of 0.2 and little of 5.
    return difference / abs(reference) if reference else math.nan


def _shortfall_text(run: Record, worse: float) -> str:
    if not math.isfinite(worse):
        return "not measured"
    change = -worse if run.metric.higher_is_better else worse
    return f"{round(100 * change, 1) + 0:+.1f} points" if run.metric.is_share else f"{change:+.1%}"
