from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hidden_board import HIDDEN, hidden_weights
from memory_fleet import TOPICS, MemoryLink, MemoryServer, clock

from fedprune import tensorfile
from fedprune.blobs import BlobStore
from fedprune.costs import WEIGHT_FILES, storage_bytes
from fedprune.element_mask import ElementMask
from fedprune.errors import ExitCode, StorageFullError
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.messages import Birth, Cancelled, Death, Finished, Gone, Hello, Progress, Refusal, Update, Want
from fedprune.wire.offer import Offer
from fedprune_device.agent import Agent
from fedprune_device.data import LocalData
from fedprune_device.duty import Duty
from fedprune_device.own import OwnFolder
from fedprune_device.slots import Slots
from fedprune_device.store import DeviceStore
from fedprune_device.trainer import Trainer

pytestmark = pytest.mark.board

LONG = Recipe(epochs=5000, batch_size=1, lr=1e-4)


class Bench:
    """An agent that can be started again and again on one state directory, and its server."""

    def __init__(self, root: Path, graphs: Path, weights: Tensors, data: LocalData) -> None:
        self.root, self.data = root, data
        self.server = MemoryServer(root / "server", graphs, weights)
        self.store: DeviceStore | None = None
        self.agent: Agent | None = None
        self.profile: Any = None

    def run(self, until_finished: bool = True, limit: float = 60.0) -> None:
        with DeviceStore(self.root / "state") as self.store:
            self.agent = Agent(
                "d", "site", self.store, MemoryLink(self.server), self.data, profile=self.profile, clock=clock
            )
            late = threading.Timer(limit, self.agent.stop)
            late.start()
            self.agent.run(until_finished)
            assert late.is_alive(), f"not done after {limit} s: {self.server.seen[-5:]}"
            late.cancel()

    def stop_on(self, kind: type, **fields: Any) -> None:
        def react(message: Any) -> None:
            if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items()):
                assert self.agent is not None
                self.agent.stop()

        self.server.react = react

    def stop_once_quiet(self) -> None:
        def watch() -> None:
            assert self.agent is not None
            if self.agent.quiet:
                self.agent.stop()

        self.server.watch = watch

    def damage(self, blob: BlobRef | None = None) -> Path:
        """Begin a long round, end in its midst, and let the disk damage a blob of its offer: the weights by default."""
        self.server.plan = [self.server.offer(1, LONG)]
        self.stop_on(Progress, phase="train")
        self.run(until_finished=False)
        self.server.react = lambda _: None
        with self.reopened() as store:
            damaged = store.blobs.path((blob or self.server.weights).sha256)
        damaged.write_bytes(b"rot")
        return damaged

    def reopened(self) -> DeviceStore:
        return DeviceStore(self.root / "state")


