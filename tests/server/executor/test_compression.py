"""Jobs whose updates travel in a codec: what is offered to whom, what is folded, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune.updates import CODECS, DOWNLOAD_CODECS, Codec, decode, encode, max_update_bytes
from fedprune.wire.messages import Birth, Offer, parse_message
from fedprune_device.training.received_weights import decode_weights
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.pruning.model import Model
from fedprune_server.executor.offer_entries import UPDATE_BOUND, UPDATE_SIZE, device_offer, update_misfit
from fedprune_server.executor.worker import Worker
from fedprune_server.simulation.digits import Digits, deal_digits
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import boards, digits_simulation

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b")
SETTINGS = ("int8", "int4", "top-k:0.05")


@pytest.fixture(scope="module")
def federation() -> Digits:
    return deal_digits(KINDS, seed=1)


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Simulation]:
    def make(folder: str, **settings: Any) -> Simulation:
        settings = {"rounds": 3, "density": 0.5, "recipe": Recipe(max_steps=3), **settings}
        return digits_simulation(tmp_path / folder, fleet=boards(KINDS), **settings)

    return make


def upload_bytes(run: Simulation) -> int:
    """Bytes that all devices sent."""
    return sum(row[1] for notes in run._run.rounds.values() for row in notes.spent.values())


def test_every_codec_saves_bytes_and_every_update_counts(simulate: Callable[..., Simulation]) -> None:
    plain = simulate("none")
    plain.run()
    before = upload_bytes(plain)
    for setting in SETTINGS:
        run = simulate(setting, compression=setting)
        run.run()
        for summary in run.state.history:
            assert {p["progress"] for p in summary["devices"].values()} == {"folded"}
        assert upload_bytes(run) < before
        before = upload_bytes(run)
        assert run.state.model != plain.state.model


class KillError(Exception):
    """Ends a simulation as a kill does."""


def test_a_kill_between_rounds_changes_no_bit(simulate: Callable[..., Simulation]) -> None:
    """What boards keep of what was left out is part of what is saved."""
    unkilled = simulate("whole", compression="top-k:0.05")
    unkilled.run()

    def kill(run: Simulation) -> None:
        if len(run.state.history) == 2:
            raise KillError

    with pytest.raises(KillError):
        simulate("killed", compression="top-k:0.05").run(kill)
    resumed = simulate("killed", compression="top-k:0.05")
    resumed.run()
    assert resumed.state.model == unkilled.state.model


def test_a_profile_may_have_a_codec_of_its_own(simulate: Callable[..., Simulation]) -> None:
    run = simulate("own", compression="int8", compression_of={KINDS[0]: "none"})
    run.run()
    offers = {name: task.offer or {} for name, task in run.state.tasks.items()}
    assert {name: offer.get("codec") for name, offer in offers.items()} == {KINDS[0]: None, KINDS[1]: "int8"}


@pytest.mark.parametrize(
    ("board_codecs", "coding"),
    [(CODECS, do.Coding("top-k:0.1", "int8")), (("int8", "newer"), do.Coding(None, "int8")), ((), do.Coding())],
)
def test_a_board_gets_no_codec_that_it_does_not_know(
    model: Model, board_codecs: tuple[str, ...], coding: do.Coding
) -> None:
    announced = parse_message(Birth("pi", 1, KINDS[1], 10, "test", codecs=board_codecs).to_bytes())
    assert isinstance(announced, Birth)
    coordinator = make_coordinator(
        Job(compression="top-k:0.1", compression_down="int8"), model.architecture, State("0" * 64)
    )
    coordinator.handle(on.DeviceBorn("pi", 1, find_profile(KINDS[1]).to_dict(), 10, None, announced.codecs or ()), 0.0)
    extract = coordinator.handle(on.Scored(1, "1" * 64), 0.0)
    assert [c.coding for c in extract if isinstance(c, do.Extract)] == [coding]
    with pytest.raises(ConfigError, match="compression_down"):
        Job(compression_down="top-k:0.1")


# -- weights that devices are sent ------------------------------------------------------------------------------------


def download_bytes(run: Simulation, since: int) -> int:
    """Bytes that all devices were sent from a round on."""
    rounds = (notes for number, notes in run._run.rounds.items() if number >= since)
    return sum(row[0] for notes in rounds for row in notes.spent.values())


@pytest.mark.parametrize("scorer", ["magnitude", pytest.param("ordered", marks=pytest.mark.soak)])
def test_weights_come_as_differences_to_those_that_a_board_holds(
    simulate: Callable[..., Simulation], scorer: str
) -> None:
    """Also where channels are ranked again in every round."""
    plain = simulate("none", scorer=scorer)
    plain.run()
    before = download_bytes(plain, 2)
    for setting in DOWNLOAD_CODECS:
        run = simulate(setting, scorer=scorer, compression_down=setting)
        run.run()
        assert {p["progress"] for p in run.state.history[-1]["devices"].values()} == {"folded"}
        assert download_bytes(run, 2) < before
        before = download_bytes(run, 2)
        assert run.state.model != plain.state.model
        for name, task in run.state.tasks.items():
            offer, board_model = task.offer or {}, run.state.devices[name].held
            assert offer["held"] != offer["weights"]["sha256"]
            assert board_model is not None
            assert board_model["weights"] == offer["weights"]["sha256"]
            assert {board_model["weights"], board_model["ranking"]} <= run.state.references()
            assert ("moved" in offer) == (scorer == "magnitude")


def test_a_board_decodes_what_the_server_goes_on_from(simulate: Callable[..., Simulation], tmp_path: Path) -> None:
    """From the bytes that travel and what it holds, and from nothing else."""
    run = simulate("int8", compression_down="int8")
    checked: list[Offer] = []

    def check(run: Simulation) -> None:
        for task in run.state.tasks.values():
            if run.state.round == 1 or task.progress is not Progress.OFFERED:
                continue
            offer = Offer.from_dict({"job": "x", "round": 3, "attempt": 1, **device_offer(task.offer or {})})
            store = BlobStore(tmp_path / str(len(checked)))
            assert offer.coded is not None
            assert offer.moved is not None
            for digest in (offer.coded.sha256, offer.moved.sha256, offer.held or ""):
                store.put(run.store.read(digest))
            assert set(offer.blobs_to_pull(store.has)) == {*offer.blobs(), offer.coded} - {offer.weights}
            assert decode_weights(offer, store.read) == (run.store.read(offer.weights.sha256),)
            checked.append(offer)

    run.run(check)
    assert checked


# -- what is fetched and folded ---------------------------------------------------------------------------------------


def make_offer(worker: Worker, device: str, codec: str | None) -> dict[str, Any]:
    scored = worker.execute(do.Score(1, worker.put_initial_model(), {}, (device,)))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(1, worker.put_initial_model(), scored.ranking)
    device_part = do.DevicePart(device, 1, widths_at(worker.architecture, 0.5), 0.5, 10, None)
    extracted = worker.execute(do.Extract(basis, device_part, coding=do.Coding(codec)))
    assert isinstance(extracted, on.Extracted)
    return extracted.offer


def fold(worker: Worker, offer: dict[str, Any], weights: str, codec: str | None) -> on.Event:
    basis = do.Basis(1, worker.put_initial_model(), offer["ranking"])
    device_part = do.DevicePart("a", 1, tuple(offer["widths"]), 0.5, 10, None)
    contribution = do.Contribution(basis, device_part, offer["weights"]["sha256"], None, weights, 10, 1, codec=codec)
    return worker.execute(do.FoldUpdate(1, basis.model, {}, contribution))


def train_offer(worker: Worker, offer: dict[str, Any], federation: Digits) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights that were sent, and what training made of them."""
    start = tensorfile.decode(worker.store.read(offer["weights"]["sha256"]))
    result = Trainer(worker.store.read(offer["training"]["sha256"])).train(
        start, federation.devices[KINDS[0]], TrainingTask(Recipe(), seed=0, device="a", round=1, classes=10)
    )
    return start, {n: v.copy() for n, v in result.tensors.items()}


