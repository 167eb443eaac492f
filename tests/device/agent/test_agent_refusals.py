"""Offers that an agent refuses, and what it keeps on its disk meanwhile."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune.model.element_mask import mask_to_bits, pack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ElementMask, Tensors
from fedprune.planning.costs import WEIGHT_FILES, storage_bytes
from fedprune.wire.messages import Birth, Offer, Refusal
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.state_store import FolderStateStore
from support.fakes.agent_harness import Bench
from support.fakes.hidden_board import HIDDEN, hidden_weights
from support.paths import GRAPHS

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"recipe": {"colour": 1}}, ExitCode.CONFIG),
        ({"recipe": {"proximal": 1.0}}, ExitCode.TRAINING),
        ({"recipe": {"lr": 1000.0, "epochs": 300, "weight_decay": 1000.0}}, ExitCode.DIVERGED),
        ({"classes": 2}, ExitCode.DATA),
        ({"weights": BlobRef("0" * 64, 2**40, "1" * 64)}, ExitCode.STORAGE_FULL),
    ],
)
def test_an_offer_that_cannot_be_carried_out_is_refused(bench: Bench, changes: dict[str, Any], code: int) -> None:
    bench.server.plan = [bench.server.offer(1, **changes)]
    refusal = bench.run_until(Refusal)
    assert (refusal.round, refusal.exit_code) == (1, code)
    assert refusal.reason


@pytest.mark.parametrize(("budget", "memory"), [(100, 10**9), (10**9, 100)])
def test_an_offer_beyond_the_profiles_limits_is_refused(bench: Bench, budget: int, memory: int) -> None:
    limits = SimpleNamespace(name="tiny", storage=SimpleNamespace(budget_bytes=budget), training_memory_bytes=memory)
    bench.profile = limits
    bench.server.plan = [bench.server.offer(1)]
    assert bench.run_until(Refusal).exit_code == ExitCode.PLAN
    assert bench.server.of(Birth)[0].profile == "tiny"


def call_after(patch: pytest.MonkeyPatch, function: Callable[[], None], owner: type, *names: str) -> None:
    """Call a function after each call of these methods."""
    for name in names:
        plain = getattr(owner, name)
        patch.setattr(owner, name, lambda self, *arguments, plain=plain: (plain(self, *arguments), function())[0])


def test_the_disk_never_holds_more_than_the_planner_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    server, measurements = bench.server, list[tuple[int, int]]()

    def measure_disk() -> None:
        files = [p.stat() for p in (bench.root / "state").rglob("*") if p.is_file()]
        sizes = {s.st_ino: s.st_size for s in files}.values()
        measurements.append((sum(sizes), sum(size == server.weights.size for size in sizes)))

    call_after(monkeypatch, measure_disk, ModelSlots, "stage", "install")
    server.plan = [server.offer(n) for n in (1, 2, 3, 4)]
    bench.run()
    graphs = server.graphs["plain"].size, server.graphs["inference"].size
    assert max(weights for _, weights in measurements) == WEIGHT_FILES
    assert max(total for total, _ in measurements) <= storage_bytes(server.weights.size, *graphs) + 8192


def hidden_offer(bench: Bench, number: int, recipe: Recipe, mask: ElementMask) -> Offer:
    """An offer of a masked model; what belongs to it lies at the server."""
    graphs, put = GRAPHS, bench.server.blobs.put
    blobs = {
        "training": put((graphs / "masked.onnx").read_bytes()),
        "inference": put((graphs / "hidden.onnx").read_bytes()),
        "weights": put(tensorfile.encode(pack_active(mask, hidden_weights(seed=number)))),
        "mask": put(tensorfile.encode(mask_to_bits(mask))),
    }
    return bench.server.offer(number, recipe, widths=(HIDDEN,), **blobs)


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
    file_counts = list[int]()

    def count_files() -> None:
        paths = [p for p in (bench.root / "state").rglob("*") if p.is_file()]
        files = {p.stat().st_ino: p for p in paths if p.suffix not in (".json", ".onnx") and p.name != "lock"}
        state_files = sum(p.parent.name == "own" for p in files.values()) * (
            (recipe.average > 0) + bool(recipe.personal)
        )
        sizes = [p.stat().st_size for p in files.values() if p.parent.name != "own"]
        file_counts.append(state_files + sum(round(n / weights) for n in sizes if n not in graphs))

    call_after(monkeypatch, count_files, ModelSlots, "stage", "install")
    call_after(monkeypatch, count_files, FolderStateStore, "stage", "commit")
    offers = [hidden_offer(bench, n, recipe, {"w1": np.ones((8, 6), np.bool_)}) for n in (1, 2, 3, 4)]
    weights, graphs = offers[0].weights.size, {offers[0].training.size, offers[0].inference.size}
    bench.server.plan = offers
    bench.run()
    assert 0 <= WEIGHT_FILES + recipe.extra_files - max(file_counts) <= 2


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
    assert bench.run_until(Refusal).exit_code == code


def test_weights_at_other_offsets_than_the_inference_graph_expects_are_refused(bench: Bench, weights: Tensors) -> None:
    raw = tensorfile.encode(weights, {"made": "by someone else" * 9})
    bench.server.plan = [bench.server.offer(1, weights=bench.server.blobs.put(raw))]
    assert "canonical" in bench.run_until(Refusal).reason


def test_a_model_that_contradicts_its_training_graph_never_serves(bench: Bench, weights: Tensors) -> None:
    server = bench.server
    server.plan = [server.offer(1)]
    bench.run()
    # The offset of the graph's second tensor, changed in place: it reads b from the middle of w.
    graph = server.blobs.read(server.graphs["inference"].sha256)
    start = tensorfile.tensor_offsets(tensorfile.encode(weights))["b"][2]
    wrong = graph.replace(str(start).encode(), str(start - 16).encode())
    assert wrong != graph
    server.plan = [server.offer(2, inference=server.blobs.put(wrong))]
    assert bench.run_until(Refusal).exit_code == ExitCode.MODEL
    with bench.reopen_store() as store:
        assert store.slots.current().round == 1