@pytest.fixture
def bench(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Iterator[Bench]:
    return Bench(tmp_path, graphs, weights, data)


def expected(graphs: Path, weights: Tensors, data: LocalData, number: int, recipe: Recipe | None = None) -> Tensors:
    trainer = Trainer(graphs / "plain.onnx")
    recipe = recipe or Recipe(epochs=2, batch_size=16)
    return trainer.train(weights, data, recipe, seed=7, device="d", round=number, classes=3).tensors


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(one[n].tobytes() == other[n].tobytes() for n in one)


def test_a_round_ends_with_what_training_gives(bench: Bench, graphs: Path, weights: Tensors, data: LocalData) -> None:
    bench.server.plan = [bench.server.offer(1)]
    bench.run()
    assert same(bench.server.result(1), expected(graphs, weights, data, 1))
    update = bench.server.updates[1]
    assert (update.samples, update.steps) == (70, 10)
    assert update.metrics["accuracy_after"] > update.metrics["accuracy_before"]
    assert update.metrics["samples_test"] == 20
    assert {"loss_first", "loss_last", "train_seconds", "download_seconds", "step_seconds"} <= set(update.metrics)
    assert update.metrics["peak_memory_bytes"] > 2**20


def test_the_trained_model_serves_and_nothing_is_left_to_do(bench: Bench, data: LocalData) -> None:
    bench.server.plan = [bench.server.offer(1), bench.server.offer(2)]
    bench.run()
    with bench.reopened() as store:
        assert (store.task, store.pending) == (None, None)
        predictor, record = store.slots.open()
        assert (record.job, record.round) == ("job", 2)
        right = np.mean(predictor.predict(data.x_test).argmax(1) == data.y_test)
        assert right == bench.server.updates[2].metrics["accuracy_after"]


def test_own_predictions_are_adjusted_and_masked_as_the_recipe_says(bench: Bench, data: LocalData) -> None:
    recipe = Recipe(logit_adjustment=True, balance_classes=True, mask_absent_classes=True, proximal=0.1)
    bench.server.plan = [bench.server.offer(1, recipe, "full")]
    bench.run()
    with bench.reopened() as store:
        predictor, record = store.slots.open()
    assert record.offset is not None
    assert record.present is not None
    right = np.mean(record.own(predictor.predict(data.x_test)).argmax(1) == data.y_test)
    assert right == bench.server.updates[1].metrics["accuracy_after"]


def test_messages_that_come_twice_do_no_harm(bench: Bench, graphs: Path, weights: Tensors, data: LocalData) -> None:
    bench.server.plan = [bench.server.offer(1), bench.server.offer(2)]
    bench.server.mangle = lambda _, raw: [raw, raw]
    bench.run()
    assert same(bench.server.result(2), expected(graphs, weights, data, 2))


@pytest.mark.parametrize("seed", range(3))
def test_lost_messages_only_cost_time(bench: Bench, graphs: Path, weights: Tensors, data: LocalData, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bench.server.plan = [bench.server.offer(1), bench.server.offer(2)]
    bench.server.mangle = lambda _, raw: [raw] if rng.random() > 0.15 else []
    bench.run()
    assert same(bench.server.result(2), expected(graphs, weights, data, 2))


def test_a_damaged_chunk_is_asked_for_again(bench: Bench, graphs: Path, weights: Tensors, data: LocalData) -> None:
    damaged = []

    def mangle(way: str, raw: bytes) -> list[bytes]:
        if way == "down" and raw.startswith(b"FPC") and len(damaged) < 5:
            damaged.append(raw)
            return [raw[:-1] + bytes([raw[-1] ^ 1])]
        return [raw]

    bench.server.plan = [bench.server.offer(1)]
    bench.server.mangle = mangle
    bench.run()
    assert len(damaged) == 5
    assert same(bench.server.result(1), expected(graphs, weights, data, 1))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"v":1,"type":"offer"}', b"FPC\1", b'{"v":9}', b"[" * 9000])
@pytest.mark.parametrize("topic", [TOPICS.down("d", "job"), TOPICS.down_blob("d", "job"), "elsewhere", ""])
def test_one_bad_message_does_not_end_the_agent(bench: Bench, raw: bytes, topic: str) -> None:
    bench.server.plan = [bench.server.offer(1)]
    sent = []

    def react(message: Any) -> None:
        if isinstance(message, Birth):
            assert bench.server.link is not None
            bench.server.link.deliver(topic, raw)
            sent.append(raw)

    bench.server.react = react
    bench.run()
    assert sent
    assert 1 in bench.server.updates


def test_a_cancelled_round_is_dropped_and_the_next_one_done(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, LONG)]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train" and server.plan[0].round == 1:
            server.plan = [server.offer(2)]
            server.say(Cancelled("job", 1, 0, "a test"))

    server.react = react
    bench.run()
    assert list(server.updates) == [2]


def test_a_cancellation_of_another_attempt_changes_nothing(bench: Bench) -> None:
    server, recipe = bench.server, Recipe(epochs=40, batch_size=1, lr=1e-3)
    server.plan, server.accepts = [server.offer(1, recipe, attempt=2)], False

    def react(message: Any) -> None:
        if isinstance(message, (Progress, Update)):
            server.say(Cancelled("job", 1, 1, "too late"))
            server.accepts = isinstance(message, Update)

    server.react = react
    bench.run()
    assert server.updates[1].attempt == 2
    assert len({m.metrics["train_seconds"] for m in server.of(Update)}) == 1


