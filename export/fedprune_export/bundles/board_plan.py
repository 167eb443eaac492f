"""Plans a model for one board: its widths, and how the board trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from fedprune.core.errors import ProfileError
from fedprune.core.validation import check_instance, check_number, check_whole
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import MEMORY_UNDERESTIMATE, predict_costs, training_unit
from fedprune.planning.plan_search import DENSITIES, SAMPLES, PlanSearch
from fedprune.planning.prediction import Prediction
from fedprune.planning.probe_report import CPU, CUDA, ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.width_plan import BYTES, ENERGY, MEMORY, TIME, WidthPlan
from fedprune.updates import DOWNLOAD_CODECS, NO_CODECS, PLAIN, Codec
from fedprune_export.pruning.model import Model

# Per limit the setting that raises it in an export, and in the job that its bundle is for.
_LIMIT_SETTINGS = {
    MEMORY: "--set accumulate={}",
    SAMPLES: "--samples {}",
    TIME: "--deadline {0}, a job's deadline_s = {0}",
    BYTES: "--bytes-per-round {0}, a job's byte_budget = {0}",
    ENERGY: "--joules-per-round {0}, a job's energy_budget = {0}",
}


@dataclass(frozen=True, repr=False)
class BoardPlan:
    """A model's plan for one board; prints as a few lines.

    Attributes:
        profile: The board.
        recipe: How the board trains; its batch is in as many parts as the board's memory needs.
        samples: Training samples that the board is expected to hold.
        probe: The board's own measurements, if there are any.
        width_plan: The widths, what they cost, and which limit binds.
        full_prediction: What a round of the whole model would cost the board.
    """

    profile: HardwareProfile
    recipe: Recipe
    samples: int
    probe: ProbeReport | None
    width_plan: WidthPlan
    full_prediction: Prediction

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept channels per group."""
        return self.width_plan.widths

    @property
    def unit(self) -> str:
        """The unit that trains on the board, one of `UNITS`."""
        return training_unit(self.profile, self.probe)

    @property
    def density(self) -> float:
        """The kept share of all channels that the widths round to."""
        return self.width_plan.density

    def __str__(self) -> str:
        warning = self.width_plan.warning and f"warning: {self.width_plan.warning}"
        return "\n".join(filter(None, (self.width_plan.describe(self.full_prediction.parameters), warning)))

    __repr__ = __str__


def plan(
    model: Model,
    target: str | HardwareProfile,
    *,
    recipe: Recipe | None = None,
    samples: int = 1000,
    density: float | None = None,
    bytes_per_round: int | None = None,
    deadline_s: float | None = None,
    joules_per_round: float | None = None,
    compression: str = PLAIN,
    probe: ProbeReport | None = None,
    profiles: Sequence[Path] = (),
) -> BoardPlan:
    """Choose the widest submodel that a board can train.

    Args:
        target: The board: a hardware profile, its name, or its TOML file.
        recipe: How the board trains; by default `Recipe()`.
        samples: Training samples that the board holds.
        density: Kept share of every channel group; by default as much as fits the board.
        bytes_per_round: Bytes that a round may transfer, down plus up.
        deadline_s: Seconds that a round may take, transfers included.
        joules_per_round: Energy that its training may take beyond what the idle board takes; where the profile doesn't
            have its power, the plan warns instead.
        compression: Codec of the weights that the board is sent and of its updates, such as `int8`; with `top-k` only
            of the updates.
        probe: The board's own measurements; they beat the profile's figures.
        profiles: Folders of own profiles, searched for a `target` given by name.

    Raises:
        ConfigError: An argument is of another type, or out of range.
        ProfileError: There is no such profile, or the probe measured a GPU that boards of its kind don't have.
        PlanError: Not even the narrowest submodel fits.
    """
    check_instance("model", model, Model, "a model from fedprune_export.load")
    check_instance("target", target, (str, HardwareProfile), "a hardware profile, its name or its TOML file")
    check_instance("recipe", recipe, (Recipe, NoneType), "a Recipe")
    check_instance("probe", probe, (ProbeReport, NoneType), "a ProbeReport")
    check_instance("profiles", profiles, (list, tuple), "a list of folders")
    check_whole("samples", samples, 1)
    if bytes_per_round is not None:
        check_whole("bytes_per_round", bytes_per_round, 1)
    for name, value in (("density", density), ("deadline_s", deadline_s), ("joules_per_round", joules_per_round)):
        if value is not None:
            check_number(name, value, 0, 1 if name == "density" else math.inf, above=True)
    profile = target
    if isinstance(profile, str):
        profile = profile_store.find_typed_profile(profile, tuple(map(Path, profiles)))
    if probe is not None and probe.unit == CUDA and profile.identify and not profile.has_cuda:
        expected = f"unit {CPU}: {profile.name} has no GPU that trains"
        raise ProfileError("the probe was measured on another board", expected=expected, got=probe.unit)
    recipe = recipe or Recipe()
    codec = Codec.parse(compression, "compression")
    # Weights can't be sent with top-k: boards would train on from values that most of the model once had.
    codecs = NO_CODECS if codec is None else (str(codec), str(codec) if codec.name in DOWNLOAD_CODECS else None)
    architecture = model.architecture
    width_plan = PlanSearch(
        architecture,
        profile,
        recipe,
        samples,
        byte_budget=bytes_per_round,
        deadline_s=deadline_s,
        energy_budget=joules_per_round,
        probe=probe,
        densities=DENSITIES if density is None else (density,),
        frozen=model.frozen,
        codecs=codecs,
        # Memory that is predicted only from a profile may be too low by as much as this (docs/planner.md).
        margin=MEMORY_UNDERESTIMATE if probe is None else 0.0,
        names=_LIMIT_SETTINGS,
    ).search()
    recipe = recipe.with_micro_batches(width_plan.accumulate)
    uncut = predict_costs(
        architecture, architecture.sizes, profile, recipe, samples, probe=probe, frozen=model.frozen, codecs=codecs
    )
    return BoardPlan(
        profile=profile, recipe=recipe, samples=samples, probe=probe, width_plan=width_plan, full_prediction=uncut
    )
