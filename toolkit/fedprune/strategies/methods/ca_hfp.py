"""CA-HFP (arXiv 2603.12591): nested masks of whole channels by curvature, and reconstruction before the mean.

Which channels matter is scored on the server, out of what devices send anyway
(`fedprune.strategies.importance.gradient_stats`). Narrow devices get the best channels of a wide one's. Before the mean
is taken, submodels are filled up from the current model (rule `fill`), so that devices without a channel vote for no
change. The paper leaves open how gradient and curvature are estimated, how scores of weights become a channel's, and
how long warm-up lasts; the options say what we read into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, get_args

from fedprune.aggregation.fold import Rule
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import dealt
from fedprune.strategies.channel_ranking import Ranked
from fedprune.strategies.importance.gradient_stats import DECAY, Estimator
from fedprune.strategies.importance.scoring import Form
from fedprune.strategies.options import choice, number, read_options
from fedprune.strategies.strategy import Strategy

SCORES = {"curvature": "curvature", "l1": "magnitude", "delta_w": "movement", "random": "random"}
"""The option's words, and what our scorer calls them."""


@dataclass(frozen=True)
class Options:
    """Options of `ca-hfp`, which `docs/strategies/ca-hfp.md` explains."""

    densities: tuple[Any, ...] = ()
    score: str = "curvature"
    form: str = "abs"
    estimator: str = "fisher"
    decay: float = DECAY
    per_count: bool = False
    warmup_rounds: int = 0
    reconstruction: str = "fill"
    weighting: str = "samples"
    server_momentum: float = 0.0


def ca_hfp(job: Job) -> Strategy:
    """The preset.

    Raises:
        ConfigError: An option is unknown or out of range, or devices don't train by SGD, whose moves are gradients.
    """
    options, name = read_options(job, Options), job.strategy
    choice(name, "score", options.score, tuple(SCORES))
    choice(name, "form", options.form, get_args(Form))
    choice(name, "estimator", options.estimator, get_args(Estimator))
    choice(name, "reconstruction", options.reconstruction, get_args(Rule))
    choice(name, "weighting", options.weighting, ("samples", "uniform"))
    number(name, "decay", options.decay, 0, 1, below=True)
    number(name, "warmup_rounds", options.warmup_rounds, 0, 10**6)
    number(name, "server_momentum", options.server_momentum, 0, 0.999)
    strategy = Ranked(
        name,
        scorer=SCORES[options.score],
        warmup_rounds=options.warmup_rounds,
        form=cast(Form, options.form),
        estimator=cast(Estimator, options.estimator),
        decay=options.decay,
        per_count=options.per_count,
        aggregator=Mean(
            rule=cast(Rule, options.reconstruction),
            server_momentum=options.server_momentum,
            weighting=options.weighting,
        ),
        inputs="updates",
        allocator=dealt(job, options.densities),
    )
    if strategy.observes and job.recipe.optimizer != "sgd":
        raise ConfigError(
            f"job: score {options.score!r} of {name} learns gradients from how far devices' SGD moves",
            expected="recipe.optimizer 'sgd'",
            got=repr(job.recipe.optimizer),
        )
    return strategy