def test_an_update_of_a_cancelled_attempt_is_dropped(bench: Bench) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1, attempt=2)], False

    def react(message: Any) -> None:
        if isinstance(message, Update):
            server.plan = []
            server.say(Cancelled("job", 1, 2, "too late"))
            bench.stop_once_quiet()

    server.react = react
    bench.run(until_finished=False)
    with bench.reopened() as store:
        assert store.pending is None
        assert store.task is not None
        assert store.task.done
        assert store.blobs.names() == sorted(b.sha256 for b in (server.graphs["plain"], server.graphs["inference"]))


def test_an_offer_that_was_cancelled_can_come_again_under_its_number(bench: Bench) -> None:
    server, recipe = bench.server, Recipe(epochs=40, batch_size=1, lr=1e-3)
    server.plan = [server.offer(1, recipe)]
    cancelled: list[bool] = []

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train" and not cancelled:
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
                assert bench.agent is not None
                bench.agent.stop()
        plain()

    server.tick = tick  # type: ignore[method-assign]
    bench.run(until_finished=False)


def test_a_newer_offer_ends_the_older_one(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, LONG)]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train" and message.round == 1:
            server.plan = [server.offer(2)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    assert list(server.updates) == [2]
    assert not server.of(Refusal)


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ({"recipe": {"epochs": 0}}, ExitCode.CONFIG),
        ({"recipe": {"colour": 1}}, ExitCode.CONFIG),
        ({"recipe": {"proximal": 1.0}}, ExitCode.TRAINING),
        ({"recipe": {"lr": 1000.0, "epochs": 300, "weight_decay": 1000.0}}, ExitCode.TRAINING),
        ({"classes": 2}, ExitCode.DATA),
        ({"weights": BlobRef("0" * 64, 2**40, "1" * 64)}, ExitCode.STORAGE_FULL),
    ],
)
def test_an_offer_that_cannot_be_carried_out_is_refused(bench: Bench, other: dict[str, Any], code: int) -> None:
    bench.server.plan = [bench.server.offer(1, **other)]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    refusal = bench.server.of(Refusal)[0]
    assert (refusal.round, refusal.exit_code) == (1, code)
    assert refusal.reason


@pytest.mark.parametrize(("budget", "memory"), [(100, 10**9), (10**9, 100)])
def test_an_offer_beyond_the_profiles_limits_is_refused(bench: Bench, budget: int, memory: int) -> None:
    limits = SimpleNamespace(name="tiny", storage=SimpleNamespace(budget_bytes=budget), training_bytes=memory)
    bench.profile = limits
    bench.server.plan = [bench.server.offer(1)]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    assert bench.server.of(Refusal)[0].exit_code == ExitCode.PLAN
    assert bench.server.of(Birth)[0].profile == "tiny"


def test_the_disk_never_holds_more_than_the_planner_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen = bench.server, list[tuple[int, int]]()

    def look() -> None:
        files = [p.stat() for p in (bench.root / "state").rglob("*") if p.is_file()]
        sizes = {s.st_ino: s.st_size for s in files}.values()
        seen.append((sum(sizes), sum(size == server.weights.size for size in sizes)))

    def watched(name: str) -> None:
        plain = getattr(Slots, name)
        monkeypatch.setattr(Slots, name, lambda self, *given: (plain(self, *given), look())[0])

    watched("stage")
    watched("install")
    server.plan = [server.offer(n) for n in (1, 2, 3, 4)]
    bench.run()
    graphs = server.graphs["plain"].size, server.graphs["inference"].size
    assert max(weights for _, weights in seen) == WEIGHT_FILES
    documents = 8192
    assert max(total for total, _ in seen) <= storage_bytes(server.weights.size, *graphs) + documents


def hidden_offer(bench: Bench, number: int, recipe: Recipe, mask: ElementMask) -> Offer:
    """An offer of a masked model; what belongs to it lies at the server."""
    graphs, put = Path(__file__).parent / "graphs", bench.server.blobs.put
    blobs = {
        "training": put((graphs / "masked.onnx").read_bytes()),
        "inference": put((graphs / "hidden.onnx").read_bytes()),
        "weights": put(tensorfile.encode(mask.pack(hidden_weights(seed=number)))),
        "mask": put(tensorfile.encode(mask.to_tensors())),
    }
    return bench.server.offer(number, recipe, widths=(HIDDEN,), **blobs)


