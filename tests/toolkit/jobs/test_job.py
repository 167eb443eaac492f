"""Jobs: names, limits, JSON."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.wire.topics import check_job

pytestmark = pytest.mark.board


@given(st.text("aZ9_.-/ \n\0é", max_size=4) | st.text(max_size=80))
def test_a_job_may_have_the_names_that_topics_take(name: str) -> None:
    try:
        check_job(name)
    except ProtocolError:
        with pytest.raises(ConfigError, match=r"job\.name"):
            Job(name=name)
    else:
        assert Job(name=name).name == name


def test_a_job_brings_what_boards_can_serve_at() -> None:
    assert Job.from_dict({"precision": ["int8", "float16"]}).precision == ("int8", "float16")
    for wrong in ("int8", ["int4"], ["folded"], ["float16", "folded"], [["int8"]], 8):
        with pytest.raises(ConfigError, match=r"job\.precision"):
            Job.from_dict({"precision": wrong})


def test_the_curvature_scorer_needs_sgd() -> None:
    assert Job(scorer="curvature").recipe.optimizer == "sgd"
    with pytest.raises(ConfigError, match="curvature"):
        Job(scorer="curvature", recipe=Recipe(optimizer="adam"))
