"""Restarts, further attempts, and what a disk loses: an agent continues where it was."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fedprune.aggregation.fixed_point import Range
from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ExitCode
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.secure_aggregation.vector_form import TensorGrid, VectorForm
from fedprune.wire.messages import (
    Birth,
    BlobNotFound,
    BlobRequest,
    Refusal,
    RoundProgress,
    SecureStep,
    TrainingDone,
    UpdateAnnouncement,
)
from fedprune_device.data.dataset import LocalData
from fedprune_device.privacy.policy import PrivacyPolicy
from support.fakes.agent_harness import Bench, expected_tensors, same

pytestmark = pytest.mark.board


def test_an_update_that_was_not_accepted_is_announced_after_a_restart_without_training(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData
) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1)], False
    first = bench.run_until(UpdateAnnouncement)
    server.accepts, server.react = True, lambda _: None
    server.seen.clear()
    bench.run()
    assert server.updates[1] == first
    assert not [p for p in server.of(RoundProgress) if p.phase == "train"]
    assert server.of(Birth)[0].held == {"job": "job", "round": 1, "attempt": 0}


def test_training_that_was_cut_off_is_done_again_to_the_same_bits(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData
) -> None:
    server = bench.server
    recipe = Recipe(epochs=60, batch_size=1, lr=1e-3)
    server.plan = [server.offer(1, recipe)]
    bench.run_until(RoundProgress, phase="train")
    assert not server.of(UpdateAnnouncement)
    server.react = lambda _: None
    bench.run()
    assert same(server.result(1), expected_tensors(graphs, weights, data, 1, recipe))


def test_a_board_that_has_restarted_since_it_masked_refuses_the_sum_and_trains_for_the_next_attempt(
    bench: Bench, weights: Tensors
) -> None:
    server = bench.server
    form = VectorForm({name: TensorGrid(Range(5, 1)) for name in weights})
    wide = 1 + sum(value.size for value in weights.values())
    secure = {"tensors": form.to_json(), "narrow": 0, "wide": wide}
    offer = server.offer(1, Recipe(epochs=2, batch_size=16, secure_aggregation=True), secure=secure)
    server.plan, server.accepts = [offer], False
    bench.run_until(TrainingDone)
    (trained,) = server.of(TrainingDone)
    with bench.reopen_store() as store:  # as it is once a process has masked the update and was killed
        masked = store.blobs.put(bytes(8 * wide))
        store.keep_update(
            UpdateAnnouncement("d", "job", 1, 0, offer.weights.sha256, masked, trained.samples, trained.steps)
        )
    server.seen.clear()
    next_attempt = replace(offer, attempt=1)

    def react(message: Any) -> None:
        if isinstance(message, UpdateAnnouncement):
            server.say(SecureStep.of("job", 1, message.attempt, "0" * 32, "survivors", b"\1"))
        elif isinstance(message, Refusal):
            server.plan = [next_attempt]
            server.say(next_attempt)
        elif isinstance(message, TrainingDone) and bench.agent is not None:
            bench.agent.stop()

    server.react = react
    bench.run(until_finished=False)
    assert {update.attempt for update in server.of(UpdateAnnouncement)} == {0}
    assert "this board has restarted" in server.of(Refusal)[0].reason
    assert [message.attempt for message in server.of(TrainingDone)] == [1]


def test_a_round_that_promises_less_than_the_owner_asks_for_by_now_is_not_gone_on_with(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, Recipe(epochs=60, batch_size=1, lr=1e-3))]
    bench.run_until(RoundProgress, phase="train")
    bench.floor = PrivacyPolicy()
    assert bench.run_until(Refusal).exit_code == ExitCode.PRIVACY
    assert not server.of(UpdateAnnouncement)
    with bench.reopen_store() as store:
        assert store.task.done


def test_the_same_round_offered_again_takes_the_update_that_is_there(bench: Bench) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1)], False

    def react(message: Any) -> None:
        if isinstance(message, UpdateAnnouncement) and message.attempt == 0:
            server.accepts = True
            server.plan = [server.offer(1, attempt=1)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    assert server.updates[1].attempt == 1
    assert len({m.metrics["train_seconds"] for m in server.of(UpdateAnnouncement)}) == 1


def test_another_attempt_at_the_same_work_goes_on_where_the_first_one_is(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData
) -> None:
    server, recipe = bench.server, Recipe(epochs=60, batch_size=1, lr=1e-3)
    server.plan = [server.offer(1, recipe)]

    def react(message: Any) -> None:
        if isinstance(message, RoundProgress) and message.phase == "train" and message.attempt < 5:
            server.plan = [server.offer(1, recipe, attempt=message.attempt + 1)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    done = [(p.attempt, p.done) for p in server.of(RoundProgress) if p.phase == "train"]
    assert server.updates[1].attempt >= 2
    assert done == sorted(done)
    assert [d for _, d in done] == sorted(d for _, d in done)  # a repeated offer brings a report once more
    assert same(server.result(1), expected_tensors(graphs, weights, data, 1, recipe))


@pytest.mark.parametrize("blob", ["weights", "plain", "inference"])
def test_a_blob_that_the_disk_damaged_is_pulled_again(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData, blob: str
) -> None:
    server = bench.server
    bench.damage({"weights": server.weights, **server.graphs}[blob])
    server.plan = [server.offer(1, Recipe(epochs=2, batch_size=16), attempt=1)]
    bench.run()
    assert same(server.result(1), expected_tensors(graphs, weights, data, 1))


def test_a_blob_that_the_server_no_longer_has_is_a_refusal(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, weights=BlobRef.of(b"nowhere"))]
    bench.stop_on(Refusal)
    stop = server.react

    def react(message: Any) -> None:
        if isinstance(message, BlobRequest) and not server.blobs.has(message.sha256):
            server.say(BlobNotFound(message.sha256))
        stop(message)

    server.react = react
    bench.run(until_finished=False)
    assert "no longer has" in server.of(Refusal)[0].reason