def test_a_mask_is_pulled_with_the_weights_and_an_average_lasts_from_round_to_round(bench: Bench) -> None:
    recipe = Recipe(epochs=1, batch_size=16, mask="hard", average=0.5, calibrate=True)
    mask = ElementMask({"w1": np.arange(48).reshape(8, 6) % 3 > 0})
    bench.server.plan = [hidden_offer(bench, n, recipe, mask) for n in (1, 2)]
    bench.run()
    one, two = (mask.unpack(bench.server.result(n)) for n in (1, 2))
    with bench.reopened() as store:
        record = store.slots.current()
        assert record is not None
        serves = tensorfile.load(bench.root / "state" / "serving" / record.slot / "weights.safetensors")
        assert not store.own.read()  # the job is over
    for name in ("w1", "gamma", "beta", "w2", "b2"):
        np.testing.assert_allclose(serves[name], 0.5 * one[name] + 0.5 * two[name], rtol=1e-6, atol=1e-7)
    assert not serves["w1"][~mask.active["w1"]].any()
    assert "accuracy_average" in bench.server.updates[2].metrics


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(mask="hard", calibrate=True),
        Recipe(mask="hard", average=0.5, calibrate=True),
        Recipe(mask="hard", average=0.5, personal=("*",), report_squares=True),
    ],
    ids=["calibrated", "average", "everything"],
)
def test_what_a_board_keeps_of_its_own_is_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """In files of the model's size, as the planner counts them; records of what is kept hold one or two."""
    seen = list[int]()

    def look() -> None:
        paths = [p for p in (bench.root / "state").rglob("*") if p.is_file()]
        files = {p.stat().st_ino: p for p in paths if p.suffix not in (".json", ".onnx") and p.name != "lock"}
        kept = sum(p.parent.name == "own" for p in files.values()) * ((recipe.average > 0) + bool(recipe.personal))
        sizes = [p.stat().st_size for p in files.values() if p.parent.name != "own"]
        seen.append(kept + sum(round(n / weights) for n in sizes if n not in graphs))

    def watched(owner: type, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given: (plain(self, *given), look())[0])

    watched(Slots, "stage")
    watched(Slots, "install")
    watched(OwnFolder, "put")
    mask = ElementMask({"w1": np.ones((8, 6), np.bool_)})
    offers = [hidden_offer(bench, n, recipe, mask) for n in (1, 2, 3, 4)]
    weights, graphs = offers[0].weights.size, {offers[0].training.size, offers[0].inference.size}
    bench.server.plan = offers
    bench.run()
    assert 0 <= WEIGHT_FILES + recipe.own_files - max(seen) <= 2


def test_an_offer_whose_mask_does_not_fit_is_refused(bench: Bench) -> None:
    mask = ElementMask({"w1": np.arange(48).reshape(8, 6) % 3 > 0})
    offer = hidden_offer(bench, 1, Recipe(mask="hard"), mask)
    other = bench.server.blobs.put(tensorfile.encode({"w1": np.zeros(6, np.uint8)}))
    bench.server.plan = [replace(offer, mask=other)]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    refusal = bench.server.of(Refusal)[0]
    assert refusal.exit_code == ExitCode.BUNDLE
    assert "mask and weights of the offer don't fit each other" in refusal.reason


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"w": np.zeros((3, 5), np.float32), "b": np.zeros(3, np.float32)}, ExitCode.TRAINING),
        ({"w": np.zeros((3, 6), np.float32)}, ExitCode.TRAINING),
        (None, ExitCode.BUNDLE),
    ],
)
def test_weights_that_do_not_fit_are_refused(bench: Bench, tensors: Tensors | None, code: int) -> None:
    raw = b"no tensors" if tensors is None else tensorfile.encode(tensors)
    bench.server.plan = [bench.server.offer(1, weights=bench.server.blobs.put(raw))]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    assert bench.server.of(Refusal)[0].exit_code == code


def test_weights_at_other_offsets_than_the_inference_graph_expects_are_refused(bench: Bench, weights: Tensors) -> None:
    raw = tensorfile.encode(weights, {"made": "by someone else" * 9})
    bench.server.plan = [bench.server.offer(1, weights=bench.server.blobs.put(raw))]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    assert "canonical" in bench.server.of(Refusal)[0].reason


