"""The worker: a round's heavy work on the demo's model, with the board's own trainer in between."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, ModelError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.nesting import nest_widths
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies.methods.fedprune import FedPrune
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from fedprune_server.executor.worker import Worker
from fedprune_server.simulation.digits import Digits, deal_digits

DEVICES = ("a", "b", "c")
DENSITIES = {"a": 1.0, "b": 0.5, "c": 0.25}
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.05, logit_adjustment=True)


@pytest.fixture(scope="module")
def federation() -> Digits:
    return deal_digits(DEVICES, seed=0)


def worker(model: Model, folder: Path, federation: Digits | None = None, **settings: object) -> Worker:
    job = Job.from_dict({"name": "t", "scorer": "magnitude", "rule": "fill", "recipe": RECIPE.to_dict(), **settings})
    evaluation = None if federation is None else (federation.x, federation.y)
    return Worker(job, model, BlobStore(folder, durable=False), evaluation)


def rank(w: Worker, round_: int = 1) -> str:
    scored = w.execute(do.Score(round_, w.put_initial_model(), {}, DEVICES))
    assert isinstance(scored, on.Scored)
    assert scored.order is None
    return scored.ranking


def part(name: str, widths: tuple[int, ...], samples: int = 10) -> do.DevicePart:
    return do.DevicePart(name, 1, widths, 1.0, samples, None)


def test_devices_of_one_width_share_an_offer(model: Model, tmp_path: Path) -> None:
    """It is made once, and again where a device trains otherwise or a blob was deleted."""
    w = worker(model, tmp_path)
    basis = do.Basis(1, w.put_initial_model(), rank(w))
    full_width, half_width = model.architecture.sizes, widths_at(model.architecture, 0.5)

    def offer_to(device: str, widths: tuple[int, ...], accumulate: int = 1) -> dict[str, Any]:
        event = w.execute(do.Extract(basis, part(device, widths), accumulate=accumulate))
        assert isinstance(event, on.Extracted)
        assert event.device == device
        return event.offer

    first = offer_to("a", full_width)
    assert offer_to("b", full_width)["recipe"] is first["recipe"], "it is the same, not made again"
    assert offer_to("c", half_width)["weights"] != first["weights"]
    assert offer_to("d", full_width, accumulate=2)["recipe"]["accumulate"] == 2
    w.store.delete(first["weights"]["sha256"])
    assert offer_to("e", full_width) == first
    assert w.store.has(first["weights"]["sha256"])


def contribution(
    basis: do.Basis, device_part: do.DevicePart, weights: str, weight: int = 10, steps: int = 1, sent: str = "0" * 64
) -> do.Contribution:
    return do.Contribution(basis, device_part, sent, None, weights, weight, steps)


def fold(update: do.Contribution) -> do.FoldUpdate:
    return do.FoldUpdate(1, update.basis.model, {}, update)


def close(updates: list[do.Contribution]) -> do.Close:
    return do.Close(1, updates[0].basis.model, {}, tuple(sorted(p.part.device for p in updates)), tuple(updates))


def contributions(w: Worker, model: Model, ranking: str, federation: Digits) -> list[do.Contribution]:
    """What devices of three widths send back after one epoch."""
    updates = []
    for name in DEVICES:
        widths = widths_at(model.architecture, DENSITIES[name])
        basis, device_part = do.Basis(1, w.put_initial_model(), ranking), part(name, widths)
        extracted = w.execute(do.Extract(basis, device_part))
        assert isinstance(extracted, on.Extracted)
        offer = extracted.offer
        result = Trainer(w.store.read(offer["training"]["sha256"])).train(
            tensorfile.decode(w.store.read(offer["weights"]["sha256"])),
            federation.devices[name],
            TrainingTask(RECIPE, seed=0, device=name, round=1, classes=10),
        )
        weights = w.store.put(tensorfile.encode(result.tensors)).sha256
        updates.append(
            contribution(basis, device_part, weights, result.samples, result.steps, offer["weights"]["sha256"])
        )
    return updates


def test_a_round_makes_the_model_better(model: Model, federation: Digits, tmp_path: Path) -> None:
    w = worker(model, tmp_path, federation)
    start = w.put_initial_model()
    updates = contributions(w, model, rank(w), federation)
    for update in updates:
        assert w.execute(fold(update)) == on.Folded(update.part.device, 1, 1)
    closed = w.execute(close(updates))
    assert isinstance(closed, on.Closed)
    before, after = (w.execute(do.Evaluate(1, m)) for m in (start, closed.model))
    assert isinstance(before, on.Evaluated)
    assert isinstance(after, on.Evaluated)

    assert after.metrics["loss"] < before.metrics["loss"]


def test_a_part_of_a_model_is_measured_as_a_model_of_its_widths(
    model: Model, federation: Digits, tmp_path: Path
) -> None:
    w, half = worker(model, tmp_path, federation), widths_at(model.architecture, 0.5)
    ranking = rank(w)
    full_score, part_score = (
        w.execute(do.Evaluate(1, w.put_initial_model(), ranking=ranking, widths=n)) for n in ((), half)
    )
    tensors = tensorfile.decode(w.store.read(w.put_initial_model()))
    half_tensors = Selection.from_json(w.store.read(ranking), model.architecture).with_widths(half).gather(tensors)
    half_metrics = Evaluator(ModelSessions(model, 1), RECIPE, (federation.x, federation.y))(half_tensors, half)
    assert part_score == on.Evaluated(1, half_metrics)
    assert part_score != full_score


def test_a_part_of_more_work_trains_the_recipes_epochs_as_often(model: Model, tmp_path: Path) -> None:
    w, widths = worker(model, tmp_path), model.architecture.sizes
    basis = do.Basis(1, w.put_initial_model(), rank(w))
    once, thrice = (w.execute(do.Extract(basis, replace(part("a", widths), work=n))) for n in (1, 3))
    assert isinstance(once, on.Extracted)
    assert isinstance(thrice, on.Extracted)
    epochs = [Recipe.from_dict(event.offer["recipe"]).epochs for event in (once, thrice)]
    assert epochs == [RECIPE.epochs, 3 * RECIPE.epochs]


def test_order_repetition_and_a_lost_worker_change_no_bit(model: Model, federation: Digits, tmp_path: Path) -> None:
    first = worker(model, tmp_path)
    updates = contributions(first, model, rank(first), federation)
    end = close(updates)
    for update in updates:
        first.execute(fold(update))
    expected = first.execute(end)

    shuffled = worker(model, tmp_path)
    for update in [updates[2], updates[0], updates[2], updates[1], updates[0]]:
        shuffled.execute(fold(update))
    fresh = worker(model, tmp_path)

    assert shuffled.execute(end) == expected
    assert fresh.execute(end) == expected
    assert fresh.execute(end) == expected


def file_of(shape: object, size: int) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


HOSTILE = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=100).map(lambda b: len(b).to_bytes(8, "little") + b),
    st.builds(
        file_of,
        st.lists(st.sampled_from([0, 1, 2, 2**31, 2**40, -1, 1.5, "x"]), max_size=80),
        st.sampled_from([0, 4, 8]),
    ),
    st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=8)),
)
"""Any bytes, headers of any bytes, any shapes; or where to damage a good update, and how."""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(file_of([1] * 65, 4))
@example(file_of([0, 2**40, 2**40], 0))
@given(HOSTILE)
def test_any_bytes_are_an_update_or_a_rejection(model: Model, tmp_path: Path, raw: bytes | tuple[int, bytes]) -> None:
    w = worker(model, tmp_path)
    start, ranking = w.put_initial_model(), rank(w)
    widths = widths_at(model.architecture, 0.25)
    selection = Selection.from_json(w.store.read(ranking), model.architecture).with_widths(widths)
    good = tensorfile.encode(selection.gather(model.tensors))
    if isinstance(raw, tuple):
        offset, damage = raw
        raw = good[:offset] + damage + good[offset + len(damage) :]
    sent = w.store.put(good).sha256
    update = contribution(do.Basis(1, start, ranking), part("a", widths), w.store.put(raw).sha256, sent=sent)
    answer = w.execute(fold(update))

    assert isinstance(answer, (on.Folded, on.UpdateRejected))


def test_an_update_that_trips_our_own_code_costs_only_itself(
    model: Model, federation: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, fresh = worker(model, tmp_path), worker(model, tmp_path)
    good, bad, last = contributions(w, model, rank(w), federation)
    w.execute(fold(good))
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "decode", lambda raw: 1 / 0)
        answer = w.execute(fold(bad))
    assert isinstance(answer, on.UpdateRejected)
    assert "ZeroDivisionError" in answer.reason

    end = close([good, last])
    assert w.execute(end) == fresh.execute(end)


def test_a_diverged_model_has_no_loss(model: Model, federation: Digits, tmp_path: Path) -> None:
    w = worker(model, tmp_path, federation)
    wild = {k: np.full_like(v, np.inf) for k, v in model.tensors.items()}
    event = w.execute(do.Evaluate(1, w.store.put(tensorfile.encode(wild)).sha256))

    assert isinstance(event, on.Evaluated)
    assert sorted(event.metrics) == ["accuracy", "samples"]


def test_a_model_that_cannot_be_trained_is_refused_before_the_first_device_comes(model: Model, tmp_path: Path) -> None:
    graph = model.graph.copy()
    next(n for n in graph.nodes if model.graph.outputs[0].name in n.outputs).outputs = ["before"]
    graph.emit("Compress", "before", out=model.graph.outputs[0].name)

    with pytest.raises(ModelError, match="Compress"):
        worker(replace(model, graph=graph), tmp_path).put_initial_model()


def test_a_pattern_of_personal_tensors_that_matches_nothing_is_refused_at_once(model: Model, tmp_path: Path) -> None:
    recipe = replace(RECIPE, personal=("fc.*", "haed.*"))
    with pytest.raises(ConfigError, match=r"recipe.personal: .*'haed\.\*'"):
        worker(model, tmp_path, recipe=recipe.to_dict()).put_initial_model()


def test_a_strategys_starter_makes_the_first_model(model: Model, tmp_path: Path) -> None:
    job = Job(strategy="fedprune", options={"ranking": "nested", "dropout": [0.25, 0.5]})
    plain, nested = worker(model, tmp_path), Worker(job, model, BlobStore(tmp_path, durable=False))
    plain_start, nested_start = (tensorfile.decode(w.store.read(w.put_initial_model())) for w in (plain, nested))

    assert all(np.array_equal(plain_start[n], v) for n, v in model.tensors.items())
    widths = [widths_at(model.architecture, density) for density in (0.25, 0.5)]
    expected = nest_widths(model.architecture, model.tensors, widths)
    assert any(not np.array_equal(plain_start[n], v) for n, v in expected.items())
    assert all(np.array_equal(nested_start[n], v) for n, v in expected.items())


def test_what_stays_frozen_is_started_as_it_was_given(model: Model, tmp_path: Path) -> None:
    job = Job(
        strategy="fedprune", options={"ranking": "nested", "dropout": [0.5]}, recipe=Recipe(frozen=("@head", "conv2.*"))
    )
    nested = Worker(job, model, BlobStore(tmp_path, durable=False))
    start = tensorfile.decode(nested.store.read(nested.put_initial_model()))

    assert all(np.array_equal(start[n], model.tensors[n]) for n in ("fc.weight", "conv2.weight"))
    assert not np.array_equal(start["conv3.weight"], model.tensors["conv3.weight"])


FROZEN = {"frozen": ("2.*",)}


@pytest.mark.parametrize(("job", "own"), [({}, {}), (FROZEN, {}), ({"trainable": ("0.*", "4.*")}, {}), ({}, FROZEN)])
def test_a_new_model_begins_with_weights_of_its_core_but_what_job_or_strategy_freezes_as_it_was_given(
    job: dict[str, Any], own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FedPrune, "recipe", lambda _self, recipe, _turn: replace(recipe, **own))
    layers = (nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    new = import_onnx(export_torch(nn.Sequential(*layers), input_shape=(6,), name="new"), "new")
    w = Worker(Job(strategy="fedprune", recipe=Recipe(**job)), new, BlobStore(tmp_path), None)

    def score(model: str, memory: dict[str, str], core: tuple[int, ...] = ()) -> on.Scored:
        scored = w.execute(do.Score(1, model, memory, ("a",), core))
        assert isinstance(scored, on.Scored)
        return scored

    given = w.put_initial_model()
    first = score(given, {}, (8, 8))
    other = score(first.model, first.memory, (4, 4))
    assert other != score(other.model, other.memory, (8, 8)) == first, "a round may begin again, with another core"
    assert score(first.model, first.memory).model == given, "and without one"

    start, is_frozen = tensorfile.decode(w.store.read(first.model)), bool(job or own)
    scale = np.float32(1.0 if is_frozen else 2**0.5)
    assert np.array_equal(start["2.weight"][:8, :8], new.tensors["2.weight"][:8, :8] * scale)
    assert np.array_equal(start["2.weight"][:8, 8:] == 0, np.full((8, 8), not is_frozen))
    assert np.array_equal(start["4.weight"][:, :8], new.tensors["4.weight"][:, :8] * np.float32(2**0.5))


def test_a_round_ends_with_self_distillation_where_strategy_and_samples_allow_it(
    model: Model, federation: Digits, tmp_path: Path
) -> None:
    plain = worker(model, tmp_path)
    end = close(contributions(plain, model, rank(plain), federation))

    def close_with(*, samples: bool, **options: object) -> str:
        settings = {"name": "t", "recipe": RECIPE.to_dict(), "strategy": "fedprune", "options": options}
        calibration = federation.calibration if samples else None
        event = Worker(Job.from_dict(settings), model, plain.store, None, calibration).execute(end)
        assert isinstance(event, on.Closed)
        return event.model

    distilled, measured = close_with(samples=True), close_with(samples=True, distill=0)
    mean = close_with(samples=False)
    assert close_with(samples=True) == distilled  # in a worker of its own
    assert close_with(samples=False, distill=0) == mean
    assert len({distilled, measured, mean}) == 3

    new, old = (tensorfile.decode(plain.store.read(digest)) for digest in (distilled, measured))
    norm = Calibration(model, federation.calibration, RECIPE.features)(new)
    assert tensorfile.encode(norm) == tensorfile.encode(new)  # with its own statistics
    assert any((new[t.name] != old[t.name]).any() for t in model.architecture.trainable)
