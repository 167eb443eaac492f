"""The card of a trained model for the Hugging Face hub, from the record of its run.

A card is public: it has kinds of boards, and no board's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedprune.core.text import quantity
from fedprune.output.document import Block, Table
from fedprune.output.tables import Column
from fedprune_export.bundles.hub_repository import ModelCard
from fedprune_server.simulation.results.record import DeviceRow, Record
from fedprune_server.simulation.results.tables import final_rows, result_table, tail_note


def model_card(run: Record, license: str = "") -> ModelCard:  # noqa: A002  as the hub calls it
    """The card of a run's last global model. `license` is its identifier on the hub; empty for a placeholder. Raises
    `StorageError` if the run has no finished round."""
    measured = {name: value for name, value in run.last.metrics.items() if math.isfinite(value)}
    about = (
        f"The metrics at the head of this page are those of the model after round {run.last.round}, on the server's "
        f"samples. {tail_note([run])} Local {run.measure} is that of the boards' own models on their own test data."
    )
    rows = final_rows([run])
    seconds = rows[0].index("seconds")  # a server's have no beginning
    limits = "To be written by the publisher of the model: what it is for, and what it must not be used for."
    sections: dict[str, Sequence[Block]] = {
        "Accuracy": [about, result_table([(*row[:seconds], *row[seconds + 1 :]) for row in rows])],
        "Plan": [_boards(run.devices)],
        "Data": [
            (f"{run.partition.data}: " if run.partition.data else "")
            + f"{quantity(sum(d.samples for d in run.devices), 'training sample', form=',')} on "
            f"{quantity(len(run.devices), 'board', form=',')}. What was sent are models and updates, no samples."
        ],
        "Use and limits": [limits],
    }
    return ModelCard(
        data=run.partition.data,
        metrics=measured,
        classes=run.partition.classes,
        license=license,
        facts=run.facts(),
        sections=sections,
    )


def _boards(devices: Sequence[DeviceRow]) -> Table:
    """A row per kind of board: how much of the model it trained, and the limit that decided it."""
    rows = []
    for kind in sorted({d.profile for d in devices}):
        boards_of_kind = [d for d in devices if d.profile == kind]
        bounds = sorted({d.bound or "the job" for d in boards_of_kind})
        shares = _span([f"{d.density:.2f}" for d in sorted(boards_of_kind, key=lambda d: d.density)])
        sizes = _span([f"{d.parameters:,}" for d in sorted(boards_of_kind, key=lambda d: d.parameters)])
        rows.append((kind, str(len(boards_of_kind)), shares, sizes, ", ".join(bounds)))
    titles = ("boards", "number", "density", "parameters", "bound by")
    return Table([Column(title, is_right_aligned=title in titles[1:4]) for title in titles], rows)


def _span(texts: Sequence[str]) -> str:
    """The least and the greatest of sorted numbers."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"