def test_a_model_that_contradicts_its_training_graph_never_serves(bench: Bench, weights: Tensors) -> None:
    server = bench.server
    server.plan = [server.offer(1)]
    bench.run()
    # The offset of the graph's second tensor, changed in place: it reads b from the middle of w.
    graph = server.blobs.read(server.graphs["inference"].sha256)
    raw = tensorfile.encode(weights)
    start = tensorfile.offsets(raw)["b"][2]
    wrong = graph.replace(str(start).encode(), str(start - 16).encode())
    assert wrong != graph
    server.plan = [server.offer(2, inference=server.blobs.put(wrong))]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    assert server.of(Refusal)[0].exit_code == ExitCode.MODEL
    with bench.reopened() as store:
        serving = store.slots.current()
        assert serving is not None
        assert serving.round == 1


def test_a_refused_offer_that_comes_again_is_refused_again(bench: Bench) -> None:
    bench.server.plan = [bench.server.offer(1, recipe={"epochs": 0})]
    times = []

    def react(message: Any) -> None:
        if isinstance(message, Refusal):
            times.append(message)
            if len(times) == 3:
                assert bench.agent is not None
                bench.agent.stop()

    bench.server.react = react
    bench.run(until_finished=False)
    assert len(set(map(str, times))) == 1


def test_an_update_that_was_not_accepted_is_announced_after_a_restart_without_training(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData
) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1)], False
    bench.stop_on(Update)
    bench.run(until_finished=False)
    first = server.of(Update)[0]
    server.accepts, server.react = True, lambda _: None
    server.seen.clear()
    bench.run()
    assert server.updates[1] == first
    assert not [p for p in server.of(Progress) if p.phase == "train"]
    assert server.of(Birth)[0].held == {"job": "job", "round": 1, "attempt": 0}


def test_training_that_was_cut_off_is_done_again_to_the_same_bits(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData
) -> None:
    server = bench.server
    recipe = Recipe(epochs=60, batch_size=1, lr=1e-3)
    server.plan = [server.offer(1, recipe)]
    bench.stop_on(Progress, phase="train")
    bench.run(until_finished=False)
    assert not server.of(Update)
    server.react = lambda _: None
    bench.run()
    assert same(server.result(1), expected(graphs, weights, data, 1, recipe))


def test_a_round_goes_on_after_a_restart_beside_an_older_update(bench: Bench) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1)], False
    recipe = Recipe(epochs=60, batch_size=1, lr=1e-3)

    def react(message: Any) -> None:
        if isinstance(message, Update):
            server.plan = [server.offer(2, recipe)]
            server.say(server.plan[0])
        elif isinstance(message, Progress) and (message.phase, message.round) == ("train", 2):
            assert bench.agent is not None
            bench.agent.stop()

    server.react = react
    bench.run(until_finished=False)
    server.react, server.accepts = lambda _: None, True
    bench.run()
    assert 2 in server.updates


