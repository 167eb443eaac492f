"""SubFLOT (arXiv 2604.06631): submodels by optimal transport, onto a device's last update.

A device's submodel is no slice: the global model is transported onto the channels of the device's own last model
(`fedprune.strategies.optimal_transport`) and mixed with it (OTP, Eqs. 3 to 6). The device trains it with a pull towards
what it was sent, the stronger the more was pruned (SAR, Eqs. 7 and 8). What it hands in is transported onto the global
model's channels again, at full width (OTA, Eq. 9), so that the mean of a round is a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.optimal_transport import aggregate, align, check_installed, prune
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, PastUpdate, Submodel, Turn, UpdateReport

# The paper's widths: pruning rates 0, 1/4, 1/2 and 3/4 of every layer's channels.
PAPER_DENSITIES = (1.0, 0.75, 0.5, 0.25)

# The learning rate of the paper's plain SGD.
PAPER_LR = 1e-3

SarScale = Literal["step", "literal"]


@dataclass(frozen=True)
class SubFlotOptions:
    """Options of `subflot`, which `docs/strategies/subflot.md` explains."""

    alpha: float = bounded(0.5, 0, 1)
    sar: float = bounded(1.0, 0, 5e5)  # 2·λ is the most that boards are asked to pull with
    sar_scale: SarScale = "step"
    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class SubFlot(Strategy):
    """Submodels by transport onto a device's own last model; updates by transport onto the global one.

    Attributes:
        alpha: α of Eq. 6.
        sar: λ of the pull (SAR, Eqs. 7 and 8); 0 leaves it to the job's recipe.
        sar_scale: `literal`: λ as it is. `step`: SGD pulls at most as far in a step as with the paper's learning rate.
    """

    alpha: float = 0.5
    sar: float = 1.0
    sar_scale: SarScale = "step"

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        """The model as it is. Raises `MissingExtraError` before a board is asked, not when there is a first history."""
        check_installed()
        return model

    def extract(self, cut: Cut) -> Submodel:
        """OTP; a slice of the global model until the device has a history."""
        if cut.past is None:
            return Submodel(cut.selection, cut.selection.gather(cut.scene.model))
        history = self.resize_history(cut.past, cut)
        return Submodel(cut.selection, prune(cut.scene.model, history, cut.selection, self.alpha))

    def reconstruct(self, report: UpdateReport) -> Submodel:
        """OTA, onto the global model that the device's submodel was made of: all channels, in their own order."""
        trained, model = report.trained, report.cut.scene.model
        lifted = aggregate(trained.tensors, trained.selection, model)
        return Submodel(Selection.full(trained.selection.architecture), lifted)

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """λ·ρ·‖w − w_sent‖² is µ/2·‖w − w_sent‖² with µ = 2·λ·ρ: a device that holds the whole model is not pulled.

        A step of SGD takes back µ·lr / (1 − momentum) of the way from w_sent, 0.0015 at most with the paper's λ and
        learning rate. With λ = 1, a learning rate of 0.05 and momentum 0.9 it would be 0.75, and the weights would stay
        where they are. With `step`, λ shrinks as lr / (1 − momentum) grows.
        """
        if not self.sar:
            return recipe
        effective_lr = recipe.lr / (1 - recipe.momentum)
        needs_scaling = self.sar_scale == "step" and recipe.optimizer == "sgd" and effective_lr > PAPER_LR
        sar = self.sar * PAPER_LR / effective_lr if needs_scaling else self.sar
        return replace(recipe, proximal=2 * sar * turn.pruning_rate)

    def resize_history(self, past: PastUpdate, cut: Cut) -> Tensors:
        """A device's last model at the widths that it has now. Where channels were added, they are the global model's,
        next to its own. Where there are only fewer, all of its channels are led onto the first of them, so that none is
        thrown away."""
        past_selection, selection, past_tensors = past.selection, cut.selection, past.tensors_over(cut.scene.model)
        # Ranks are the channels' own order, so equal widths are equal channels.
        if past_selection.widths == selection.widths:
            return past_tensors
        overlap = selection.gather(past_selection.scatter(past_tensors, cut.scene.model))
        if any(b > a for a, b in zip(past_selection.widths, selection.widths, strict=True)):
            return overlap
        return align(past_tensors, past_selection, overlap, selection)


def subflot(job: Job) -> Strategy:
    """The preset. Raises `ConfigError` if an option is unknown or out of range, or the recipe names frozen or personal
    tensors, which transport would mix with others."""
    options = read_options(job, SubFlotOptions)
    name, recipe = job.strategy, job.recipe
    for key in ("frozen", "trainable", "personal"):
        if getattr(recipe, key):
            raise ConfigError(
                f"{name} leads channels of all tensors onto each other",
                path=("job", "strategy"),
                expected=f"a recipe without {key}",
                hint="Tensors that must stay as they are go with fedavg, fedper or heterofl.",
            )
    return SubFlot(
        name,
        alpha=options.alpha,
        sar=options.sar,
        sar_scale=options.sar_scale,
        inputs="updates",
        allocator=density_allocator(job, options.densities, default=PAPER_DENSITIES),
        keeps_past=True,
    )
