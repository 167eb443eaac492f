"""The slabs that a round's offers name make every device's weights, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.jobs.state import Task
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune_device.network.blob_download import composed
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.executor.worker import Worker
from fedprune_server.maintenance.replay import _plain
from fedprune_server.simulation.digits import digits_model

DENSITIES = {"a": 1.0, "b": 0.25, "c": 0.5, "d": 0.5, "e": 1.0}


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits")


def worker(model: Model, folder: Path, strategy: str = "heterofl", least: int = 0, **settings: Any) -> Worker:
    job = Job(name="t", strategy=strategy, recipe=Recipe(), **settings)
    made = Worker(job, model, BlobStore(folder, durable=False), slabs=True)
    assert made._slabs is not None
    made._slabs._least = least
    return made


def extracts(w: Worker, widths: dict[str, tuple[int, ...]], densities: dict[str, float]) -> list[do.Extract]:
    first = w.initial()
    scored = w.execute(do.Score(1, first, {}, tuple(widths)))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(1, first, scored.ranking, scored.order)
    return [do.Extract(basis, do.Part(n, 1, widths[n], densities[n], 10, None)) for n in widths]


def channels(w: Worker) -> list[do.Extract]:
    """One round in which devices have different widths."""
    return extracts(w, {n: widths_at(w.architecture, d) for n, d in DENSITIES.items()}, DENSITIES)


def offers(w: Worker, commands: list[do.Extract]) -> dict[str, dict[str, Any]]:
    found = {}
    for command in commands:
        event = w.execute(command)
        assert isinstance(event, on.Extracted)
        found[event.device] = event.offer
    return found


def check(w: Worker, made: dict[str, dict[str, Any]], lengths: dict[str, int]) -> None:
    assert {n: len(o.get("slabs", [])) for n, o in made.items()} == lengths
    for offer in made.values():
        if "slabs" in offer:
            refs = [BlobRef.from_dict(ref) for ref in offer["slabs"]]
            assert composed(w.store, refs) == w.store.read(offer["weights"]["sha256"])


@pytest.mark.parametrize("strategy", ["heterofl", "plain", "fedavg"])
def test_devices_of_three_widths_get_up_to_three_slabs(model: Model, tmp_path: Path, strategy: str) -> None:
    w = worker(model, tmp_path, strategy)
    commands = channels(w)
    w.expect(commands)
    made = offers(w, commands)
    check(w, made, {"a": 3, "b": 1, "c": 2, "d": 2, "e": 3})
    assert made["c"]["slabs"] == made["a"]["slabs"][:2]
    sizes = [ref["size"] for ref in made["a"]["slabs"]]
    assert sum(sizes) < 1.1 * made["a"]["weights"]["size"] + 4096  # headers weigh something in so small a model


def test_masks_that_hold_each_other_make_slabs_too(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path, "fiarse")
    commands = extracts(w, dict.fromkeys(DENSITIES, w.architecture.sizes), DENSITIES)
    assert commands[0].basis.order is not None
    w.expect(commands)
    made = offers(w, commands)
    assert {bool("mask" in o) for o in made.values()} == {True, False}
    check(w, made, {"a": 3, "b": 1, "c": 2, "d": 2, "e": 3})


def test_widths_of_which_none_holds_the_other_are_no_chain(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path)
    sizes = w.architecture.sizes
    assert len(sizes) > 1
    one, other = (*sizes[:-1], 1), (1, *sizes[1:])
    commands = extracts(w, {"a": one, "b": one, "c": other}, dict.fromkeys("abc", 0.5))
    w.expect(commands)
    check(w, offers(w, commands), {"a": 1, "b": 1, "c": 0})


def test_what_is_a_device_s_own_travels_alone(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path, "subflot")
    commands = channels(w)
    w.expect(commands)
    check(w, offers(w, commands), dict.fromkeys(DENSITIES, 0))


def test_small_models_single_devices_and_the_unexpected_travel_alone(model: Model, tmp_path: Path) -> None:
    small = worker(model, tmp_path / "small", least=2**30)
    commands = channels(small)
    small.expect(commands)
    check(small, offers(small, commands), dict.fromkeys(DENSITIES, 0))

    w = worker(model, tmp_path / "unexpected")
    commands = channels(w)
    check(w, offers(w, commands), dict.fromkeys(DENSITIES, 0))
    w.expect(commands[:1])
    check(w, offers(w, commands[:1]), {"a": 0})
    w.expect(commands[:2])
    check(w, offers(w, commands), {"a": 2, "b": 1, "c": 0, "d": 0, "e": 2})


def test_without_being_asked_to_a_worker_makes_no_slabs(model: Model, tmp_path: Path) -> None:
    w = Worker(Job(name="t", strategy="heterofl"), model, BlobStore(tmp_path, durable=False))
    commands = channels(w)
    w.expect(commands)
    check(w, offers(w, commands), dict.fromkeys(DENSITIES, 0))


def test_slabs_that_were_deleted_are_made_again(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path)
    commands = channels(w)
    w.expect(commands)
    made = offers(w, commands)
    for ref in made["a"]["slabs"]:
        w.store.delete(ref["sha256"])
    again = offers(w, commands)
    assert again == made
    check(w, again, {"a": 3, "b": 1, "c": 2, "d": 2, "e": 3})


def test_a_replay_compares_what_was_worked_out_and_not_how_it_travelled(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path)
    commands = channels(w)
    plain = [w.execute(c) for c in commands]
    w.expect(commands)
    sliced = [w.execute(c) for c in commands]
    assert plain != sliced
    assert [_plain(e) for e in sliced] == plain


@pytest.mark.parametrize(("codec", "slabs"), [("zlib", True), ("float16", False), ("int8", False)])
def test_slabs_are_made_for_those_whose_weights_lose_nothing(
    model: Model, tmp_path: Path, codec: str, slabs: bool
) -> None:
    w = worker(model, tmp_path)
    commands = [replace(c, coding=do.Coding(weights=codec)) for c in channels(w)]
    w.expect(commands)
    made = offers(w, commands)
    check(w, made, {"a": 3, "b": 1, "c": 2, "d": 2, "e": 3} if slabs else dict.fromkeys("abcde", 0))
    assert all("coded" in o for o in made.values())

    # In the next round they hold them; with `int8` no two continue from the same.
    first = commands[0].basis
    moved = {n: v + np.float32(0.01) for n, v in tensorfile.decode(w.store.read(first.model)).items()}
    basis = replace(first, round=2, model=w.store.put(tensorfile.encode(moved)).sha256)
    then = [
        replace(
            c,
            basis=basis,
            coding=do.Coding(
                weights=codec,
                held=do.Held(o["selection"], o["ranking"], tuple(o["widths"]), o["weights"]["sha256"]),
            ),
        )
        for c, o in ((c, made[c.part.device]) for c in commands)
    ]
    w.expect(then)
    there = set(w.store.names())
    again = offers(w, then)
    assert all("held" in o for o in again.values())
    assert all(("slabs" in o) == (codec == "zlib") for o in again.values())
    # Nothing is left on the disk that no offer names.
    named = State(model="0" * 64, tasks={n: Task(1, (1,), offer=o) for n, o in again.items()}).references()
    assert set(w.store.names()) - there <= named


def test_a_state_needs_the_slabs_of_its_offers(model: Model, tmp_path: Path) -> None:
    w = worker(model, tmp_path)
    commands = channels(w)
    w.expect(commands)
    made = offers(w, commands)
    state = State(model="0" * 64, tasks={n: Task(1, (1,), offer=o) for n, o in made.items()})
    assert {ref["sha256"] for o in made.values() for ref in o["slabs"]} <= state.references()
    assert tensorfile.digest(b"") not in state.references()


def test_tensors_that_differ_between_widths_begin_another_chain(model: Model, tmp_path: Path) -> None:
    """Whatever makes a wide model of other values: its slab would be the model itself."""
    w = worker(model, tmp_path)
    commands = channels(w)
    assert w._slabs is not None
    make = w._slabs._make

    def scaled(command: do.Extract) -> Any:
        made = make(command)
        return type(made)(made.selection, {n: v * len(v) for n, v in made.tensors.items()}, made.mask)

    w._slabs._make = scaled
    w._slabs.expect(commands)
    kept = {}
    for command in commands:
        weights = w.store.put(tensorfile.encode(scaled(command).tensors))
        kept[command.part.device] = w._slabs.named(command, weights.sha256)
    assert {n: len(k["slabs"]) for n, k in kept.items()} == dict.fromkeys(DENSITIES, 1)