def test_the_same_round_offered_again_takes_the_update_that_is_there(bench: Bench) -> None:
    server = bench.server
    server.plan, server.accepts = [server.offer(1)], False

    def react(message: Any) -> None:
        if isinstance(message, Update) and message.attempt == 0:
            server.accepts = True
            server.plan = [server.offer(1, attempt=1)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    assert server.updates[1].attempt == 1
    assert len({m.metrics["train_seconds"] for m in server.of(Update)}) == 1


def test_another_attempt_at_the_same_work_goes_on_where_the_first_one_is(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData
) -> None:
    server, recipe = bench.server, Recipe(epochs=60, batch_size=1, lr=1e-3)
    server.plan = [server.offer(1, recipe)]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train" and message.attempt < 5:
            server.plan = [server.offer(1, recipe, attempt=message.attempt + 1)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    done = [(p.attempt, p.done) for p in server.of(Progress) if p.phase == "train"]
    assert server.updates[1].attempt >= 2
    assert done == sorted(done)
    assert [d for _, d in done] == sorted({d for _, d in done})
    assert same(server.result(1), expected(graphs, weights, data, 1, recipe))


def test_another_attempt_while_pulling_asks_for_nothing_twice(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1)]
    wants: list[Want] = []

    def react(message: Any) -> None:
        if isinstance(message, Want) and message.sha256 == server.graphs["inference"].sha256:
            wants.append(message)
            server.plan = [server.offer(1, attempt=1)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    assert server.updates[1].attempt == 1
    assert len(wants) == 1


def test_another_attempt_at_other_work_begins_anew(bench: Bench, weights: Tensors) -> None:
    server = bench.server
    other = server.blobs.put(tensorfile.encode({n: v + 1 for n, v in weights.items()}))
    server.plan = [server.offer(1, LONG)]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train" and message.attempt == 0:
            server.plan = [server.offer(1, attempt=1, weights=other)]
            server.say(server.plan[0])

    server.react = react
    bench.run()
    assert (server.updates[1].attempt, server.updates[1].base) == (1, other.sha256)


def test_a_server_that_lost_its_state_can_begin_again(bench: Bench, weights: Tensors) -> None:
    server = bench.server
    server.plan, server.ends = [server.offer(1), server.offer(2)], False
    bench.stop_on(Update, round=2)
    bench.run(until_finished=False)
    before = {u.weights for u in server.of(Update)}
    other = server.blobs.put(tensorfile.encode({n: v + 1 for n, v in weights.items()}))
    server.react, server.ends = lambda _: None, True
    server.updates.clear()
    server.plan = [server.offer(1, weights=other)]
    bench.run()
    assert server.updates[1].weights not in before


def test_an_offer_that_comes_late_again_changes_nothing(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1), server.offer(2, Recipe(epochs=40, batch_size=1, lr=1e-3))]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.round == 2:
            server.say(server.offer(1))

    server.react = react
    bench.run()
    assert sorted(server.updates) == [1, 2]
    assert not [p for p in server.of(Progress)[-1:] if p.round == 1]


def test_what_a_cancelled_offer_pulled_is_cleared_away(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, LONG)]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train":
            server.plan = []
            server.say(Cancelled("job", 1, 0, "too late"))
            bench.stop_once_quiet()

    server.react = react
    bench.run(until_finished=False)
    with bench.reopened() as store:
        assert not store.blobs.has(server.weights.sha256)


def test_what_a_refused_offer_pulled_is_cleared_away(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, classes=2)]
    bench.stop_on(Refusal)
    bench.run(until_finished=False)
    with bench.reopened() as store:
        assert not store.blobs.has(server.weights.sha256)


def test_what_nobody_refers_to_is_cleared_away_at_the_start(bench: Bench) -> None:
    with bench.reopened() as store:
        left = store.blobs.put(b"of a process that was killed").sha256
    bench.server.plan = [bench.server.offer(1, recipe={"epochs": 0})]
    bench.stop_on(Birth)
    bench.run(until_finished=False)
    with bench.reopened() as store:
        assert not store.blobs.has(left)


def test_room_that_an_offer_will_free_counts_for_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server = bench.server
    server.plan = [server.offer(1, attempt=3)]
    free = 3 * server.weights.size + 2 * max(b.size for b in server.graphs.values())
    with bench.reopened() as store:
        store.blobs.put(bytes(free))
    monkeypatch.setattr(DeviceStore, "free_bytes", lambda s: free - sum(map(s.blobs.size, s.blobs.names())))
    monkeypatch.setattr(Duty, "resume", lambda *_: None)  # or it would be gone by then
    bench.run()
    assert not server.of(Refusal)


@pytest.mark.parametrize("blob", ["weights", "plain", "inference"])
def test_a_blob_that_the_disk_damaged_is_pulled_again(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData, blob: str
) -> None:
    server = bench.server
    bench.damage({"weights": server.weights, **server.graphs}[blob])
    server.plan = [server.offer(1, Recipe(epochs=2, batch_size=16), attempt=1)]
    bench.run()
    assert same(server.result(1), expected(graphs, weights, data, 1))


