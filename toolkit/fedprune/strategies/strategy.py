"""A strategy: which object plays which role in a job."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from fedprune.core import validation
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.allocation import Allocator
from fedprune.strategies.roles import Aggregator, Extractor, Objective, Personaliser, Scorer, Starter, Turn
from fedprune.training.recipe import Recipe

Inputs = Literal["sum", "updates", "measurements"]
"""What the server needs of boards: a round's sum of updates, single updates, or measurements on samples as well."""


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
        inputs: What the server needs of boards, by which a job with privacy is accepted or refused
            (`fedprune.strategies.privacy_checks`). Required, so that no strategy is taken for private by omission.
        allocator: Who gets how much of the model; None leaves it to the planner, or to the job's `density`.
        schedule: When offers go out and rounds close; None for synchronous rounds.
        explores: In so many first rounds every device is asked, and the scorer learns, but the model doesn't move.
        explorers_count: Whether the model becomes the aggregate of those rounds all the same.
        keeps_past: Whether a device's last counted update is kept, for roles that go on from there (`Cut.past`).
        masks: Whether submodels have masks of elements, for which plans must leave room on boards.
        starter: Makes the job's first model; None leaves it as it was imported.
    """

    name: str
    scorer: Scorer
    extractor: Extractor
    aggregator: Aggregator
    personaliser: Personaliser
    objective: Objective
    inputs: Inputs = field(kw_only=True)
    allocator: Allocator | None = None
    schedule: Schedule | None = None
    explores: int = 0
    explorers_count: bool = False
    keeps_past: bool = False
    masks: bool = False
    starter: Starter | None = None

    def __post_init__(self) -> None:
        validation.word(f"strategy {self.name}: inputs", self.inputs, get_args(Inputs))

    def foreseen(self, job: Job, device: str, widths: tuple[int, ...], density: float, samples: int) -> Recipe:
        """The recipe by which a device's costs are foretold, long before its turns come.

        It is that of a device that has handed in nothing yet, in the first round after those of exploration: plans are
        made for what most rounds are.

        Args:
            job: The job's settings.
            device: Its name.
            widths: The channels per group that it would have.
            density: The share of the model that these are.
            samples: Its training samples.

        Raises:
            ConfigError: The job's own recipe has settings that don't go with the strategy's.
        """
        turn = Turn(job.seed, self.explores + 1, device, widths, density, samples)
        recipe = job.privacy.asked_of(self.objective.recipe(job.recipe, turn))
        return replace(recipe, mask="hard") if self.masks and recipe.mask == "none" else recipe
