"""Rounds with secure aggregation: the model is that of plain sums, and the server sees no single update."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, ExitCode
from fedprune.jobs.job import Job
from fedprune.secure_aggregation.keys import SHARE_BYTES
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.strategies import compose
from fedprune.wire.messages import Cancelled, Refusal, SecureStep, TrainingDone, UpdateAnnouncement, parse_message
from fedprune_export.pruning.model import Model
from fedprune_server.cli.status import job_status, status_text
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import counted_devices
from support.fakes.masked_cohort import ServerView
from support.fakes.secure_fleet import SecureFleet

NAMES = ("a", "b", "c", "d", "e")


def plain(folder: Path, model: Model, names: tuple[str, ...] = NAMES, **settings: Any) -> State:
    """What boards make of the model that hand in their updates as they are."""
    return SecureFleet(folder / "plain", model, names, move_limit=0, **settings).run()


def test_masked_updates_give_the_model_of_plain_ones(model: Model, tmp_path: Path) -> None:
    """All count alike: of a sum with the weights 1000, 1000 and 1, the remainder by 1000 is the third update's."""
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True)
    fleet.board("c").samples = 1000
    state = fleet.run()
    assert counted_devices(state) == [list(NAMES)] * 2
    assert state.model == plain(tmp_path, model).model


@pytest.mark.parametrize("step", ["trained", "roster", "vector", "survivors"])
def test_a_fifth_of_the_boards_may_drop_out_at_any_step(model: Model, tmp_path: Path, step: str) -> None:
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    fleet.board("c").stops_at = step
    state = fleet.run()
    left = NAMES if step == "survivors" else ("a", "b", "d", "e")  # what has arrived then counts
    assert counted_devices(state) == [list(left)]
    assert state.model == plain(tmp_path, model, left, rounds=1).model