def test_sizes_beyond_the_bound_are_not_fetched(model: Model, federation: Digits, tmp_path: Path) -> None:
    worker = Worker(Job(), model, BlobStore(tmp_path), None)
    offer = make_offer(worker, "a", "int8")
    start, result = train_offer(worker, offer, federation)
    names = {t.name for t in model.architecture.trainable}
    codec = Codec("int8")
    assert offer[UPDATE_BOUND] == max_update_bytes(codec, {n: v.shape for n, v in start.items()}, names)
    assert len(encode(codec, result, start, names)[0]) <= offer[UPDATE_BOUND] < offer[UPDATE_SIZE]

    def misfit(size: int, offer: dict[str, Any] = offer) -> str:
        return update_misfit(offer, BlobRef("0" * 64, size, "0" * 64))

    assert not misfit(offer[UPDATE_BOUND])
    assert not misfit(offer[UPDATE_SIZE])  # plainly
    for size in (offer[UPDATE_BOUND] + 1, offer[UPDATE_SIZE] - 1, offer[UPDATE_SIZE] + 1):
        assert "in its codec" in misfit(size)
    plain = make_offer(worker, "a", None)
    assert not misfit(plain[UPDATE_SIZE], plain)
    assert misfit(offer[UPDATE_BOUND], plain)
    assert {UPDATE_BOUND, UPDATE_SIZE}.isdisjoint(device_offer(offer))


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_was_decoded_is_what_is_folded(model: Model, federation: Digits, tmp_path: Path, setting: str) -> None:
    worker = Worker(Job(), model, BlobStore(tmp_path), None)
    offer = make_offer(worker, "a", setting)
    start, result = train_offer(worker, offer, federation)
    codec = Codec.parse(setting)
    assert codec is not None
    names = {t.name for t in model.architecture.trainable}
    raw, _ = encode(codec, result, start, names)
    plainly = tensorfile.encode(decode(codec, raw, start, names))
    closed = []
    for update, coded in ((raw, setting), (plainly, setting), (plainly, None)):
        fresh = Worker(Job(), model, BlobStore(tmp_path), None)
        weights = fresh.store.put(update).sha256
        assert fold(fresh, offer, weights, coded) == on.Folded("a", 1, 1)
        basis = do.Basis(1, fresh.put_initial_model(), offer["ranking"])
        device_part = do.DevicePart("a", 1, tuple(offer["widths"]), 0.5, 10, None)
        contribution = do.Contribution(
            basis, device_part, offer["weights"]["sha256"], None, weights, 10, 1, codec=coded
        )
        closed.append(fresh.execute(do.Close(1, basis.model, {}, ("a",), (contribution,))))
    assert closed[0] == closed[1] == closed[2]


def test_an_update_that_nobody_offered_a_codec_for_is_refused(model: Model, federation: Digits, tmp_path: Path) -> None:
    worker = Worker(Job(), model, BlobStore(tmp_path), None)
    offer = make_offer(worker, "a", "int8")
    start, result = train_offer(worker, offer, federation)
    raw, _ = encode(Codec("int8"), result, start, {t.name for t in model.architecture.trainable})
    weights = worker.store.put(raw).sha256
    for codec in (None, "int4", "top-k:0.05"):
        assert isinstance(fold(worker, offer, weights, codec), on.UpdateRejected)
    assert fold(worker, offer, weights, "int8") == on.Folded("a", 1, 1)
