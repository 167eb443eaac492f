"""Updates at fault, which any device may hand in: each costs itself, in whichever command it is found out."""

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.fold import Fold
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import StorageError, StrategyError
from fedprune.jobs.job import Job
from fedprune.model import step_contract
from fedprune.strategies import Strategy
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.values import Submodel, UpdateReport
from fedprune_export.pruning.model import Model
from fedprune_server.executor.worker import Worker

Update = dict[str, npt.NDArray[Any]]


def worker(model: Model, folder: Path, **options: Any) -> Worker:
    job = Job.from_dict({"name": "t", "strategy": "pr-fl", "options": options})
    return Worker(job, model, BlobStore(folder, durable=False))


def contribution(w: Worker, device: str, make: Callable[[Update], object], *, model: str = "", round_: int = 1) -> Any:
    """What a device hands in that was sent the whole model; `make` changes it in place."""
    start = model or w.put_initial_model()
    scored = w.execute(do.Score(round_, start, {}, (device,)))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(round_, start, scored.ranking, scored.order)
    part = do.DevicePart(device, 1, w.architecture.sizes, 1.0, 10, None)
    extracted = w.execute(do.Extract(basis, part))
    assert isinstance(extracted, on.Extracted)
    offer = extracted.offer
    update: Update = {n: v.copy() for n, v in tensorfile.decode(w.store.read(offer["weights"]["sha256"])).items()}
    make(update)
    stored = w.store.put(tensorfile.encode(update)).sha256
    mask = offer["mask"]["sha256"] if "mask" in offer else None
    return do.Contribution(basis, part, offer["weights"]["sha256"], mask, stored, 1, 1, tuple(offer["widths"]))


def add_squares(update: Update) -> None:
    """Squared gradients of all that was trained, with a least and a greatest."""
    for name in [n for n in update if n.endswith((".weight", ".bias"))]:
        value = np.full(update[name].shape, 0.5, np.float32)
        value.reshape(-1)[0] = 0
        update[step_contract.squares_name(name)] = value


def swap_axes(update: Update) -> None:
    add_squares(update)
    name = step_contract.squares_name("conv1.weight")
    value = update[name]
    update[name] = value.reshape(value.shape[1], value.shape[0], *value.shape[2:])


def fill_one(number: float) -> Callable[[Update], None]:
    def make(update: Update) -> None:
        add_squares(update)
        update[step_contract.squares_name("conv1.weight")].reshape(-1)[1] = number

    return make


def add_unknown(update: Update) -> None:
    add_squares(update)
    update[step_contract.squares_name("nobody")] = np.zeros(3, np.float32)


BAD = {"shape": swap_axes, "nan": fill_one(np.nan), "negative": fill_one(-1.0), "name": add_unknown}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_squares_are_checked_like_weights(model: Model, tmp_path: Path, make: Callable[[Update], None]) -> None:
    w = worker(model, tmp_path, interval=1, reported=1.0)
    answer = w.execute(do.FoldUpdate(1, w.put_initial_model(), {}, contribution(w, "a", make)))
    assert isinstance(answer, on.UpdateRejected)
    assert "squared gradients" in answer.reason


def test_good_squares_make_importances_and_unasked_ones_are_refused(model: Model, tmp_path: Path) -> None:
    with_squares = worker(model, tmp_path, interval=1, reported=1.0)
    update = contribution(with_squares, "a", add_squares)
    assert isinstance(with_squares.execute(do.FoldUpdate(1, with_squares.put_initial_model(), {}, update)), on.Folded)
    closed = with_squares.execute(do.Close(1, with_squares.put_initial_model(), {}, ("a",), (update,)))
    assert isinstance(closed, on.Closed)
    assert any((v > 0).any() for v in tensorfile.decode(with_squares.store.read(closed.memory["importance"])).values())
    without_squares = worker(model, tmp_path, masks="channels")
    answer = without_squares.execute(
        do.FoldUpdate(1, without_squares.put_initial_model(), {}, contribution(without_squares, "a", add_squares))
    )
    assert isinstance(answer, on.UpdateRejected)
    assert "not requested" in answer.reason


def set_largest(number: float) -> Callable[[Update], None]:
    """Weights of a layer that are small, but for one of this size: it decides how large an update's may be."""

    def make(update: Update) -> None:
        update["conv1.weight"] = np.clip(update["conv1.weight"], -0.5, 0.5)
        update["conv1.weight"].reshape(-1)[0] = number

    return make


def leave_as_sent(update: Update) -> None:
    pass


def two_models(w: Worker) -> tuple[str, str]:
    """Two global models: an update of the first may hold a 9, one of the second may not."""
    stored = []
    for number in (1.01, 0.99):
        tensors = {n: v.copy() for n, v in w.model.tensors.items()}
        set_largest(number)(tensors)
        stored.append(w.store.put(tensorfile.encode(tensors)).sha256)
    return stored[0], stored[1]


def set_nine(update: Update) -> None:
    update["conv1.weight"].reshape(-1)[1] = 9.0


def test_a_kept_update_that_no_longer_fits_is_left_out(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path, densities=[1.0], masks="channels")
    first, second = two_models(w)
    old = contribution(w, "old", set_nine, model=first)
    assert isinstance(w.execute(do.FoldUpdate(1, first, {}, old)), on.Folded)
    fresh = contribution(w, "fresh", leave_as_sent, model=second, round_=2)
    closed = w.execute(do.Close(2, second, {}, ("fresh",), (fresh, old)))
    alone = w.execute(do.Close(2, second, {}, ("fresh",), (fresh,)))
    assert isinstance(closed, on.Closed)
    assert isinstance(alone, on.Closed)
    assert set(closed.rejected) == {"old"}
    assert "conv1.weight" in closed.rejected["old"]
    assert closed.kinds == {"old": "diverged"}
    assert (closed.model, closed.memory) == (alone.model, alone.memory)
    restarted = worker(model, tmp_path, densities=[1.0], masks="channels")
    assert restarted.execute(do.Close(2, second, {}, ("fresh",), (fresh, old))) == closed


