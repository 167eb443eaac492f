"""Searches the widest submodel that fits a board's memory, time, link, energy and storage."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from decimal import ROUND_CEILING, Context

from fedprune.core.errors import PlanError
from fedprune.core.text import amount
from fedprune.model.architecture import Architecture, widths_at, widths_at_least
from fedprune.model.recipe import Recipe
from fedprune.model.trainable import frozen_tensors
from fedprune.planning.correction import NO_CORRECTION, Correction, doubt_text
from fedprune.planning.cost_prediction import (
    latency_table,
    memory_bandwidth,
    memory_use,
    predict_costs,
    training_memory,
    training_unit,
)
from fedprune.planning.costs import costs_at
from fedprune.planning.prediction import Prediction
from fedprune.planning.probe_report import CPU, ProbeReport
from fedprune.planning.profile import TIERS, HardwareProfile, PowerFigures
from fedprune.planning.width_candidates import WidthCandidate, width_candidates
from fedprune.planning.width_plan import (
    BYTES,
    ENERGY,
    LINK,
    MEMORY,
    NOTHING_BINDS,
    STORAGE,
    TIME,
    TIME_MARGIN,
    AskedShare,
    PlanLimit,
    WidthPlan,
    memory_terms,
)
from fedprune.updates import NO_CODECS, Codecs

# Candidates, widest first: from the whole model down to a sixteenth of every group.
DENSITIES: tuple[float, ...] = tuple(k / 64 for k in range(64, 3, -1))

# Fewest samples in a part of a full batch where batch norm takes its statistics from each part. Smaller parts make
# noisy statistics (Wu and He 2018, "Group Normalization", fig. 1); a recipe that asks for smaller ones gets them.
MIN_NORMALISED_SAMPLES = 8

# A plan that keeps a smaller share of the weights warns.
MIN_KEPT_WEIGHTS = 0.25

# The part of the memory that a board's samples take.
SAMPLES = "samples"

# Per limit of a job the setting that raises it, or with which a plan needs less.
SETTING_OF_LIMIT: Mapping[str, str] = {
    MEMORY: "recipe.accumulate = {}",
    SAMPLES: "at most {}",
    TIME: "deadline_s = {}",
    BYTES: "byte_budget = {}",
    ENERGY: "energy_budget = {}",
}


@dataclass(frozen=True)
class _Candidate:
    """A candidate's costs. The recipe is the requested one, with as many parts of a batch as memory needs."""

    widths: tuple[int, ...]
    requested_recipe: Recipe
    recipe: Recipe
    prediction: Prediction
    limits: tuple[PlanLimit, ...]

    @property
    def worst_limit(self) -> PlanLimit:
        """The limit that it breaks by most."""
        return max((m for m in self.limits if not m.fits), key=lambda m: m.used_share)


