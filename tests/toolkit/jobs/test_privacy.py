"""Settings of privacy: what they make of a job and its recipes, and what is refused by name."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies import compose
from fedprune.strategies.presets import PRESETS
from fedprune.updates.privacy import Privacy

pytestmark = pytest.mark.board

LOCAL = Privacy(clip=2.0, noise_multiplier=1.5)
SHARED = Privacy(clip=2.0, noise_multiplier=1.5, noise="shared", boards=9)


@pytest.mark.parametrize("privacy", [LOCAL, SHARED])
def test_json_round_trip(privacy: Privacy) -> None:
    job = Job(privacy=privacy)
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_boards_are_told_the_clip_and_their_part_of_the_noise() -> None:
    assert LOCAL.private_recipe(Recipe()) == Recipe(update_clip=2.0, update_noise=3.0)
    assert SHARED.private_recipe(Recipe()) == Recipe(update_clip=2.0, update_noise=1.0)
    offer = LOCAL.private_recipe(Recipe()).to_offer()
    assert (offer["update_clip"], offer["update_noise"]) == (2.0, 3.0)  # a board that doesn't know them refuses


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"noise_multiplier": 1}, "privacy.clip"),
        ({"clip": 1, "noise_multiplier": 1e-160}, "noise_multiplier"),
        ({"clip": 1, "delta": 1}, "privacy.delta"),
        ({"clip": 1, "noise": "shared"}, "privacy.boards: with noise 'shared'"),
        ({"clip": 1, "boards": 3}, "privacy.boards: with noise 'local'"),
        ({"clip": 1, "epsilon_budget": 3}, "epsilon_budget"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(body: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job.from_dict({"privacy": body})


@pytest.mark.parametrize("setting", [{"patience": 3}, {"report_squares": True}])
def test_recipes_by_which_boards_tell_more_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"recipe.{next(iter(setting))}"):
        Job(privacy=LOCAL, recipe=Recipe(**setting))


def test_nobody_writes_the_boards_part_by_hand() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.update_clip"):
        Job(recipe=Recipe(update_clip=1.0))
    with pytest.raises(ConfigError, match="update_noise"):
        Recipe(update_noise=1.0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_strategies_are_private_or_refused_by_name(name: str) -> None:
    options = {"label_rows": False} if name in ("heterofl", "fedrolex") else {}
    for privacy in (LOCAL, SHARED):
        job = Job(strategy=name, options=options, privacy=privacy)
        local = privacy is LOCAL
        if name in ("autoflip", "pr-fl") or (name not in _SUMS and not local):
            with pytest.raises(ConfigError, match=f"job.privacy.* with strategy {name}"):
                compose(job)
        else:
            assert compose(job).name


_SUMS = ("fedavg", "fedcm", "fedprox", "fedper", "fedprune", "fedrolex", "heterofl", "plain")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "fedprune", "options": {"arrivals": 3}}, "a schedule on which updates are released one by one"),
        ({"strategy": "fedavg", "options": {"robust": {"centre": "median"}}}, "a robust mean"),
        ({"scorer": "curvature"}, "a ranking by how single updates moved"),
        ({"compression": "top-k"}, "compression top-k, which rounds single updates"),
        ({"strategy": "support.fakes.tiny_job:scheduled", "options": {}}, "a composition of your own"),
    ],
)
def test_with_shared_noise_nothing_may_look_at_single_updates(settings: dict[str, Any], says: str) -> None:
    if settings.get("strategy") == "support.fakes.tiny_job:scheduled":
        settings = {**settings, "options": {"schedule": {"kind": "asynchronous", "arrivals": 2}}}
    job = Job(**settings)
    compose(job)
    with pytest.raises(ConfigError, match=f"noise: 'shared' with strategy .*{says}"):
        compose(replace(job, privacy=SHARED))
    compose(replace(job, privacy=LOCAL))
