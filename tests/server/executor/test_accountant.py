"""ε: the library's own, for cases that are known, and whatever was released."""

import math
import re
import sys
from types import SimpleNamespace

import dp_accounting
import pytest

from fedprune.coordination import State
from fedprune.coordination.privacy_budget import release_cost
from fedprune.core.errors import ConfigError, ExitCode, MissingExtraError
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.output.extras import install_command
from fedprune.updates.privacy import Privacy
from fedprune_server.executor.accountant import Accountant, privacy_spending
from fedprune_server.executor.worker import Worker

PRIVACY = Privacy(clip=1.0, noise_multiplier=2.0)


@pytest.mark.parametrize(("multiplier", "rounds"), [(1.0, 1), (1.0, 24), (4.0, 100), (20.0, 1000)])
def test_equal_releases_cost_what_the_rdp_accountant_bounds(multiplier: float, rounds: int) -> None:
    reference = dp_accounting.rdp.RdpAccountant()
    reference.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
    epsilon, bound = Accountant(PRIVACY).epsilon(rounds / multiplier**2), reference.get_epsilon(PRIVACY.delta)
    assert 0.8 * bound < epsilon <= bound


def test_releases_of_different_noise_cost_what_the_pld_accountant_says() -> None:
    reference = dp_accounting.pld.PLDAccountant()
    releases = {"3.0": 4, "2.5": 2, "6.0": 5}
    for multiplier, count in releases.items():
        reference.compose(dp_accounting.GaussianDpEvent(float(multiplier)), count)
    assert Accountant(PRIVACY).epsilon(release_cost(releases)) == pytest.approx(
        reference.get_epsilon(PRIVACY.delta), rel=1e-3
    )


def test_epsilon_is_where_the_privacy_curve_reaches_delta() -> None:
    def normal(value: float) -> float:
        return 0.5 * math.erfc(-value / math.sqrt(2))

    for cost in (0.01, 0.25, 1.0, 9.0):
        epsilon, mu = Accountant(PRIVACY).epsilon(cost), math.sqrt(cost)
        # Balle and Wang 2018, Theorem 8.
        delta = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(PRIVACY.delta, rel=1e-3)


def test_what_is_not_released_costs_nothing() -> None:
    assert Accountant(PRIVACY).epsilon(0.0) == 0.0


@pytest.mark.parametrize("privacy", [Privacy(), Privacy(clip=1.0)])
def test_without_noise_nobody_counts(privacy: Privacy) -> None:
    assert Worker.accountant.func(SimpleNamespace(job=Job(privacy=privacy))) is None


def test_a_budget_that_is_not_enough_for_one_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon_budget"):
        Accountant(Privacy(clip=1.0, noise_multiplier=0.5, epsilon_budget=1.0))


def test_without_the_extra_a_private_job_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("privacy"))) as caught:
        Accountant(PRIVACY)
    assert caught.value.exit_code is ExitCode.MISSING_EXTRA
    assert privacy_spending(PRIVACY, fleet())["epsilon"] == {"a": None, "b": None}


def fleet() -> State:
    boards = {n: JobDevice(1, True, {}, None, 9) for n in "ab"}
    boards["a"].releases = {"2.0": 4}
    return State("m", round=4, devices=boards, private=True)


def test_every_boards_cost_is_known() -> None:
    spending = privacy_spending(PRIVACY, fleet())
    assert spending["epsilon"] == {"a": Accountant(PRIVACY).epsilon(1.0), "b": 0.0}
    assert (spending["delta"], spending["noise"], spending["clip"]) == (1e-5, "local", 1.0)
    assert (
        privacy_spending(PRIVACY, None)
        == privacy_spending(Privacy(), fleet())
        == privacy_spending(PRIVACY, State("m"))
        == {}
    )
