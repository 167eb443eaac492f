"""An agent's part in secure sums, and offers of masked updates that it refuses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from fedprune.aggregation.fixed_point import Range
from fedprune.core.errors import ExitCode
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.secure_aggregation.collector import Collector
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import decode_roster
from fedprune.secure_aggregation.participant import Participant
from fedprune.secure_aggregation.session import SecureSumSession, task_digest
from fedprune.secure_aggregation.vector_form import TensorGrid, VectorForm
from fedprune.security.keys import KEY_BYTES, SigningKey, VerifyingKey
from fedprune.wire.messages import Accepted, Offer, Refusal, SecureStep, TrainingDone, UpdateAnnouncement
from fedprune_device.data.dataset import LocalData
from support.fakes.agent_harness import Bench, expected_tensors

pytestmark = pytest.mark.board

RECIPE = Recipe(epochs=2, batch_size=16, secure_aggregation=True)


def form_of(weights: Tensors) -> VectorForm:
    return VectorForm({name: TensorGrid(Range(5, 1)) for name in weights})


def masked_offer(bench: Bench, weights: Tensors, **fields: Any) -> Offer:
    wide = 1 + sum(value.size for value in weights.values())
    secure = {"tensors": form_of(weights).to_json(), "narrow": 0, "wide": wide}
    return bench.server.offer(1, **{"recipe": RECIPE, "secure": secure, **fields})


def task_of(offer: Offer) -> str:
    return task_digest(offer.selection, offer.weights.sha256, offer.recipe, offer.secure)


class Sums:
    """Secure sums of the agent and two boards whose vectors are 0.

    Args:
        announced: Called with the agent's masked update; returns whether the sum goes on.
    """

    def __init__(self, bench: Bench, offer: Offer, announced: Callable[[UpdateAnnouncement], bool]) -> None:
        self._bench, self._on_update_announced = bench, announced
        self._wide, self.task = offer.secure["wide"], task_of(offer)
        self.vectors: list[bytes] = []
        self.total: Vector | None = None
        self._attempt, self._awaits_vector = -1, False

    def react(self, message: Any) -> None:
        match message:
            case TrainingDone() if message.attempt != self._attempt:
                self._begin(message.attempt)
            case SecureStep() if message.attempt == self._attempt:
                self._on_answer(message.step, message.content)
            case UpdateAnnouncement() if message.attempt == self._attempt and self._awaits_vector:
                self._awaits_vector = False
                vector = self._bench.store.blobs.read(message.weights.sha256)
                self.vectors.append(vector)
                if self._on_update_announced(message):
                    self._collector.add_masked("d", vector)
                    self._digest = message.weights.sha256
                    self._survivors = self._collector.survivors()
                    self._send("survivors", self._survivors["d"])

    def _begin(self, attempt: int) -> None:
        self._attempt, self._awaits_vector = attempt, False
        keys = {name: SigningKey.make() for name in ("e", "f")}
        self._directory: dict[str, VerifyingKey] = {name: key.verifying_key for name, key in keys.items()}
        session = self._session = SecureSumSession.choose(b"a test", 3, 0, self._wide, task=self.task, dropping=0.0)
        self._collector = Collector(session, self._directory)
        self._participants = {name: Participant(session, name, key, self._directory) for name, key in keys.items()}
        for name, participant in self._participants.items():
            self._collector.add_advertisement(name, participant.advertise())
        self._send("session", session.to_bytes())

    def _on_answer(self, step: str, content: bytes) -> None:
        if step == "keys" and "d" not in self._directory:
            self._directory["d"] = VerifyingKey(content[:KEY_BYTES])
            self._collector.add_advertisement("d", content[KEY_BYTES:])
            rosters = self._collector.rosters()
            for name, participant in self._participants.items():
                self._collector.add_shares(name, participant.share(rosters[name]))
            around = b"".join(self._directory[name].raw for name in decode_roster(rosters["d"], self._session))
            self._send("roster", (len(around) // KEY_BYTES).to_bytes(2, "big") + around + rosters["d"])
        elif step == "shares" and not self._awaits_vector:
            self._collector.add_shares("d", content)
            deliveries: Mapping[str, bytes] = self._collector.deliveries()
            for name, participant in self._participants.items():
                self._collector.add_masked(name, participant.mask(deliveries[name], Vector.zeros(self._session)))
            self._awaits_vector = True
            self._send("delivery", deliveries["d"])
        elif step == "unmasking" and self.total is None:
            self._collector.add_unmasking("d", content)
            for name, participant in self._participants.items():
                self._collector.add_unmasking(name, participant.unmask(self._survivors[name]))
            self.total = self._collector.total()
            self._bench.server.plan = []
            self._bench.server.say(Accepted("job", 1, self._attempt, self._digest))
            self._bench.stop_once_quiet()

    def _send(self, step: str, content: bytes) -> None:
        self._bench.server.say(SecureStep.of("job", 1, self._attempt, f"{self._attempt:032x}", step, content))


@pytest.mark.parametrize("attempts", [1, 2])
def test_an_agent_masks_its_update_again_for_each_attempt_and_trains_once(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData, attempts: int
) -> None:
    server = bench.server
    offer = masked_offer(bench, weights)
    server.plan, server.accepts = [offer], False

    def announced(update: UpdateAnnouncement) -> bool:
        if update.attempt + 1 == attempts:
            return True
        server.plan = [structs.replace(offer, attempt=update.attempt + 1)]
        server.say(server.plan[0])
        return False

    sums = Sums(bench, offer, announced)
    server.react = sums.react
    bench.run(until_finished=False)
    vector, _ = form_of(weights).encode(expected_tensors(graphs, weights, data, 1, RECIPE), weights)
    assert sums.total is not None
    assert sums.total.to_bytes() == vector.to_bytes()
    assert len({vector.to_bytes(), *sums.vectors}) == 1 + attempts
    assert {message.attempt for message in server.of(UpdateAnnouncement)} == set(range(attempts))
    assert len({message.metrics["train_seconds"] for message in server.of(TrainingDone)}) == 1
    last = next(i for i, m in enumerate(server.seen) if isinstance(m, TrainingDone) and m.attempt + 1 == attempts)
    late = [message for message in server.seen[last:] if isinstance(message, UpdateAnnouncement)]
    assert {message.attempt for message in late} == {attempts - 1}, "it announces a vector of an earlier sum"
    with bench.reopen_store() as store:
        assert store.pending is None
        assert store.task.done


@pytest.mark.parametrize(
    ("changes", "expects"),
    [({"secure": None}, "present"), ({"recipe": replace(RECIPE, secure_aggregation=False)}, "absent")],
)
def test_an_offer_whose_recipe_and_vector_disagree_is_refused(
    bench: Bench, weights: Tensors, changes: dict[str, Any], expects: str
) -> None:
    bench.server.plan = [masked_offer(bench, weights, **changes)]
    refusal = bench.run_until(Refusal)
    assert refusal.exit_code == ExitCode.PROTOCOL
    assert f"offer: secure: expected {expects}" in refusal.reason
    assert not bench.server.of(TrainingDone)
    assert not bench.server.of(UpdateAnnouncement)


@pytest.mark.parametrize("weight", [0, "1"])
def test_a_board_refuses_a_weight_of_the_server_s_choice(bench: Bench, weights: Tensors, weight: object) -> None:
    offer = masked_offer(bench, weights)
    bench.server.plan = [structs.replace(offer, secure={**offer.secure, "weight": weight})]
    refusal = bench.run_until(Refusal)
    assert refusal.exit_code == ExitCode.PROTOCOL
    assert "weight" in refusal.reason
    assert not bench.server.of(TrainingDone)


def coarser(offer: Offer) -> Offer:
    tensors = [[name, exponent + 1, limbs, step] for name, exponent, limbs, step in offer.secure["tensors"]]
    return structs.replace(offer, secure={**offer.secure, "tensors": tensors})


@pytest.mark.parametrize(
    "change_offer", [coarser, lambda offer: structs.replace(offer, recipe={**offer.recipe, "lr": 1e-12})]
)
def test_a_board_leaves_a_sum_whose_other_boards_are_asked_for_something_else(
    bench: Bench, weights: Tensors, change_offer: Callable[[Offer], Offer]
) -> None:
    """What the others send could be 0, and the sum this board's update."""
    offer = masked_offer(bench, weights)
    bench.server.plan, bench.server.accepts = [offer], False
    sums = Sums(bench, offer, lambda update: True)
    sums.task = task_of(change_offer(offer))

    def react(message: Any) -> None:
        sums.react(message)
        if isinstance(message, Refusal):
            bench.agent.stop()

    bench.server.react = react
    bench.run(until_finished=False)
    assert bench.server.of(Refusal)[0].exit_code == ExitCode.PROTOCOL
    assert not bench.server.of(SecureStep)
    assert not bench.server.of(UpdateAnnouncement)
