"""CA-HFP (arXiv 2603.12591): nested masks of whole channels by curvature, and reconstruction before the mean.

Which channels matter is scored on the server, out of what devices send anyway
(`fedprune.strategies.importance.gradient_stats`). Narrow devices get the best channels of a wide one's. Before the mean
is taken, submodels are filled up from the current model (rule `fill`), so that devices without a channel vote for no
change. The paper leaves open how gradient and curvature are estimated, how scores of weights become a channel's, and
how long warm-up lasts; the options say what we read into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedprune.aggregation.fold import Rule
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded, choice_of
from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.importance.scoring import CurvatureForm
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy

# The option's words, and what our scorer calls them.
SCORERS_BY_OPTION = {"curvature": "curvature", "l1": "magnitude", "delta_w": "movement", "random": "random"}


@dataclass(frozen=True)
class CaHfpOptions:
    """Options of `ca-hfp`, which `docs/strategies/ca-hfp.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    score: str = choice_of("curvature", SCORERS_BY_OPTION)
    form: CurvatureForm = "abs"
    reconstruction: Rule = "fill"


def ca_hfp(job: Job) -> Strategy:
    """The preset. Raises `ConfigError` if an option is unknown or out of range, or devices don't train by SGD, whose
    moves are gradients."""
    options = read_options(job, CaHfpOptions)
    strategy = RankedChannels(
        job.strategy,
        scorer=SCORERS_BY_OPTION[options.score],
        form=options.form,
        aggregator=Mean(rule=options.reconstruction),
        inputs="updates",
        allocator=density_allocator(job, options.densities),
    )
    if strategy.observes_movement and job.recipe.optimizer != "sgd":
        raise ConfigError(
            f"{options.score!r} learns gradients from how far devices' SGD moves",
            path=("job", "options", "score"),
            expected="recipe.optimizer 'sgd'",
            got=repr(job.recipe.optimizer),
        )
    return strategy