@dataclass(frozen=True)
class PlanSearch:
    """The search for the widest submodel of `architecture` that a board can train.

    A batch that doesn't fit the board's memory at once is split into parts before the model gets narrower: at
    every width the planner takes the fewest parts with which memory suffices. Where the planner is free to choose
    (`DENSITIES`), widths are those that are cheap on the board (`fedprune.planning.width_candidates`); densities that a
    user asks for are kept to in every group. Raises `PlanError` if a limit isn't positive.

    Attributes:
        recipe: The local training of a round; or what makes it of a submodel's widths, where it depends on those.
        byte_budget: Bytes per round, down plus up, that the job allows, as the codecs make them.
        deadline_s: Seconds that a round may take on the board, transfers included.
        energy_budget: Joules that a round's training may take beyond what the idle board takes. A board whose profile
            has no power figures isn't limited, and its plan warns.
        probe: What the board measured of itself; it takes precedence over the profile.
        densities: Candidate shares of every group.
        asked: What a strategy or a job asks for: nothing wider is a candidate, and where it needs not be whole, even
            shares of `densities` follow.
        correction: What its earlier rounds taught. What they taught about memory never excludes the board: if nothing
            fits for that reason alone, the plan is the narrowest candidate, with a warning.
        frozen: Tensors that the model's author froze.
        margin: Share of the memory that stays free; `MEMORY_UNDERESTIMATE` where no round will correct the plan.
        codecs: As in `predict_costs`.
        names: What the settings of `SETTING_OF_LIMIT` are called where the user has them.
        least_channels: How many channels every group keeps, or all where it has less.
    """

    architecture: Architecture
    profile: HardwareProfile
    recipe: Recipe | Callable[[tuple[int, ...]], Recipe]
    samples: int
    _: KW_ONLY
    byte_budget: int | None = None
    deadline_s: float | None = None
    energy_budget: float | None = None
    probe: ProbeReport | None = None
    densities: Sequence[float] = DENSITIES
    asked: AskedShare | None = None
    correction: Correction = NO_CORRECTION
    frozen: Collection[str] = ()
    margin: float = 0.0
    codecs: Codecs = NO_CODECS
    names: Mapping[str, str] = field(default_factory=lambda: SETTING_OF_LIMIT)
    least_channels: int = 1

    def __post_init__(self) -> None:
        if self.samples <= 0:
            expected = "at least one (docs/local-interface.md#before-the-first-model)"
            raise PlanError("samples to train on", expected=expected, got=self.samples)
        for name in ("byte_budget", "deadline_s", "energy_budget"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value <= 0):
                raise PlanError(name, expected="a number above 0", got=value)

    @property
    def available_bytes(self) -> int:
        """Bytes that training may take."""
        return round(training_memory(self.profile, self.probe) * (1 - self.margin))

    def search(self) -> WidthPlan:
        """The plan. Raises `PlanError` if not even the narrowest candidate fits, or there is no candidate."""
        tried: list[WidthCandidate] = []
        for width_candidate in self._candidates():
            widths = width_candidate.widths
            # Memory is looked at first: it takes a fraction of the time that a prediction takes.
            if self._split_to_fit(widths, self._requested_recipe(widths))[1]:
                candidate = self._candidate_at(width_candidate)
                if all(limit.fits for limit in candidate.limits):
                    return self._fitting_plan(candidate, width_candidate.density, tried)
            tried.append(width_candidate)
        if not tried:
            raise PlanError("there is no density to choose from")
        narrowest = self._candidate_at(width_candidate)
        worst, memory = narrowest.worst_limit, narrowest.prediction.memory
        # A board that has trained can train: memory that its rounds measured never excludes it.
        if [m.name for m in narrowest.limits if not m.fits] == [MEMORY] and memory.uncorrected <= self.available_bytes:
            measured = "the narrowest model takes more memory than the board has, by what its rounds measured"
            return self._plan_of(
                narrowest, width_candidate.density, bound=MEMORY, warning=f"{measured}: {worst.describe()}"
            )
        raise self._no_fit_error(narrowest, {candidate.density for candidate in tried})

    def _fitting_plan(self, candidate: _Candidate, density: float, wider: Sequence[WidthCandidate]) -> WidthPlan:
        """The plan of a candidate that fits, after wider ones that don't."""
        if not wider:
            return self._plan_of(candidate, density, bound=NOTHING_BINDS)
        widest = self._candidate_at(wider[0])
        kept_weights = candidate.prediction.parameters / widest.prediction.parameters
        explanation = self._explanation(widest, wider[0].density) if tuple(self.densities) == DENSITIES else ""
        warns = explanation and (self.asked is not None or kept_weights < MIN_KEPT_WEIGHTS)
        loss = f"density {density:.3g} instead of {wider[0].density:.3g}" if self.asked else ""
        return self._plan_of(
            candidate,
            density,
            bound=self._candidate_at(wider[-1]).worst_limit.name,
            notes=(explanation,) if explanation and not warns else (),
            warning=f"{loss or f'only {kept_weights:.1%} of the weights are kept'}. {explanation}" if warns else "",
        )

    def _no_fit_error(self, narrowest: _Candidate, densities: Collection[float]) -> PlanError:
        worst, name, target = narrowest.worst_limit, self.architecture.name, self.profile.name
        other_limits = [m.describe() for m in narrowest.limits if not m.fits and m is not worst]
        others_text = f"It also breaks {'; '.join(other_limits)}. " if other_limits else ""
        memory_text = f"Memory is for: {memory_terms(narrowest.prediction.memory)}. " if worst.name == MEMORY else ""
        doubt = self._doubt()
        settings = self._remedies(narrowest)
        remedies = (
            f"{settings} Otherwise use" if settings else "No setting of the recipe or the board frees enough. Use"
        )
        return PlanError(
            f"no width of {name} fits {target}: even the narrowest breaks {worst.name}"
            if len(densities) > 1
            else f"{name} at density {max(densities):.3g} doesn't fit {target}: it breaks {worst.name}",
            expected=f"at most {amount(worst.limit, worst.unit)}",
            got=f"{amount(worst.value, worst.unit)}, {amount(worst.value - worst.limit, worst.unit)} too much",
            hint=f"{others_text}{memory_text}{remedies} a smaller model.{self._processor_hint()}"
            + (doubt and f" But {doubt}: see what else runs there."),
        )

    def _doubt(self) -> str:
        """How far the board's measurements of itself are from what its profile promises; empty if they are near."""
        # A generic profile promises nothing.
        if self.probe is None or not self.profile.identify:
            return ""
        widths = self.architecture.sizes
        costs = self.architecture, widths, self.profile, self._requested_recipe(widths), self.samples
        without_times = replace(self.probe, latency=None, train_rate=None, infer_rate=None)
        claimed, promised = (predict_costs(*costs, probe=probe).step_s for probe in (self.probe, without_times))
        return doubt_text(claimed / promised, "its own measurements say", "its profile promises")

    def _processor_hint(self) -> str:
        """A sentence if the model fits the board's processor, but not its GPU; empty otherwise."""
        if training_unit(self.profile, self.probe) == CPU:
            return ""
        try:
            plan = self._search_on_processor().search()
        except PlanError:
            return ""
        tier = f'software.tier = "{TIERS[0]}" in its profile, `fedprune-device run --tier {TIERS[0]}` on the board'
        return f" Or train on its processor, which fits (density {plan.density:.3g}): {tier}."

    def _search_on_processor(self) -> PlanSearch:
        """The same search for the board's processor, by its profile. Of what rounds on the GPU taught, only memory
        holds there."""
        probe = self.probe and replace(self.probe, unit=CPU, latency=None, train_rate=None, infer_rate=None)
        profile = replace(self.profile, software=replace(self.profile.software, tier=TIERS[0]))
        return replace(self, profile=profile, probe=probe, correction=self.correction.without_times())

    def _candidates(self) -> Iterator[WidthCandidate]:
        """Candidates, widest first. If the planner is free to choose, the whole model is yielded before the others are
        computed: most boards that can hold all of it need no more."""
        if self.asked is None and tuple(self.densities) == DENSITIES:
            yield WidthCandidate(1.0, self.architecture.sizes, 1)
            batch = min(self._requested_recipe(self.architecture.sizes).batch_size, self.samples)
            table, rate = latency_table(self.profile, self.probe), memory_bandwidth(self.profile, self.probe)
            narrower = width_candidates(self.architecture, table, batch, self.densities, rate)[1:]
            yield from dict.fromkeys(
                replace(candidate, widths=self._with_least(candidate.widths)) for candidate in narrower
            )
            return
        asked, densities = self.asked, set(self.densities)
        if asked is not None:
            yield WidthCandidate(asked.density, asked.widths, 1)
            densities = set() if asked.whole else {d for d in densities if d < asked.density}
        if asked is not None and asked.masks_elements:
            yield from (WidthCandidate(density, asked.widths, 1) for density in sorted(densities, reverse=True))
            return
        candidate_of_widths: dict[tuple[int, ...], WidthCandidate] = {}
        for density in sorted(densities, reverse=True):
            widths = self._with_least(widths_at(self.architecture, density))
            widths = widths if asked is None else tuple(map(min, widths, asked.widths))
            candidate_of_widths.setdefault(widths, WidthCandidate(density, widths, 1))
        yield from candidate_of_widths.values()

    def _with_least(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        return widths_at_least(self.architecture, widths, self.least_channels)

    def _requested_recipe(self, widths: tuple[int, ...]) -> Recipe:
        return self.recipe if isinstance(self.recipe, Recipe) else self.recipe(widths)

    def _predict(self, widths: tuple[int, ...], recipe: Recipe, density: float = 1.0) -> Prediction:
        return predict_costs(
            self.architecture,
            widths,
            self.profile,
            recipe,
            self.samples,
            probe=self.probe,
            correction=self.correction,
            frozen=self.frozen,
            codecs=self.codecs,
            active_share=density if self.asked is not None and self.asked.masks_elements else 1.0,
        )

    def _candidate_at(self, candidate: WidthCandidate) -> _Candidate:
        widths = candidate.widths
        asked = self._requested_recipe(widths)
        recipe = self._split_to_fit(widths, asked)[0]
        prediction = self._predict(widths, recipe, candidate.density)
        return _Candidate(widths, asked, recipe, prediction, self._limits_of(prediction))

    def _limits_of(self, prediction: Prediction) -> tuple[PlanLimit, ...]:
        limits = [PlanLimit(MEMORY, prediction.memory_bytes, self.available_bytes, "bytes")]
        if self.deadline_s is not None:
            limits.append(PlanLimit(TIME, TIME_MARGIN * prediction.round_s, self.deadline_s, "s"))
        limits.append(PlanLimit(LINK, prediction.round_bytes, self.profile.link.bytes_per_round, "bytes"))
        if self.byte_budget is not None:
            limits.append(PlanLimit(BYTES, prediction.round_bytes, self.byte_budget, "bytes"))
        if self.energy_budget is not None and prediction.train_j is not None:
            limits.append(PlanLimit(ENERGY, prediction.train_j, self.energy_budget, "J"))
        limits.append(PlanLimit(STORAGE, prediction.storage_bytes, self.profile.storage.budget_bytes, "bytes"))
        return tuple(limits)

    def _split_to_fit(
        self, widths: tuple[int, ...], recipe: Recipe, min_samples: int | None = None
    ) -> tuple[Recipe, bool]:
        """The recipe with the fewest parts of a batch with which memory suffices, or the parts that need least memory;
        and whether memory suffices. Parts have at least `min_samples` samples, by default as many as don't harm
        training."""
        costs = costs_at(self.architecture, widths)
        best, least_bytes = recipe, math.inf
        for part_count in _part_counts(recipe, self.samples, min_samples or self._min_part_samples(recipe)):
            split_recipe = recipe.with_micro_batches(part_count)
            needed = memory_use(
                self.architecture,
                widths,
                costs,
                split_recipe,
                self.samples,
                self.frozen,
                probe=self.probe,
                correction=self.correction,
            ).total
            if needed < least_bytes:
                best, least_bytes = split_recipe, needed
            if needed <= self.available_bytes:
                return split_recipe, True
        return best, False

    def _min_part_samples(self, recipe: Recipe) -> int:
        """Fewest samples of a part of a batch that don't harm training. Mixing takes two samples."""
        if has_batch_statistics(self.architecture, recipe, self.frozen):
            return MIN_NORMALISED_SAMPLES
        return 2 if recipe.mixes_samples else 1

    def _plan_of(
        self, candidate: _Candidate, density: float, *, bound: str, notes: tuple[str, ...] = (), warning: str = ""
    ) -> WidthPlan:
        return WidthPlan(
            widths=candidate.widths,
            density=density,
            prediction=candidate.prediction,
            limits=candidate.limits,
            bound=bound,
            correction=self.correction,
            doubt=self._doubt(),
            accumulate=candidate.recipe.accumulate,
            asked=self.asked,
            notes=(*self._gpu_notes(candidate), *self._split_notes(candidate), *notes),
            warning=" ".join(filter(None, (warning, self._unlimited_energy_warning(candidate.prediction)))),
        )

    def _unlimited_energy_warning(self, prediction: Prediction) -> str:
        """A warning if energy is to be limited, but the profile doesn't say the board's power; empty otherwise."""
        if self.energy_budget is None or prediction.train_j is not None:
            return ""
        power = self.profile.power or PowerFigures()
        missing_figures = " and ".join(f"power.{n}" for n in ("idle_w", "load_w") if getattr(power, n) is None)
        return f"energy isn't limited: {self.profile.name} has no {missing_figures}."

    def _gpu_notes(self, candidate: _Candidate) -> tuple[str, ...]:
        """Notes for a board that trains on its GPU: whether its processor would take less time, by its profile."""
        if training_unit(self.profile, self.probe) == CPU:
            return ()
        on_processor = self._search_on_processor()._predict(candidate.widths, candidate.recipe)
        if on_processor.step_s >= candidate.prediction.step_s:
            return ("trains on: GPU",)
        step_text = f"{amount(on_processor.step_s, 's')} per step instead of {amount(candidate.prediction.step_s, 's')}"
        return (f"trains on: GPU; its processor would take {step_text} (`fedprune-device run --tier {TIERS[0]}`)",)

    def _split_notes(self, candidate: _Candidate) -> tuple[str, ...]:
        """Notes for a batch that is split into more parts than the recipe asks for: why, and what that changes."""
        recipe = candidate.recipe
        if recipe.accumulate == candidate.requested_recipe.accumulate:
            return ()
        reason = (
            f"batches of {min(recipe.batch_size, self.samples)} are split into parts of "
            f"{recipe.micro_batch_sizes(self.samples)[0]} (accumulate = {recipe.accumulate}): whole ones don't fit the "
            "memory"
        )
        if not has_batch_statistics(self.architecture, recipe, self.frozen):
            return (reason,)
        statistics = (
            "batch norm takes its statistics from each part, not from the whole batch: "
            f"parts of full batches have at least {MIN_NORMALISED_SAMPLES} samples; "
            "GroupNorm or LayerNorm would not depend on that"
        )
        return reason, statistics

    def _explanation(self, widest: _Candidate, density: float) -> str:
        """Sentences on why the whole model, or what was asked for, doesn't fit, and what would make it fit."""
        broken_limits = [
            f"{m.describe()}: {memory_terms(widest.prediction.memory)}" if m.name == MEMORY else m.describe()
            for m in widest.limits
            if not m.fits
        ]
        remedies = self._remedies(widest) or "On this board only a narrower model fits."
        subject = "The whole model" if density == 1 else f"Density {density:.3g}"
        return f"{subject} exceeds the limit of {'; and of '.join(broken_limits)}. {remedies}"

    def _remedies(self, candidate: _Candidate) -> str:
        """Settings with which a candidate would fit, one for each limit that it breaks; for memory, all that
        suffice. Empty if no setting frees enough memory."""
        settings = []
        for limit in candidate.limits:
            if limit.fits:
                continue
            if limit.name == MEMORY:
                remedies = self._memory_remedies(candidate, limit)
                if not remedies:
                    return ""
                settings.append(", or ".join(remedies))
            else:
                settings.append(self._setting_text(limit.name, _sufficient_setting(limit)))
        return f"It fits with {'; and with '.join(settings)}."

    def _setting_text(self, limit: str, value: object) -> str:
        return _REMEDY_OF_LIMIT[limit].format(self.names.get(limit, "{}").format(value))

    def _memory_remedies(self, candidate: _Candidate, limit: PlanLimit) -> list[str]:
        """Settings each of which would make a candidate fit the memory, the least harmful first."""
        remedies: list[str] = []
        split_recipe, fits = self._split_to_fit(candidate.widths, candidate.requested_recipe, min_samples=1)
        if fits:
            remedies.append(self._setting_text(MEMORY, split_recipe.accumulate))
        if (samples := self._most_samples(candidate)) is not None:
            remedies.append(self._setting_text(SAMPLES, samples))
        share = self.profile.memory.training_share * limit.used_share
        if share <= 1:
            share = math.ceil(100 * share) / 100
            remedies.append(
                f"a larger share of the board's memory (memory.training_share = {share:.2g} in its profile)"
            )
        return remedies

    def _most_samples(self, candidate: _Candidate) -> int | None:
        """How many samples leave a candidate enough memory; None if none do."""
        memory = candidate.prediction.memory
        if memory.total - memory.samples > self.available_bytes:
            return None

        def is_too_many(samples: int) -> bool:
            return not replace(self, samples=samples)._split_to_fit(candidate.widths, candidate.requested_recipe)[1]

        return bisect_left(range(1, self.samples), True, key=is_too_many) or None


def _part_counts(recipe: Recipe, samples: int, min_samples: int) -> list[int]:
    """Numbers of parts of a batch to choose from, fewest first: the recipe's own, and its doubles until parts
    would get too small."""
    batch, batch_samples = recipe.batch_size, min(recipe.batch_size, samples)
    # The size of equal parts of which the smallest has at least that many samples.
    size = -(-batch_samples // max(1, batch_samples // min_samples))
    max_parts = min(-(-batch // size), (batch - 1) // (size - 1)) if size > 1 else batch
    # Doubling finds a number within twice the least with a few predictions of memory.
    counts = [recipe.accumulate]
    while 2 * counts[-1] < max_parts:
        counts.append(2 * counts[-1])
    return counts + [max_parts] * (max_parts > counts[-1])


def has_batch_statistics(architecture: Architecture, recipe: Recipe, frozen: Collection[str] = ()) -> bool:
    """Whether a batch norm of the model takes its statistics from the samples that are worked on at once."""
    statistics = {t.name for t in architecture.statistics}
    return bool(statistics) and not statistics <= frozen_tensors(architecture, recipe.features, frozen)


def _sufficient_setting(limit: PlanLimit) -> str:
    """The least setting with which a value fits: whole bytes, other units rounded up to three digits."""
    if limit.unit == "bytes":
        return str(math.ceil(limit.value))
    return f"{Context(prec=3, rounding=ROUND_CEILING).create_decimal(limit.value).normalize():f}"


# Per limit what raises it: a setting that `names` has a name for, or one of the profile.
_REMEDY_OF_LIMIT = {
    MEMORY: "smaller parts of a batch ({})",
    SAMPLES: "fewer samples on the board ({})",
    TIME: "a longer deadline ({})",
    LINK: "link.bytes_per_round = {} in the board's profile",
    BYTES: "more bytes per round ({})",
    ENERGY: "more energy per round ({})",
    STORAGE: "storage.budget_bytes = {} in the board's profile",
}