def test_guessed_weights_that_are_too_much_together_cost_nobody_anything(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path, masks="channels")
    updates = [contribution(w, name, set_largest(0.5)) for name in "abc"]
    for update, guess in zip(updates, (MAX_WEIGHT, MAX_WEIGHT // 2, MAX_WEIGHT), strict=True):
        assert isinstance(
            w.execute(do.FoldUpdate(1, w.put_initial_model(), {}, replace(update, weight=guess))), on.Folded
        )
    end = do.Close(
        1, w.put_initial_model(), {}, ("a", "b", "c"), tuple(replace(p, weight=MAX_WEIGHT // 3) for p in updates)
    )
    closed = w.execute(end)
    assert closed == worker(model, tmp_path, masks="channels").execute(end)
    assert isinstance(closed, on.Closed)
    assert not closed.rejected


def test_a_round_in_which_nobody_is_left_moves_nothing(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path, densities=[1.0], masks="channels")
    first, second = two_models(w)
    old = contribution(w, "old", set_nine, model=first)
    closed = w.execute(do.Close(2, second, {"x": first}, ("old",), (old,)))
    assert isinstance(closed, on.Closed)
    assert (closed.model, closed.memory, set(closed.rejected)) == (second, {"x": first}, {"old"})


Reports = Callable[[], Iterator[UpdateReport]]
Learn = Callable[[object, object, object, Reports], dict[str, Any]]


def own_worker(model: Model, folder: Path, learn: Learn | None = None, **roles: Any) -> Worker:
    """A worker of somebody's strategy, which may have roles of its own, or a scorer that learns."""
    strategy_class = type("Own", (Strategy,), {} if learn is None else {"learn": learn})
    sys.modules["subject"] = module = types.ModuleType("subject")
    module.__dict__["made"] = lambda job: strategy_class(inputs="updates", **roles)
    try:
        return Worker(Job(strategy="subject:made"), model, BlobStore(folder, durable=False))
    finally:
        del sys.modules["subject"]


def test_an_update_that_a_scorer_trips_over_costs_only_itself(model: Model, tmp_path: Path) -> None:
    def learn(self: object, scene: object, fold: object, reports: Reports) -> dict[str, Any]:
        counted = 0
        for report in reports():
            counted += 1 // (report.cut.turn.device != "b")
        return {"seen": {"n": np.array([counted])}}

    w = own_worker(model, tmp_path, learn)
    updates = tuple(contribution(w, name, leave_as_sent) for name in "abc")
    closed = w.execute(do.Close(1, w.put_initial_model(), {}, ("a", "b", "c"), updates))
    assert isinstance(closed, on.Closed)
    assert set(closed.rejected) == {"b"}
    assert "ZeroDivisionError" in closed.rejected["b"]
    assert int(tensorfile.decode(w.store.read(closed.memory["seen"]))["n"][0]) == 2


def test_our_own_failures_are_nobodys_fault(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = worker(model, tmp_path, masks="channels")
    update = contribution(w, "a", set_largest(0.9))

    def learn(self: object, scene: object, fold: object, reports: Reports) -> dict[str, Any]:
        list(reports())
        raise ZeroDivisionError

    monkeypatch.setattr(type(w.strategy), "learn", learn)
    with pytest.raises(ZeroDivisionError):
        w.execute(do.Close(1, w.put_initial_model(), {}, ("a",), (update,)))
    w.store.path(update.weights).unlink()
    with pytest.raises(StorageError):
        worker(model, tmp_path, masks="channels").execute(do.Close(1, w.put_initial_model(), {}, ("a",), (update,)))


def test_a_strategy_that_fails_after_its_first_update_is_blamed_itself(model: Model, tmp_path: Path) -> None:
    def learn(self: object, scene: object, fold: object, reports: Reports) -> dict[str, Any]:
        next(reports())
        raise KeyError("lr")

    w = own_worker(model, tmp_path, learn)
    updates = tuple(contribution(w, name, leave_as_sent) for name in "abc")
    with pytest.raises(StrategyError, match="lr"):
        w.execute(do.Close(1, w.put_initial_model(), {}, ("a", "b", "c"), updates))


class Half(Mean):
    """An aggregator that fails on the updates of `b`, when it has added them."""

    def add(self, fold: Fold, report: UpdateReport, lifted: Submodel) -> None:
        super().add(fold, report, lifted)
        if report.cut.turn.device == "b":
            raise ZeroDivisionError("b")


def test_an_update_that_somebodys_aggregator_fails_on_is_in_no_sum(model: Model, tmp_path: Path) -> None:
    w, mean_worker = own_worker(model, tmp_path, aggregator=Half()), own_worker(model, tmp_path, aggregator=Mean())

    def shift(update: Update) -> None:
        update["conv1.weight"] += np.float32(0.1)

    a, b = contribution(w, "a", leave_as_sent), contribution(w, "b", shift)
    assert isinstance(w.execute(do.FoldUpdate(1, w.put_initial_model(), {}, a)), on.Folded)
    answer = w.execute(do.FoldUpdate(1, w.put_initial_model(), {}, b))
    assert isinstance(answer, on.UpdateRejected)
    assert "aggregator Half.add failed at" in answer.reason
    assert "test_worker_faults.py" in answer.reason
    closed = w.execute(do.Close(1, w.put_initial_model(), {}, ("a",), (a,)))
    assert closed == mean_worker.execute(do.Close(1, w.put_initial_model(), {}, ("a",), (a,)))
