"""Updates as a strategy sees them, without a server."""

from collections.abc import Iterable

from fedprune.aggregation.fold import Fold
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Selection, Tensors
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.values import Cut, Memory, RoundClosing, Scene, Submodel, Turn, UpdateReport


def scene(
    architecture: Architecture,
    model: Tensors,
    memory: Memory | None = None,
    *,
    round: int = 1,  # noqa: A002 - the project's word
    recipe: Recipe | None = None,
) -> Scene:
    """A round."""
    return Scene(architecture, 0, round, model, memory or {}, recipe or Recipe())


def report(
    at: Scene,
    selection: Selection,
    trained: Tensors,
    weight: int = 1,
    *,
    steps: int = 1,
    sent: Tensors | None = None,
    mask: ElementMask = ALL_ACTIVE,
    device: str = "d",
) -> UpdateReport:
    """An update; sent was what the round's model holds, unless said otherwise."""
    turn = Turn(at.seed, at.round, device, selection.widths, 1.0, weight)
    before = selection.gather(at.model) if sent is None else sent
    return UpdateReport(
        Cut(at, turn, selection),
        Submodel(selection, trained, mask),
        weight,
        steps,
        lambda: Submodel(selection, before, mask),
    )


def close(
    aggregator: Aggregator, at: Scene, reports: Iterable[UpdateReport], rate: float = 1.0, *, evidence: bool = False
) -> RoundClosing:
    """A round's end: every update is added, then the next model is made."""
    return close_fold(aggregator, at, reports, rate, evidence=evidence)[0]


def close_fold(
    aggregator: Aggregator, at: Scene, reports: Iterable[UpdateReport], rate: float = 1.0, *, evidence: bool = False
) -> tuple[RoundClosing, Fold]:
    """The same, with the sums."""
    all_reports = list(reports)
    fold = aggregator.fold(at, evidence=evidence)
    for each in all_reports:
        aggregator.add(fold, each, each.trained)

    return aggregator.close(fold, at, rate, lambda: ((r, r.trained) for r in all_reports)), fold
