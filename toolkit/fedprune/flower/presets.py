"""Which strategies can be run by Flower's rounds, and why the others can't.

Flower sends a message to every node of a round and waits for the answers. What else a strategy needs of a board (what
it keeps between rounds, masks that it trains under, gradients that it reports) isn't there.
"""

from __future__ import annotations

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.strategies import compose
from fedprune.strategies.methods.fedprune import FedPrune
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Turn

# Names of the strategies that work under Flower.
PRESETS = ("fedavg", "fedprox", "fedprune", "fedrolex", "heterofl", "plain")


def compose_for_flower(job: Job, sizes: tuple[int, ...]) -> Strategy:
    """A job's strategy, if Flower's rounds can run it; `sizes` are the model's channels per group. Raises `ConfigError`
    if there is no such strategy, its options are wrong, or it needs what Flower's nodes don't have."""
    strategy = compose(job, sizes)
    if isinstance(strategy, FedPrune):
        strategy = strategy.without_core()  # nodes train all that they hold from the first round on
    recipe = strategy.recipe(job.recipe, Turn(job.seed, 1, "", sizes))  # a device's of full width
    reasons = {
        "it estimates gradients from movements of plain SGD, which a node's own loop doesn't report": (
            strategy.observes_movement
        ),
        "it continues from a device's last update, which fedprune's own server keeps": strategy.keeps_past,
        "devices are sent a drift of their gradients, which a node's own loop doesn't add": recipe.drift,
        "devices train under masks of elements": strategy.uses_masks or recipe.mask != "none",
        "a part of the model stays on the device, which a node of Flower doesn't keep": bool(recipe.personal),
        "the optimiser's state stays on the device, which a node of Flower doesn't keep": recipe.keep_optimizer_state,
        "its learning rate falls over all rounds, whose number Flower alone knows (set lr_rounds)": (
            recipe.lr_schedule != "constant" and not recipe.lr_rounds
        ),
        "its updates come in whenever they are ready, while Flower's rounds wait": strategy.schedule is not None,
        "its first rounds explore": strategy.exploration_rounds > 0,
        "its updates are masked by fedprune's own boards; Flower has secure aggregation of its own": (
            job.secure_aggregation
        ),
        "it needs what fedprune's own boards measure": recipe.report_squares or strategy.inputs == "measurements",
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    if reason:
        what = f"strategy {job.strategy!r}, as it is set here, doesn't work under Flower: {reason}"
        raise ConfigError(what, expected=", ".join(PRESETS), hint="fedprune-server runs it.")
    return strategy
