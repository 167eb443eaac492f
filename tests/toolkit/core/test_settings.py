"""Settings: ranges and words that a field declares are kept everywhere, and the error names the field."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import pytest

from fedprune.core.errors import ConfigError, FedpruneError, ProfileError
from fedprune.core.settings import _field_rules
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule, Staleness
from fedprune.model.recipe import Recipe
from fedprune.planning.probe_report import ProbeReport
from fedprune.releases.rollout_plan import RolloutPlan, Stage
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune.strategies import compose
from fedprune.strategies.allocation import Tiers
from fedprune.strategies.methods import (
    asynchronous,
    autoflip,
    ca_hfp,
    drift,
    fedavg,
    fedobp,
    fedper,
    fedprune,
    fiarse,
    heterofl,
    history,
    pr_fl,
    robust,
    subflot,
)
from fedprune.strategies.recovery import Recovery
from fedprune.strategies.time_driven import TimeDriven
from fedprune.updates.privacy import Privacy

pytestmark = pytest.mark.board

PLAIN: dict[type[Any], Callable[..., Any]] = {
    **{kind: kind for kind in (Recipe, Job, Schedule, Staleness, Privacy, EnginePlan, Recovery, TimeDriven)},
    **{kind: kind for kind in (pr_fl.Importance, robust.Robustness)},
    Tiers: partial(Tiers, (1.0,)),
    Stage: partial(Stage, share=1.0),
    RolloutPlan: partial(RolloutPlan, "model", "1"),
}
OPTIONS = {
    "autoflip": autoflip.AutoFlipOptions,
    "ca-hfp": ca_hfp.CaHfpOptions,
    "fedasync": asynchronous.FedAsyncOptions,
    "fedavg": fedavg.FedAvgOptions,
    "fedbuff": asynchronous.FedBuffOptions,
    "fedcm": drift.FedCmOptions,
    "feddyn": drift.FedDynOptions,
    "fedfix": asynchronous.FedFixOptions,
    "fedobp": fedobp.FedObpOptions,
    "fedper": fedper.FedPerOptions,
    "fedprox": fedavg.FedProxOptions,
    "fedprune": fedprune.FedPruneOptions,
    "fedrolex": heterofl.HeteroFlOptions,
    "fiarse": fiarse.FiarseOptions,
    "heterofl": heterofl.HeteroFlOptions,
    "history": history.HistoryOptions,
    "local": fedper.LocalOptions,
    "pr-fl": pr_fl.PrFlOptions,
    "scaffold": drift.ScaffoldOptions,
    "subflot": subflot.SubFlotOptions,
}


def wrong(kind: type[Any], name: str) -> Iterator[Any]:
    """Values on the other side of all that a field declares."""
    declared = _field_rules(kind)[name]
    if declared.choices or declared.kind is bool:
        yield from ("nonsense", 3, None)
    if declared.limits is None:
        return
    limits = declared.limits
    numbers: list[Any] = [2 * limits.high + 1, min(limits.low, 0) - 1, math.nan, math.inf, 10**400, "much", True]
    numbers += [limits.low] * limits.above + [limits.high] * limits.below + [limits.low / 2] * limits.or_zero
    numbers += [] if declared.is_optional else [None]
    for number in numbers + [limits.low + 0.5] * declared.is_whole:
        if not isinstance(number, float) or number != limits.high or not math.isinf(number):
            yield number


CASES = [(kind, f.name) for kind in PLAIN for f in fields(kind) if [*wrong(kind, f.name)]]
OF_PRESETS = [(name, f.name) for name, kind in OPTIONS.items() for f in fields(kind) if [*wrong(kind, f.name)]]


def wrong_entries(kind: type[Any], name: str) -> list[Any]:
    """The wrong values, as the only entry of a list where the field is one; elsewhere a list is wrong, too."""
    listed = "tuple" in str(_field_rules(kind)[name].kind)
    return [(value,) for value in wrong(kind, name)] if listed else [*wrong(kind, name), (1,)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(kind: type[Any], name: str) -> None:
    error: type[FedpruneError] = ProfileError if kind is ProbeReport else ConfigError
    for value in wrong_entries(kind, name):
        with pytest.raises(error, match=name):
            PLAIN[kind](**{name: value})


@pytest.mark.parametrize(("strategy", "name"), OF_PRESETS)
def test_a_wrong_option_is_refused_by_its_name(strategy: str, name: str) -> None:
    for value in wrong_entries(OPTIONS[strategy], name):
        with pytest.raises(ConfigError, match=rf"^job\.options\.{name}: "):
            compose(Job(strategy=strategy, options={name: value}))
