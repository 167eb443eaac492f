"""A board's own floor and count of privacy: what is refused, what is counted before noise is drawn, what outlives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from fedprune.core import atomic_file, tensorfile
from fedprune.core.errors import ConfigError, DataError, DivergedError, ExitCode, PlanError, PrivacyError
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy_cost import epsilon_for
from fedprune_device.network.offer_checks import check_offer
from fedprune_device.privacy.budget import BUDGET_FILE, BoardPrivacyBudget
from fedprune_device.privacy.policy import PrivacyPolicy, read_policy
from fedprune_device.privacy.redaction import error_name, refusal_reason
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.telemetry.crash_reports import CrashReports
from fedprune_device.training.round_runner import RoundRunner
from support.fakes.hidden_board import DEVICE, HiddenBoard, hidden_weights

pytestmark = pytest.mark.board

PLAIN = Recipe(epochs=1, batch_size=16)
PRIVATE = replace(PLAIN, update_clip=1.0, update_noise=2.0)
SENT = hidden_weights(seed=1)
STATISTICS = ("mean", "var")
SECRET = "label 'cancer' of 17 samples in /home/ann/scans"


def train(board: HiddenBoard, offer: Any, floor: PrivacyPolicy | None = None) -> Any:
    """The update's tensors; every call is a process of its own."""
    with DeviceStore(board.root) as store:
        store.apply_policy(floor)
        result = RoundRunner(
            DEVICE, store.blobs, store.slots, board.data, states=store.local_states, noise=store.privacy.draw
        ).carry_out(offer)
        return tensorfile.decode(store.blobs.read(result.update.weights.sha256)), result


def count(board: HiddenBoard) -> BoardPrivacyBudget:
    return BoardPrivacyBudget(board.root)


def test_every_draw_counts_also_of_the_same_work(board: HiddenBoard) -> None:
    train(board, board.offer(1, PLAIN, SENT, graph="kept"))
    assert not (board.root / BUDGET_FILE).exists(), "jobs without noise are not counted"
    assert not count(board).is_private
    offer = board.offer(1, PRIVATE, SENT, graph="kept")
    first, _ = train(board, offer)
    second, _ = train(board, offer)
    assert not np.array_equal(first["w1"], second["w1"])
    budget = count(board)
    assert (budget.draws, budget.cost) == (2, pytest.approx(2 / 4))
    assert budget.cost >= 0.5, "rounded up"
    assert f"{epsilon_for(budget.cost, 1e-5):.4g}" in budget.describe()


def test_it_is_on_the_disk_before_noise_is_drawn(board: HiddenBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedprune_device.privacy.budget.GaussianNoise.from_system", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(board, board.offer(1, PRIVATE, SENT, graph="kept"))
    assert count(board).draws == 1


@pytest.mark.parametrize(
    ("floor", "recipe", "says"),
    [
        (PrivacyPolicy(), PLAIN, "got neither"),
        (PrivacyPolicy(), replace(PLAIN, update_clip=1.0), "got a clip"),
        (PrivacyPolicy(least_noise=3.0), PRIVATE, "at least 3, got 2"),
        (PrivacyPolicy(secure_aggregation=True), PRIVATE, "secure_aggregation"),
        (PrivacyPolicy(most_clip=0.5), PRIVATE, "at most 0.5"),
        (PrivacyPolicy(most_epsilon=1.0), PRIVATE, r"at δ 1e-05, got 1\.9"),
    ],
)
def test_an_offer_below_the_floor_is_refused_before_anything_is_done(
    board: HiddenBoard, floor: PrivacyPolicy, recipe: Recipe, says: str
) -> None:
    offer = board.offer(1, recipe, SENT, graph="kept")
    with DeviceStore(board.root) as store:
        store.apply_policy(floor)
        with pytest.raises(PrivacyError, match=says) as caught:
            check_offer(offer, store, None)
    assert caught.value.exit_code is ExitCode.PRIVACY
    with pytest.raises(PrivacyError, match=says):
        train(board, offer, floor) if recipe is PRIVATE else floor.check(recipe, 0.0)
    assert count(board).draws == 0


def test_an_owner_may_ask_for_masks_alone(board: HiddenBoard) -> None:
    policy = PrivacyPolicy(secure_aggregation=True)
    for recipe in (PLAIN, PRIVATE):
        policy.check(replace(recipe, secure_aggregation=True), 0.0)
        with pytest.raises(PrivacyError, match="only in jobs with secure"):
            policy.check(recipe, 0.0)
    with pytest.raises(PrivacyError, match="only in private jobs"):
        replace(policy, most_clip=1.0).check(replace(PLAIN, secure_aggregation=True), 0.0)


def test_at_the_floor_it_takes_part_until_its_budget_is_spent(board: HiddenBoard) -> None:
    floor = PrivacyPolicy(least_noise=2.0, most_clip=1.0, most_epsilon=4.0)
    offer, rounds = board.offer(1, PRIVATE, SENT, graph="kept"), 0

    def part(number: int) -> None:
        with DeviceStore(board.root) as store:
            store.apply_policy(floor)
            check_offer(structs.replace(offer, job=f"job-{number % 2}"), store, None)
            store.privacy.draw(offer)  # of either job

    while rounds < 9 and epsilon_for(count(board).cost + 0.25, 1e-5) <= 4.0:
        part(rounds)
        rounds += 1
    with pytest.raises(PrivacyError, match="budget"):
        part(rounds)
    spent = count(board).cost
    assert rounds == 3
    assert epsilon_for(spent, 1e-5) <= 4.0 < epsilon_for(spent + 0.25, 1e-5)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"body":"{}","sha256":""}'])
