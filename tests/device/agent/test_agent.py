"""What an agent says and hears: rounds, lost and wrong messages, cancellations, presence."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.wire.messages import (
    Birth,
    BlobNotFound,
    BlobRequest,
    Cancelled,
    Death,
    Finished,
    Hello,
    Refusal,
    RoundProgress,
    UpdateAnnouncement,
)
from fedprune_device.agent.offer_handler import OfferHandler
from fedprune_device.data.dataset import LocalData
from fedprune_device.serving.predictor import Predictor
from fedprune_device.storage.local_state import LocalState
from fedprune_device.training.evaluation import Evaluation
from support.fakes.agent_fleet import TOPICS
from support.fakes.agent_harness import LONG, Bench, expected_tensors, same

pytestmark = pytest.mark.board


def test_a_round_ends_with_what_training_gives(bench: Bench, graphs: Path, weights: Tensors, data: LocalData) -> None:
    bench.server.plan = [bench.server.offer(1)]
    bench.run()
    assert same(bench.server.result(1), expected_tensors(graphs, weights, data, 1))
    update = bench.server.updates[1]
    assert (update.samples, update.steps) == (70, 10)
    assert update.metrics["accuracy_after"] > update.metrics["accuracy_before"]
    assert update.metrics["samples_test"] == 20
    assert {"loss_first", "loss_last", "train_seconds", "download_seconds", "step_seconds"} <= set(update.metrics)
    assert update.metrics["peak_memory_bytes"] > 2**20


def test_own_predictions_are_adjusted_and_masked_as_the_recipe_says(bench: Bench, data: LocalData) -> None:
    recipe = Recipe(logit_adjustment=True, balance_classes=True, mask_absent_classes=True, proximal=0.1)
    bench.server.plan = [bench.server.offer(1, recipe, "full")]
    bench.run()
    assert isinstance(bench.server.seen[-1], Death), "it says that it ends"
    with bench.reopen_store() as store:
        assert (store.task, store.pending) == (None, None)
        predictor, record = store.slots.open()
    assert record.offset is not None
    assert record.present is not None
    right = np.mean(record.adjustment(predictor.predict(data.x_test)).argmax(1) == data.y_test)
    assert right == bench.server.updates[1].metrics["accuracy_after"]


@pytest.mark.parametrize("lost", [0.0, 0.15])
def test_messages_that_come_twice_or_are_lost_do_no_harm(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData, lost: float
) -> None:
    rng = np.random.default_rng(0)
    bench.server.plan = [bench.server.offer(1), bench.server.offer(2)]
    bench.server.mangle = lambda _, raw: [raw] * (2 if not lost else rng.random() > lost)
    bench.run()
    assert same(bench.server.result(2), expected_tensors(graphs, weights, data, 2))


@pytest.mark.parametrize("raw", [b"{", b"FPC\1"])
@pytest.mark.parametrize("topic", [TOPICS.down("d", "job"), TOPICS.down_blob("d", "job"), ""])
def test_one_bad_message_does_not_end_the_agent(bench: Bench, raw: bytes, topic: str) -> None:
    bench.server.plan = [bench.server.offer(1)]
    sent = []

    def react(message: Any) -> None:
        if isinstance(message, Birth):
            bench.server.link.deliver(topic, raw)
            sent.append(raw)

    bench.server.react = react
    bench.run()
    assert sent
    assert 1 in bench.server.updates


def test_a_cancellation_of_another_attempt_changes_nothing(bench: Bench) -> None:
    server, recipe = bench.server, Recipe(epochs=40, batch_size=1, lr=1e-3)
    server.plan, server.accepts = [server.offer(1, recipe, attempt=2)], False

    def react(message: Any) -> None:
        if isinstance(message, (RoundProgress, UpdateAnnouncement)):
            server.say(Cancelled("job", 1, 1, "too late"))
            server.accepts = isinstance(message, UpdateAnnouncement)

    server.react = react
    bench.run()
    assert server.updates[1].attempt == 2
    assert len({m.metrics["train_seconds"] for m in server.of(UpdateAnnouncement)}) == 1


def test_an_update_of_a_cancelled_attempt_is_dropped(bench: Bench) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1, attempt=2)], False

    def react(message: Any) -> None:
        if isinstance(message, UpdateAnnouncement):
            server.plan = []
            server.say(Cancelled("job", 1, 2, "too late"))
            bench.stop_once_quiet()

    server.react = react
    bench.run(until_finished=False)
    with bench.reopen_store() as store:
        assert store.pending is None
        assert store.task.done
        assert store.blobs.names() == sorted(b.sha256 for b in (server.graphs["plain"], server.graphs["inference"]))


def test_an_offer_that_was_cancelled_can_come_again_under_its_number(bench: Bench) -> None:
    server, recipe = bench.server, Recipe(epochs=40, batch_size=1, lr=1e-3)
    server.plan = [server.offer(1, recipe)]
    cancelled: list[bool] = []

    def react(message: Any) -> None:
        if isinstance(message, RoundProgress) and message.phase == "train" and not cancelled:
            cancelled.append(True)
            server.say(Cancelled("job", 1, 0, "too few devices"))

    server.react = react
    bench.run()
    assert cancelled
    assert 1 in server.updates


@pytest.mark.parametrize("sign", ["finished", "hello", "connection"])
def test_the_same_job_can_run_again_on_a_board_that_stayed_up(bench: Bench, sign: str) -> None:
    server = bench.server
    server.plan, server.ends = [server.offer(1)], False
    plain, runs = server.tick, set()

    def tick() -> None:
        if 1 in server.updates:
            runs.add(server.updates.pop(1).metrics["train_seconds"])
            if sign == "connection":
                server.link.drop()
                server.link.restore()
            else:
                server.say(Finished("job") if sign == "finished" else Hello())
            if len(runs) == 2:
                bench.agent.stop()
        plain()

    server.tick = tick  # type: ignore[method-assign]
    bench.run(until_finished=False)


def test_a_newer_offer_ends_the_older_one(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, LONG)]

    def react(message: Any) -> None:
        if isinstance(message, RoundProgress) and message.phase == "train" and message.round == 1:
            server.plan = [server.offer(2)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    assert list(server.updates) == [2]
    assert not server.of(Refusal)


def test_a_device_hands_out_nothing_but_its_update(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1)]
    asked = server.graphs["plain"].sha256

    def react(message: Any) -> None:
        if isinstance(message, UpdateAnnouncement):
            server.say(BlobRequest(asked, "data", 0, 1))

    server.react = react
    bench.run()
    assert BlobNotFound(asked) in server.seen


def test_training_goes_on_while_the_broker_is_away(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, Recipe(epochs=40, batch_size=1, lr=1e-3))]

    def react(message: Any) -> None:
        if isinstance(message, RoundProgress) and message.phase == "train" and len(server.of(Birth)) == 1:
            server.link.drop()
            threading.Timer(0.5, server.link.restore).start()

    server.react = react
    bench.run()
    assert len(server.of(Birth)) == 2
    assert 1 in server.updates


def test_it_is_quiet_only_when_a_restart_would_cost_nothing(bench: Bench) -> None:
    bench.server.plan = [bench.server.offer(1)]
    quiet_during: dict[str, bool] = {}

    def react(message: Any) -> None:
        quiet_during.setdefault(
            message.phase if isinstance(message, RoundProgress) else type(message).__name__, bench.agent.is_quiet
        )

    bench.server.react = react
    bench.run()
    assert bench.agent.is_quiet
    busy = {
        k: v
        for k, v in quiet_during.items()
        if k in ("BlobRequest", "UpdateAnnouncement", "download", "train", "evaluate")
    }
    assert {"BlobRequest", "UpdateAnnouncement"} <= set(busy)
    assert not any(busy.values()), quiet_during


@pytest.mark.parametrize("cancelled", [True, False])
def test_the_result_of_a_round_that_was_stopped_after_its_training_is_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """It is stopped by a cancellation, or by an offer of another job, whose state is current from then on."""
    server, recipe = bench.server, Recipe(average=0.5)
    server.plan = [server.offer(n, recipe, job="other" if n < 3 else "job") for n in (1, 2, 3, 4)]
    last, server.ends = server.offer(5, recipe, job="other"), False
    stopped, latency = threading.Event(), Evaluation.measure_latency

    def stopped_meanwhile(evaluation: Evaluation, model: Predictor) -> None:
        if 3 in server.updates and not stopped.is_set():
            server.plan = [] if cancelled else [last]
            server.say(Cancelled("job", 4, 0, "a test") if cancelled else last)
            assert stopped.wait(30)
        latency(evaluation, model)

    def watch() -> None:
        task = bench.store.task
        if task is not None and (task.offer == last or (task.offer.round, task.done) == (4, True)):
            stopped.set()
        if stopped.is_set() and bench.agent.is_quiet and (cancelled or 5 in server.updates):
            bench.agent.stop()

    monkeypatch.setattr(Evaluation, "measure_latency", stopped_meanwhile)
    server.watch = watch
    bench.run(until_finished=False)
    assert 4 not in server.updates
    with bench.reopen_store() as store:
        assert store.slots.current().round == (3 if cancelled else 5)
        for job, rounds in {"job": [3], "other": [1, 2] if cancelled else [2, 5]}.items():
            store.local_states.switch_to_job(job)
            assert sorted(LocalState.from_bytes(r).round for r in store.local_states.read().values()) == rounds


def test_an_agent_whose_every_turn_fails_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager would otherwise take it for healthy, since its loop still turns."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(OfferHandler, "turn", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        bench.run()