def test_what_the_disk_damaged_is_not_deleted_once_another_attempt_pulls_it(
    bench: Bench, graphs: Path, weights: Tensors, data: LocalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, damaged = bench.server, bench.damage()
    listens, remove = threading.current_thread(), Path.unlink
    offered, pulled, deleted = threading.Event(), threading.Event(), threading.Event()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        """Offer the other attempt just as the damaged file is gone, and let it be pulled before anything else is."""
        remove(path, missing_ok=missing_ok)
        if path == damaged and not offered.is_set():
            offered.set()
            server.plan = [server.offer(1, Recipe(epochs=2, batch_size=16), attempt=1)]
            server.say(server.plan[0])
            if threading.current_thread() is not listens:
                pulled.wait(30)
        elif offered.is_set() and path.name == damaged.name:
            deleted.set()

    def react(message: Any) -> None:
        if isinstance(message, Want) and message.sha256 == damaged.name:
            pulled.set()
            deleted.wait(30)

    monkeypatch.setattr(Path, "unlink", unlink)
    server.react = react
    bench.run()
    assert offered.is_set()
    assert not server.of(Refusal)
    assert same(server.result(1), expected(graphs, weights, data, 1))


def test_a_damaged_blob_for_which_there_is_no_room_any_more_is_a_refusal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFullError("no room")

    bench.damage()
    bench.stop_on(Refusal)
    monkeypatch.setattr(BlobStore, "check_room", full)
    bench.run(until_finished=False)
    assert bench.server.of(Refusal)[0].exit_code == ExitCode.STORAGE_FULL


def test_a_blob_that_the_server_no_longer_has_is_a_refusal(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, weights=BlobRef.of(b"nowhere"))]
    bench.stop_on(Refusal)
    stop = server.react

    def react(message: Any) -> None:
        if isinstance(message, Want) and not server.blobs.has(message.sha256):
            server.say(Gone(message.sha256))
        stop(message)

    server.react = react
    bench.run(until_finished=False)
    assert "no longer has" in server.of(Refusal)[0].reason


def test_a_device_hands_out_nothing_but_its_update(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1)]
    asked = server.graphs["plain"].sha256

    def react(message: Any) -> None:
        if isinstance(message, Update):
            server.say(Want(asked, "data", 0, 1))

    server.react = react
    bench.run()
    assert Gone(asked) in server.seen


def test_training_goes_on_while_the_broker_is_away(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1, Recipe(epochs=40, batch_size=1, lr=1e-3))]

    def react(message: Any) -> None:
        if isinstance(message, Progress) and message.phase == "train" and len(server.of(Birth)) == 1:
            assert server.link is not None
            server.link.drop()
            threading.Timer(0.5, server.link.restore).start()

    server.react = react
    bench.run()
    assert len(server.of(Birth)) == 2
    assert 1 in server.updates


def test_a_hello_is_answered_with_a_birth(bench: Bench) -> None:
    server = bench.server
    server.plan = [server.offer(1)]
    server.react = lambda m: server.say(Hello()) if isinstance(m, Update) else None
    bench.run()
    assert len(server.of(Birth)) >= 2


def test_progress_comes_at_most_once_a_second(bench: Bench) -> None:
    bench.server.plan = [bench.server.offer(1, Recipe(epochs=40, batch_size=1, lr=1e-3))]
    began = clock()
    bench.run()
    assert 1 <= len(bench.server.of(Progress)) <= clock() - began + 1


def test_every_connection_has_a_number_of_its_own_and_a_will(bench: Bench, tmp_path: Path) -> None:
    with DeviceStore(tmp_path / "state", clock=lambda: 0.0) as store:
        agent = Agent("d", "site", store, MemoryLink(bench.server), bench.data)
        wills = [agent.will() for _ in range(3)]
    assert [topic for topic, _ in wills] == [TOPICS.up("d")] * 3
    assert [raw for _, raw in wills] == [Death("d", n).to_bytes() for n in (1, 2, 3)]


def test_an_agent_that_ends_says_so(bench: Bench) -> None:
    bench.server.plan = [bench.server.offer(1)]
    bench.run()
    assert isinstance(bench.server.seen[-1], Death)


def test_it_is_quiet_only_when_a_restart_would_cost_nothing(bench: Bench) -> None:
    bench.server.plan = [bench.server.offer(1)]
    seen: dict[str, bool] = {}

    def react(message: Any) -> None:
        assert bench.agent is not None
        seen.setdefault(message.phase if isinstance(message, Progress) else type(message).__name__, bench.agent.quiet)

    bench.server.react = react
    bench.run()
    assert bench.agent is not None
    assert bench.agent.quiet
    busy = {k: v for k, v in seen.items() if k in ("Want", "Update", "download", "train", "evaluate")}
    assert {"Want", "Update"} <= set(busy)
    assert not any(busy.values()), seen