@pytest.mark.parametrize(("stops_at", "step"), [("session", "keys"), ("vector", "masks")])
def test_a_sum_is_logged_and_in_status_with_the_boards_that_it_lost(
    model: Model, tmp_path: Path, stops_at: str, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    fleet.board("c").stops_at = stops_at
    state = fleet.run()
    line = f"secure sum of 5 boards: 4 summed; lost at the step of {step}: c"
    assert f"round 1: {line}" in caplog.messages
    assert state.history[0]["notes"] == [line]
    with Storage.open_in(tmp_path / "secure") as storage:
        storage.put_settings({"job": Job(rounds=1, devices=5, secure_aggregation=True, move_limit=0.0).to_dict()})
    text = status_text(job_status(tmp_path / "secure"))
    assert line in text
    assert f"c: lost: it dropped out of the secure sum at the step of {step}" in text
    assert "refused" not in text


def test_the_server_can_compute_nothing_but_the_sum(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, NAMES, secure_aggregation=True, rounds=1)
    fleet.board("c").stops_at = "vector"
    fleet.run()
    transcript = fleet.transcript()
    session = SecureSumSession.from_bytes(transcript.requests["advertise"]["a"])
    view = ServerView(session, transcript)
    assert set(view.arrived) == {"a", "b", "d", "e"}
    assert view.revealed_groups() == [{"a", "b", "d", "e"}]
    for name, masked in view.arrived.items():
        # Without all masks that the server can remove, a vector is still spread over the whole range.
        left = view.unmasked_vector(name)
        assert np.median(np.abs(left.wide.view(np.int64).astype(np.float64))) > 2**60
        assert left.to_bytes() != masked.to_bytes()
    total = Vector.zeros(session)
    for name in view.arrived:
        total.add(view.unmasked_vector(name))
    assert int(total.wide[0]) == 4  # boards


def test_nothing_that_boards_send_holds_an_update(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, NAMES, secure_aggregation=True, rounds=1)
    fleet.run()
    vectors = [fleet.board(name).vector for name in NAMES]
    sent = b"".join(payload for _, payload in fleet.published)
    for vector in vectors:
        assert all(vector[at : at + 64] not in sent for at in range(8, len(vector) - 64, 4096))


def test_coded_updates_travel_in_half_the_bytes_and_give_nearly_the_same_model(model: Model, tmp_path: Path) -> None:
    settings = {"rounds": 3, "scorer": "ordered"}
    fleet = SecureFleet(tmp_path / "a", model, NAMES, secure_aggregation=True, compression="int8", **settings)
    state = fleet.run()
    assert counted_devices(state) == [list(NAMES)] * 3
    sizes = sorted({(m.round, m.weights.size) for m in fleet.of(UpdateAnnouncement)})
    assert len(sizes) == 3
    assert sizes[1][1] == sizes[2][1] < 0.6 * sizes[0][1]
    exact = plain(tmp_path, model, **settings)
    one, coded = (
        tensorfile.decode(BlobStore(tmp_path / at / "blobs").read(s.model))
        for at, s in (("a", state), ("plain", exact))
    )
    for name in one:
        distance = np.linalg.norm(coded[name] - model.tensors[name])
        assert np.linalg.norm(one[name] - coded[name]) < 0.03 * distance


def test_a_server_that_restarts_in_the_middle_of_a_sum_begins_it_again(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    daemon = fleet.daemon()
    board = fleet.board("a")

    def stopping(message: SecureStep) -> SecureStep:
        if message.step == "survivors":
            raise KeyboardInterrupt
        return message

    board.spoil = stopping
    with pytest.raises(KeyboardInterrupt):
        fleet.run_daemon(daemon)
    board.spoil = lambda message: message
    fleet.restart()
    state = fleet.run()
    assert counted_devices(state) == [list(NAMES)]
    assert state.model == plain(tmp_path, model, rounds=1).model
    assert len({m.sum for m in fleet.of(SecureStep)}) == 2


@pytest.mark.parametrize("direction", ["up", "down"])
def test_messages_that_get_lost_are_repeated(model: Model, tmp_path: Path, direction: str) -> None:
    """Each board's first message of each step gets lost, in one direction."""
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    to_server, publish, lost = fleet.air.to_server, fleet.air.publish, set[tuple[str, str]]()

    def first(topic: str, payload: bytes) -> bool:
        message = None if topic.endswith("blob") else parse_message(payload)
        if not isinstance(message, (TrainingDone, SecureStep, UpdateAnnouncement)):
            return False
        step = topic.split("/")[3], message.step if isinstance(message, SecureStep) else message.kind
        repeated = step in lost
        lost.add(step)
        return not repeated

    def lose_uplink(topic: str, payload: bytes) -> None:
        if direction == "down" or not first(topic, payload):
            to_server(topic, payload)

    def lose_downlink(topic: str, payload: bytes, qos: int = 1) -> bool:
        return (direction == "down" and first(topic, payload)) or publish(topic, payload, qos)

    fleet.air.to_server = lose_uplink  # type: ignore[method-assign]
    fleet.air.publish = lose_downlink  # type: ignore[method-assign]
    state = fleet.run()
    assert counted_devices(state) == [list(NAMES)]
    assert state.model == plain(tmp_path, model, rounds=1).model
    steps = {"up": {"trained", "keys", "shares", "update"}, "down": {"session", "roster", "delivery", "survivors"}}
    assert steps[direction] <= {step for _, step in lost}
    assert len(lost) >= len(NAMES) * len(steps[direction])


def test_a_late_refusal_of_an_earlier_round_leaves_a_board_in_its_sum(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, ("a", "b", "c"), secure_aggregation=True)
    late, to_server = [Refusal("c", "t", 1, 1, "too hot", ExitCode.STORAGE).to_bytes()], fleet.air.to_server

    def add_late_refusal(topic: str, payload: bytes) -> None:
        message = None if topic.endswith("blob") else parse_message(payload)
        of_c = isinstance(message, SecureStep) and topic.split("/")[3] == "c"
        to_server(topic, late.pop() if of_c and message.round == 2 and late else payload)

    fleet.air.to_server = add_late_refusal  # type: ignore[method-assign]
    state = fleet.run()
    assert not late
    assert counted_devices(state) == [["a", "b", "c"]] * 2
    assert fleet.air.now < fleet.job.deadline_s


EIGHT = ("a", "b", "c", "d", "e", "f", "g", "h")


def test_a_board_that_spoils_sums_is_found_named_and_left_out(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, EIGHT, secure_aggregation=True, rounds=5)
    fleet.board("c").spoil_vector = lambda vector: os.urandom(len(vector))
    state = fleet.run()
    assert state.at_fault == ["c"]
    assert state.devices["c"].excluded
    assert counted_devices(state)[-1] == [name for name in EIGHT if name != "c"]
    assert not any("c" in names for names in counted_devices(state))
    payloads = [payload for topic, payload in fleet.published if "/c/" in topic and b'"unmasking"' in payload]
    messages = [parse_message(payload) for payload in payloads]
    # Of 8 suspects, then 4, 2 and 1.
    assert len({message.sum for message in messages if isinstance(message, SecureStep)}) == 4
    assert fleet.air.now < fleet.job.deadline_s  # no attempt waits for the deadline
    fleet.job = replace(fleet.job, rounds=6)
    fleet.restart()  # and stays left out
    fleet.board("c").session += 1
    state = fleet.run()
    assert state.at_fault == ["c"]
    assert counted_devices(state)[-1] == [name for name in EIGHT if name != "c"]


def test_a_board_that_sends_false_shares_is_found(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, EIGHT, secure_aggregation=True, rounds=5)
    to_server = fleet.air.to_server

    def false(topic: str, payload: bytes) -> None:
        if "/c/" in topic and b'"unmasking"' in payload:
            step = parse_message(payload)
            assert isinstance(step, SecureStep)
            shares = (bytes(SHARE_BYTES)[:-1] + b"\x01") * (len(step.content) // SHARE_BYTES)
            payload = SecureStep.of(step.job, step.round, step.attempt, step.sum, step.step, shares).to_bytes()
        to_server(topic, payload)

    fleet.air.to_server = false  # type: ignore[method-assign]
    state = fleet.run()
    assert state.at_fault == ["c"]
    assert counted_devices(state)[-1] == [name for name in EIGHT if name != "c"]


def test_boards_that_announce_the_same_vector_end_neither_server_nor_job(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, NAMES, secure_aggregation=True, rounds=1)
    vectors: list[bytes] = []

    def shared(vector: bytes) -> bytes:
        vectors.append(vector)
        return vectors[0]

    for name in ("a", "b"):
        fleet.board(name).spoil_vector = shared
    (left,) = (device for device in fleet.run().history[0]["devices"].values() if device["progress"] != "folded")
    assert "as its own" in left["reason"]


def test_a_board_can_t_have_a_file_deleted_by_announcing_it_as_its_vector(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    digests: list[str] = []

    def file(vector: bytes) -> bytes:
        digests.append(fleet.store.put(b"x" * len(vector)).sha256)
        return fleet.store.read(digests[-1])

    fleet.board("c").spoil_vector = file
    state = fleet.run()
    assert fleet.store.has(digests[0])
    assert counted_devices(state) == [["a", "b", "d", "e"]]


def test_too_few_boards_of_a_width_are_left_out_and_never_seen(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, ("a", "b"), secure_aggregation=True, rounds=1)
    daemon = fleet.daemon()
    reasons: set[str] = set()

    def idle() -> None:
        reasons.update(task.reason for task in daemon.main_runner.state.tasks.values())
        if not daemon.is_busy:
            fleet.air.now += 0.5
        if fleet.air.now > 200:
            raise TimeoutError

    fleet.air.on_idle = idle
    with pytest.raises(TimeoutError):
        daemon.run(until_finished=True)
    assert "boards of the same channels in a secure sum: expected 3 or more, got 2" in reasons
    assert daemon.main_runner.state.history == []
    assert not fleet.of(SecureStep)


def test_a_board_whose_messages_are_damaged_drops_out(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    to_server = fleet.air.to_server

    def shorten_shares(topic: str, payload: bytes) -> None:
        if "/c/" in topic and b'"shares"' in payload:
            step = parse_message(payload)
            assert isinstance(step, SecureStep)
            payload = SecureStep.of(step.job, step.round, step.attempt, step.sum, "shares", b"short").to_bytes()
        to_server(topic, payload)

    fleet.air.to_server = shorten_shares  # type: ignore[method-assign]
    state = fleet.run()
    assert counted_devices(state) == [["a", "b", "d", "e"]]
    assert "sealed shares" in state.history[0]["devices"]["c"]["reason"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"strategy": "subflot"}, "uses single updates"),
        ({"options": {"robust": {"centre": "median"}}}, "robust mean"),
        ({"compression": "top-k"}, "rounds single updates"),
        ({"compression_down": "int8"}, "by which boards differ"),
        ({"recipe": {"secure_aggregation": True}}, r"secure_aggregation in \[job\]"),
    ],
)
def test_what_needs_single_updates_is_refused_by_name(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compose(Job.from_dict({"secure_aggregation": True, **settings}))


def test_a_simulation_of_boards_that_would_mask_is_refused_by_name(model: Model) -> None:
    job = Job.from_dict({"name": "t", "devices": len(NAMES), "secure_aggregation": True})
    devices: Any = [SimpleNamespace(name=name) for name in NAMES]
    with pytest.raises(ConfigError, match=r"job\.secure_aggregation") as caught:
        Simulation(Experiment("t", job, model, devices), BlobStore(Path("never-written"), durable=False))
    assert "Simulate the job without it, with move_limit = 0" in caught.value.hint


SIGMA, CLIP = 3.0, 0.1
PRIVATE = {
    "strategy": "fedavg",
    "privacy": {"clip": CLIP, "noise_multiplier": SIGMA, "noise": "shared", "boards": len(NAMES)},
}


def test_shared_noise_is_in_the_sum_and_costs_what_it_costs_without_masks(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, **PRIVATE)
    state, expected = fleet.run(), plain(tmp_path, model, **PRIVATE)
    assert counted_devices(state) == [list(NAMES)] * 2
    assert [r["model"] for r in state.history] == [r["model"] for r in expected.history]
    paid = [(r["metrics"]["epsilon"], r["metrics"]["epsilon_next"]) for r in state.history]
    assert paid == [(r["metrics"]["epsilon"], r["metrics"]["epsilon_next"]) for r in expected.history]
    assert 0 < paid[0][0] < paid[0][1] == paid[1][0]

    quiet = {"strategy": "fedavg", "privacy": {"clip": CLIP}, "rounds": 1}
    without = SecureFleet(tmp_path / "quiet", model, NAMES, secure_aggregation=True, **quiet).run()
    blobs, silent = (BlobStore(tmp_path / at / "blobs") for at in ("secure", "quiet"))
    one = tensorfile.decode(blobs.read(state.history[0]["model"]))
    noiseless = tensorfile.decode(silent.read(without.history[0]["model"]))
    trainable = [spec.name for spec in model.architecture.tensors if spec.kind.is_trainable]
    noise = np.concatenate([(one[n].astype(np.float64) - noiseless[n]).ravel() for n in trainable]) * len(NAMES)
    # The variance of n normal numbers is off by √(2/n) of itself; four times that is one test in 16,000.
    assert noise.var() == pytest.approx((SIGMA * CLIP) ** 2, rel=4 * np.sqrt(2 / noise.size))
    assert abs(noise.mean()) < 4 * SIGMA * CLIP / np.sqrt(noise.size)


def test_a_running_job_may_begin_to_mask(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path, model, NAMES, rounds=2, move_limit=0)
    fleet.board("a").stops_at = "trained"
    daemon = fleet.daemon()

    def idle() -> None:
        fleet.air.now += 0.0 if daemon.is_busy else 0.5
        if fleet.air.now > 2:
            raise KeyboardInterrupt

    fleet.air.on_idle = idle
    with pytest.raises(KeyboardInterrupt):
        daemon.run(until_finished=True)
    assert fleet.of(UpdateAnnouncement)
    fleet.published.clear()
    fleet.restart()
    fleet.board("a").stops_at = ""
    for name in NAMES:
        fleet.board(name).offer = fleet.board(name).pending = None
    fleet.job = replace(fleet.job, secure_aggregation=True)
    assert counted_devices(fleet.run()) == [list(NAMES)] * 2
    assert fleet.of(TrainingDone)


def test_only_the_vector_that_a_board_has_announced_is_added(model: Model, tmp_path: Path) -> None:
    fleet = SecureFleet(tmp_path / "secure", model, NAMES, secure_aggregation=True, rounds=1)
    daemon = fleet.daemon()
    sums, board = daemon.main_runner._channel, fleet.board("c")
    accepted: list[bool] = []

    def hears(message: SecureStep) -> SecureStep:
        if message.step == "delivery":
            earlier_vector = fleet.store.put(b"masked for an earlier attempt").sha256
            accepted.append(sums.take_upload(on.UpdateStored("c", 1, message.attempt, earlier_vector)))
            accepted.append(sums.take_upload(on.UpdateRejected("c", 1, message.attempt - 1, "it is too large")))
        return message

    board.spoil = hears
    state = fleet.run_daemon(daemon)
    assert not any(accepted)
    assert len(accepted) >= 2
    assert counted_devices(state) == [list(NAMES)]
    assert state.model == plain(tmp_path, model, rounds=1).model


@pytest.mark.parametrize(
    "change", [{"round": 9}, {"weights": BlobRef("0" * 64, 7, "0" * 64)}], ids=["another round's", "plain"]
)
def test_an_update_that_no_sum_can_take_is_cancelled(model: Model, tmp_path: Path, change: dict[str, Any]) -> None:
    """Without an answer the board would repeat it for ever."""
    fleet = SecureFleet(tmp_path, model, NAMES, secure_aggregation=True, rounds=1)
    board = fleet.board("c")

    def announce(message: SecureStep) -> SecureStep:
        if message.step == "delivery":
            at = message.job, message.round, message.attempt
            update = UpdateAnnouncement("c", *at, "1" * 64, BlobRef("0" * 64, 8, "0" * 64), 10, 5, {})
            board.say(structs.replace(update, **change))
        return message

    board.spoil = announce
    fleet.run()
    assert [bool(m.reason) for m in board.heard if isinstance(m, Cancelled)] == [True]


@pytest.mark.parametrize(
    ("count", "stalling", "step"),
    [(4, "d", "survivors"), (4, "d", "roster"), (6, "ef", "delivery"), (6, "f", "session")],
)
def test_boards_that_stall_at_a_step_are_excluded_by_name_and_the_job_goes_on(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, stalling: str, step: str
) -> None:
    fleet = SecureFleet(tmp_path, model, tuple("abcdef"[:count]), secure_aggregation=True, rounds=3, deadline_s=500.0)
    for name in stalling:
        fleet.board(name).skips = step
    state = fleet.run()
    assert {name for name, device in state.devices.items() if device.excluded} == set(stalling)
    assert counted_devices(state)[-1] == sorted(set("abcdef"[:count]) - set(stalling))
    assert fleet.air.now < 100  # no step lasts until the deadline
    names = f": {', '.join(stalling)}"
    assert all(line.endswith(names) for line in caplog.messages if line.startswith("the secure sum failed"))
