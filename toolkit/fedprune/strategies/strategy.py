"""A strategy: which object plays which role in a job."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.allocation import Allocator
from fedprune.schedule import Schedule
from fedprune.strategies.roles import Aggregator, Extractor, Objective, Personaliser, Scorer


@dataclass(frozen=True)
class Strategy:
    """A composition of roles (`fedprune.strategies.roles`).

    Attributes:
        name: For people.
        scorer: Ranks channels and elements.
        extractor: Makes submodels, and leads what was learnt back.
        aggregator: Makes the next global model.
        personaliser: What of a device's model is its own, as far as the server keeps it.
        objective: What boards minimise.
        allocator: Who gets how much of the model; None leaves it to the planner, or to the job's `density`.
        schedule: When offers go out and rounds close; None for synchronous rounds.
        explores: In so many first rounds every device is asked, and the scorer learns, but the model doesn't move.
        explorers_count: Whether the model becomes the aggregate of those rounds all the same.
        keeps_past: Whether a device's last counted update is kept, for roles that go on from there (`Cut.past`).
    """

    name: str
    scorer: Scorer
    extractor: Extractor
    aggregator: Aggregator
    personaliser: Personaliser
    objective: Objective
    allocator: Allocator | None = None
    schedule: Schedule | None = None
    explores: int = 0
    explorers_count: bool = False
    keeps_past: bool = False
