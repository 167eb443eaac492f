"""The base class of all strategies: what each device is sent, and how updates become the next global model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from fedprune.aggregation.fold import Fold
from fedprune.core import validation
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.strategies.aggregators import WEIGHTINGS, Aggregator, Mean
from fedprune.strategies.allocation import Allocator
from fedprune.strategies.importance.scoring import order_scores, rank_channels
from fedprune.strategies.shared_core import SharedCore
from fedprune.strategies.values import (
    Cut,
    NewMemory,
    Ranking,
    RoundClosing,
    Scene,
    SelfDistillation,
    Submodel,
    Turn,
    UpdateReport,
)
from fedprune.updates import AUTO, DOWNLOAD_CODECS, PLAIN, Codecs, agreed_codec

# The data that the server needs from boards: a round's sum of updates, single updates, or measurements as well.
Inputs = Literal["sum", "updates", "measurements"]


@dataclass(frozen=True)
class Strategy:
    """A strategy: eight methods that a subclass may override, and how updates are averaged.

    The methods are `begin`, `start_core`, `rank`, `learn`, `extract`, `reconstruct`, `recipe` and `close`. They get
    a `Scene` (the round), a `Turn` (a device's part in it), a `Cut` (both, and the device's channels), `UpdateReport`s
    (trained submodels with their cuts) and a `Fold` (the sums of the round's updates). They must not keep state: what
    must last is returned by `start_core`, `learn` and `close`, and is in `scene.memory` from then on. It is stored, so
    that a round can be repeated in another process with the same bits.

    Attributes:
        name: Shown to people; by default the class's name.
        aggregator: Sums updates, and makes the next global model of the sums.
        inputs: What the server needs of boards; decides whether a job with privacy is accepted
            (`fedprune.strategies.privacy_checks`). Required, so that no strategy counts as private by omission.
        allocator: How much of the model each device gets; None leaves it to the planner, or to the job's `density`.
        schedule: When offers go out and rounds close; None for synchronous rounds.
        exploration_rounds: Number of first rounds in which every device trains and the strategy learns, but the model
            stays.
        exploration_updates_model: Whether the model moves to the aggregate of those rounds all the same.
        keeps_past: Whether a device's last counted update is kept (`Cut.past`).
        uses_masks: Whether submodels have element masks, for which plans must leave room on boards.
        compression: The codec, both ways, of jobs whose own is `auto`: `none` or one of
            `fedprune.updates.DOWNLOAD_CODECS`. With element masks, and where noise is shared, which a codec would round
            away, files travel plainly.
        distillation: How the server trains each new global model on unlabelled samples, if it has any; None for not at
            all.
        min_channels: The fewest channels that a submodel has of a group, unless the whole model has fewer.
        core: The width that boards train together for most of the job; None where each trains all that it can hold.
    """

    name: str = ""
    aggregator: Aggregator = field(default_factory=Mean)
    inputs: Inputs = field(kw_only=True)
    allocator: Allocator | None = None
    schedule: Schedule | None = None
    exploration_rounds: int = 0
    exploration_updates_model: bool = False
    keeps_past: bool = False
    uses_masks: bool = False
    compression: str = PLAIN
    distillation: SelfDistillation | None = None
    min_channels: int = 1
    core: SharedCore | None = None

    def __post_init__(self) -> None:
        if not self.name:
            # A frozen dataclass sets its own fields in no other way.
            object.__setattr__(self, "name", type(self).__name__)
        validation.check_word(f"strategy {self.name}: inputs", self.inputs, get_args(Inputs))
        validation.check_word(f"strategy {self.name}: compression", self.compression, (PLAIN, *DOWNLOAD_CODECS))
        weighting = self.aggregator.weighting
        validation.check_word(f"strategy {self.name}: weighting of its aggregator", weighting, WEIGHTINGS)

    @property
    def observes_movement(self) -> bool:
        """Whether `learn` needs to know how far weights moved, so that the sums record it (`Fold(evidence=True)`)."""
        return False

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        """The job's first global model, made from the imported one: the same tensors and shapes, float32. Called before
        any device is asked: here a strategy refuses a model that lacks what it needs (`ConfigError`)."""
        return model

    def start_core(self, scene: Scene, core: tuple[int, ...]) -> tuple[Tensors, NewMemory] | None:
        """The model with which a synchronous job begins whose boards share a core of these widths, and its memory; None
        to begin with the scene's model. Called before the first round's channels are ranked, each time with the model
        that `begin` made: the round may begin more than once, and with another core."""
        return None

    def rank(self, scene: Scene) -> Ranking:
        """Rank channels, and elements where there are element masks, once a round for all devices."""
        return Ranking(rank_channels(order_scores(scene.architecture)))

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        """What a round that is about to close adds to the memory; `reports` reads its updates one by one."""
        return {}

    def extract(self, cut: Cut) -> Submodel:
        """The submodel to send to a device: the ranking's first channels (HeteroFL, Diao et al. 2021, eq. 2). If an
        override takes channels that are not the first ones of `cut.selection`, the offer carries a ranking of its own,
        and `UpdateReport.trained` has its channels in that order."""
        return Submodel(cut.selection, cut.selection.gather(cut.scene.model))

    def levels(self, densities: Iterable[float]) -> tuple[float, ...]:
        """The densities, ascending, at which a round's nested submodels are split into increments that boards share;
        `densities` are the fleet's. None where each board downloads a submodel of its own."""
        return ()

    def reconstruct(self, report: UpdateReport) -> Submodel:
        """The part of a trained submodel that enters the sums, in global coordinates."""
        return report.trained

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """A device's recipe of this round, made from the job's."""
        return recipe

    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[UpdateReport, Submodel]]]
    ) -> RoundClosing:
        """The next model. `rate` is the share of the way from w_t to the sums' mean that the schedule allows (1 in
        synchronous rounds). `reports` reads all updates again, each with its reconstruction, for what is not a sum (a
        median)."""
        return self.aggregator.close(fold, scene, rate, reports)

    @property
    def has_plain_close(self) -> bool:
        """Whether the next model is the aggregator's, so that another schedule's arithmetic may take its place."""
        return type(self).close is Strategy.close

    @property
    def is_device_independent(self) -> bool:
        """Whether devices of the same widths and density get the same submodel in a round, so that it is sent once."""
        return type(self).extract is Strategy.extract

    @property
    def has_plain_reconstruction(self) -> bool:
        """Whether updates enter the sums as they were trained, so that sums can be made tensor by tensor."""
        return type(self).reconstruct is Strategy.reconstruct

    def codecs(self, job: Job, profile: object, supported: Collection[str]) -> Codecs:
        """The codecs of a device's updates, and of the weights that it is sent; None for plain files. `profile` is the
        name of its hardware profile, `supported` are the codecs that it knows."""
        # The strategy's own codec gives way here (see `compression`); one that the job names doesn't.
        is_plain = self.uses_masks or job.uses_sums_only
        default_codec = PLAIN if is_plain else self.compression
        settings = job.compression_of.get(str(profile), job.compression), job.compression_down
        up, down = (agreed_codec(default_codec if setting == AUTO else setting, supported) for setting in settings)
        return (None if job.uses_sums_only else up), down

    def planned_recipe(self, job: Job, device: str, widths: tuple[int, ...], density: float, samples: int) -> Recipe:
        """The recipe by which a device's costs are predicted, at these widths (a share `density` of the model). That is
        the recipe of a device without an update yet, in the first round after those of exploration. Raises
        `ConfigError` if the job's own recipe has settings that don't go with the strategy's."""
        # The first round after exploration: an explorer's recipe is longer, and would make every plan too narrow.
        turn = Turn(job.seed, self.exploration_rounds + 1, device, widths, density, samples)
        recipe = job.privacy.private_recipe(self.recipe(job.training_recipe, turn))
        # Masks are made by importance later; the plan needs only the room that any hard mask takes.
        return replace(recipe, mask="hard") if self.uses_masks and recipe.mask == "none" else recipe