def test_what_is_no_longer_known_is_not_taken_for_nothing(board: HiddenBoard, damage: bytes) -> None:
    train(board, board.offer(1, PRIVATE, SENT, graph="kept"))
    (board.root / BUDGET_FILE).write_bytes(damage)
    with pytest.raises(PrivacyError, match="not known"):
        train(board, board.offer(2, PRIVATE, SENT, graph="kept"))
    train(board, board.offer(3, PLAIN, SENT, graph="kept"))


def test_the_owners_file(tmp_path: Path) -> None:
    path = tmp_path / "owner.toml"
    path.write_text("[privacy]\nleast_noise = 1\nmost_epsilon = 8.0\n")
    assert read_policy(path) == PrivacyPolicy(least_noise=1, most_epsilon=8.0)
    assert read_policy(None) is None
    for text, says in (
        ("[privacy]\nnoise = 1\n", "'noise'"),
        ("[privacy]\ndelta = 0\n", "delta"),
        ("[private]\n", "private"),
        ("", r"\[privacy\]"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_policy(path)
    with pytest.raises(ConfigError, match="can't read"):
        read_policy(tmp_path / "none.toml")


def test_an_update_without_noise_that_waits_is_dropped_when_the_owner_asks_for_noise(board: HiddenBoard) -> None:
    for recipe, stays in ((PLAIN, False), (PRIVATE, True)):
        offer = board.offer(1, recipe, SENT, graph="kept")
        with DeviceStore(board.root) as store:
            store.accept(offer)
            bench = RoundRunner(DEVICE, store.blobs, store.slots, board.data, noise=store.privacy.draw)
            store.keep_update(bench.carry_out(offer).update)
        with DeviceStore(board.root) as store:
            store.apply_policy(PrivacyPolicy())
            assert (store.pending is not None) == stays
            store.apply_policy(PrivacyPolicy(least_noise=2.0, most_epsilon=0.1))
            assert (store.pending is not None) == stays, "what it cost was spent when its noise was drawn"
            store.apply_policy(PrivacyPolicy(least_noise=2.1))
            assert store.pending is None


@pytest.mark.parametrize("noise", [1e-300, 1e-160, 1e-154, 1e-9])
def test_noise_whose_cost_is_no_number_is_none_and_spoils_no_count(board: HiddenBoard, noise: float) -> None:
    recipe = replace(PRIVATE, update_noise=noise)
    offer = board.offer(1, recipe, SENT, graph="kept")
    with DeviceStore(board.root) as store:
        for _ in range(3):
            store.privacy.draw(offer)
        with pytest.raises(PrivacyError, match="only in private jobs"):
            PrivacyPolicy().check(recipe, 0.0)
    budget = count(board)
    assert (budget.draws, budget.cost) == (0, 0.0)
    budget.check(PRIVATE)


def test_training_that_runs_away_hands_in_noise_alone_and_says_nothing_of_it(board: HiddenBoard) -> None:
    calm = replace(PRIVATE, batch_size=4)
    _, fine = train(board, board.offer(1, calm, SENT, graph="kept"))
    wild = replace(calm, lr=1000.0, weight_decay=1000.0)
    with pytest.raises(DivergedError):
        train(board, board.offer(2, replace(wild, update_clip=0.0, update_noise=0.0), SENT, graph="kept"))
    update, result = train(board, board.offer(2, wild, SENT, graph="kept"))
    assert set(result.update.metrics) == set(fine.update.metrics)
    assert (result.update.steps, result.update.samples) == (fine.update.steps, fine.update.samples)
    assert 1.4 < np.concatenate([(update[n] - SENT[n]).ravel() for n in update if n not in STATISTICS]).std() < 2.6


# What a board tells beside its updates.


def test_an_own_exceptions_name_is_not_told() -> None:
    class CancerError(Exception):
        pass

    CancerError.__module__ = "mine"
    assert error_name(CancerError(SECRET)) == "an error"
    assert error_name(DataError(SECRET)) == "DataError"


def test_refusals_of_private_jobs_name_the_kind_alone_but_for_what_is_of_the_offer() -> None:
    assert SECRET in refusal_reason(DataError(SECRET), private=False)
    assert SECRET in refusal_reason(PlanError(SECRET), private=True)
    for error in (DataError(SECRET), ValueError(SECRET)):
        assert refusal_reason(error, private=True).startswith(f"{type(error).__name__} (its words stay on the board")


def test_of_a_private_board_a_crash_tells_its_name(tmp_path: Path) -> None:
    for early in (True, False):
        CrashReports(tmp_path, withholds_text=lambda now=not early: now).record_exception(DataError(SECRET))  # type: ignore[misc]
        report = CrashReports(tmp_path, withholds_text=lambda: True).report
        assert report["text"].startswith("DataError")
        assert "cancer" not in report["text"]
    CrashReports(tmp_path).record_exception(DataError("plain words"))
    report = CrashReports(tmp_path).report
    assert "plain words" in report["text"]


def test_without_its_count_there_is_no_update(board: HiddenBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = board.offer(1, PRIVATE, SENT, graph="kept")
    monkeypatch.setattr(atomic_file, "write_document", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(board, offer)
