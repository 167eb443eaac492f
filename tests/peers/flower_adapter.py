"""Cases of `fedprune.flower` that run in Flower's own environment: every function that is called `case_...`.

`main` runs them and writes of every one that it is `ok`, or how it failed.
"""

import importlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flower_grid import InProcess
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedprune import strategies
from fedprune.aggregation.fold import Fold
from fedprune.core.errors import FedpruneError
from fedprune.flower import PRESETS, FedpruneStrategy, NodePart, answer
from fedprune.flower.presets import compose_for_flower
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune_export import importing
from fedprune_export.pruning.model import Model

ROOT = Path(__file__).parents[2]

UNIT = 2.0**-24
"""What a float32 is off by at most, relatively."""

QUIET: dict[str, Any] = {"fraction_evaluate": 0.0}


sys.modules["task"] = importlib.import_module("submodels.task")  # as the page calls it

_exported = cache(importing.load)


def _load(source: str) -> Model:
    """Export the one model of all cases once: that takes longer than all else."""
    torch().manual_seed(0)
    return _exported(source.removeprefix("submodels."))


importing.load = _load


def model() -> Model:
    return _load("task:Net")


def torch() -> Any:
    return importlib.import_module("torch")


@contextmanager
def refuses(text: str) -> Iterator[None]:
    """What is inside raises an error that says so."""
    try:
        yield
    except FedpruneError as error:
        if text not in str(error):
            raise AssertionError(f"{error} doesn't say {text!r}") from error
        return
    raise AssertionError(f"nothing was raised that says {text!r}")


def noisy(message: Message, context: Context) -> Message:
    """A node that "trains" by noise of its own, keyed by node and round."""
    if message.metadata.message_type == "query.fedprune":
        return answer(message, density=0.5)
    node_part = NodePart.of(message)
    rng = np.random.default_rng([context.node_id, node_part.round])
    tensors = {n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in node_part.tensors.items()}
    tensors = {n: np.abs(v) if n.endswith("var") else v for n, v in tensors.items()}
    return node_part.reply(tensors, samples=context.node_id - 90, steps=3, loss=1.0)


def one_round(strategy: Any, nodes: int = 3, **how: Any) -> tuple[InProcess, list[Message], dict[str, np.ndarray]]:
    """A round of noisy nodes: the grid, their replies and the new model."""
    grid = InProcess(nodes, noisy, **how)
    start = ArrayRecord({n: Array(v) for n, v in model().tensors.items()})
    if isinstance(strategy, FedpruneStrategy):
        start = strategy.arrays
    replies = list(grid.send_and_receive(list(strategy.configure_train(1, start, ConfigRecord(), grid))))
    arrays, _ = strategy.aggregate_train(1, replies)
    return grid, replies, read(arrays)


def read(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {n: arrays[n].numpy() for n in model().tensors}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(first[n], second[n]) for n in model().tensors)


def case_full_width_is_flowers_own_fedavg() -> None:
    _, replies, ours = one_round(FedpruneStrategy(model(), "fedavg", **QUIET))
    theirs, metrics = FedAvg().aggregate_train(1, replies)
    assert theirs is not None
    assert metrics is not None
    weights = [11, 12, 13]
    for name, value in ours.items():
        sent = [r.content["arrays"][name].numpy().astype(np.float64) for r in replies]
        size = np.max(np.abs(sent), axis=0)
        assert (np.abs(value - theirs[name].numpy()) <= 6 * UNIT * size).all(), name
        exact = sum(w * v for w, v in zip(weights, sent, strict=True)) / sum(weights)
        assert (np.abs(value - exact) <= UNIT * size + 2.0**-34).all(), name  # rounded once


def case_order_changes_no_bit() -> None:
    made = [one_round(FedpruneStrategy(model(), "fedprune", density=0.5, **QUIET), 4, change=change)[2]
            for change in (lambda r: r, lambda r: r[::-1], lambda r: r[2:] + r[:2])]  # fmt: skip
    assert same(made[0], made[1])
    assert same(made[0], made[2])


def case_mixed_widths_are_our_fold() -> None:
    _, replies, ours = one_round(FedpruneStrategy(model(), "plain", density=[0.75, 0.5, 0.25], **QUIET))
    architecture, tensors = model().architecture, model().tensors
    from fedprune.strategies.importance.scoring import channel_scores, rank_channels

    fold = Fold(architecture, tensors)
    for reply, density in zip(replies, (0.75, 0.5, 0.25), strict=True):
        selection = Selection.of(
            architecture,
            widths_at(architecture, density),
            rank_channels(channel_scores("magnitude", architecture, tensors)),
        )
        arrays = reply.content["arrays"]
        node_part = {n: arrays[n].numpy() for n in tensors}
        assert {n: v.shape for n, v in node_part.items()} == selection.shapes()
        fold.add(selection, node_part, int(reply.content["metrics"]["num-examples"]))
    assert same(ours, fold.close()[0])
    untouched = ~selection.with_widths(widths_at(architecture, 0.75)).coverage_mask("conv3.weight")
    assert untouched.any()
    assert np.array_equal(ours["conv3.weight"][untouched], tensors["conv3.weight"][untouched])


def spoilt(reply: Message, arrays: Any = None, metrics: Any = None, **changed: Any) -> Message:
    """A reply with other arrays or metrics, from the same node."""
    content = RecordDict({"arrays": arrays or reply.content["arrays"], "metrics": metrics or reply.content["metrics"]})
    out = Message(content, reply_to=reply)
    out.metadata.__dict__.update(reply.metadata.__dict__)
    out.metadata.__dict__.update({f"_{k}": v for k, v in changed.items()})
    return out


def case_who_fails_answers_twice_or_lies_is_left_out_alone() -> None:
    def altered_reply(reply: Message, name: str, value: Any) -> Message:
        held = dict(reply.content["arrays"])
        held[name] = value if isinstance(value, Array) else Array(value)
        return spoilt(reply, ArrayRecord(held))

    def lacking(reply: Message) -> Message:
        return spoilt(reply, ArrayRecord({n: a for n, a in reply.content["arrays"].items() if n != "fc.bias"}))

    def two_records(reply: Message) -> Message:
        out = spoilt(reply)
        out.content["more"] = reply.content["arrays"]
        return out

    def error_reply(reply: Message) -> Message:
        out = Message(Error(7, "out of memory"), reply_to=reply)
        out.metadata.__dict__.update(reply.metadata.__dict__)
        return out

    bias = np.zeros(10, np.float32)
    pickled = (
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (10,), }".ljust(117) + b"\nx"
    )
    huge = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10,), }".ljust(117) + b"\n"
    bad: list[Callable[[Message], Message]] = [
        error_reply,
        lacking,
        two_records,
        lambda r: altered_reply(r, "fc.bias", bias[:5]),
        lambda r: altered_reply(r, "fc.bias", bias.astype(np.float64)),
        lambda r: altered_reply(r, "fc.bias", bias + np.nan),
        lambda r: altered_reply(r, "fc.bias", bias + 1e30),
        lambda r: altered_reply(r, "bn1.running_var", np.full(16, -1, np.float32)),
        lambda r: altered_reply(r, "fc.bias", Array("float32", (10,), "numpy.ndarray", pickled)),
        lambda r: altered_reply(r, "fc.bias", Array("float32", (10,), "numpy.ndarray", huge)),
        lambda r: altered_reply(r, "fc.bias", Array("float32", (10,), "numpy.ndarray", b"")),
        lambda r: spoilt(r, group_id="fedprune-0"),
        lambda r: spoilt(r, src_node_id=999),
        *[
            lambda r, m=m: spoilt(r, metrics=MetricRecord({"num-examples": m}))
            for m in (0, -3, 2.5, float("nan"), 2**40)
        ],
        lambda r: spoilt(r, metrics=MetricRecord({"loss": 1.0})),
        lambda r: spoilt(r, metrics=MetricRecord({"num-examples": 12, "num-steps": 0})),
    ]

    def strategy() -> FedpruneStrategy:
        return FedpruneStrategy(model(), "fedavg", **QUIET)

    good = one_round(strategy(), change=lambda r: [r[0], r[2]])[2]
    for make in bad:
        assert same(one_round(strategy(), change=lambda r, make=make: [r[0], make(r[1]), r[2]])[2], good), make
    twice = one_round(strategy(), change=lambda r: [*r, altered_reply(r[0], "fc.bias", bias)])
    assert same(twice[2], one_round(strategy())[2])
    nobody = strategy()
    grid = InProcess(3, noisy, change=lambda r: [lacking(x) for x in r])
    sent = nobody.configure_train(1, nobody.arrays, ConfigRecord(), grid)
    assert nobody.aggregate_train(1, grid.send_and_receive(sent)) == (None, None)
    assert same(read(nobody.arrays), model().tensors)


def case_state_goes_on_bit_for_bit() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.state")

        def run(rounds: int, **more: Any) -> FedpruneStrategy:
            strategy = FedpruneStrategy(model(), "fedprune", density=[1.0, 0.5, 0.25], **more, **QUIET)
            strategy.start(InProcess(3, noisy), strategy.arrays, num_rounds=rounds)
            return strategy

        full_run = run(3)
        run(2, state=path)
        last = run(1, state=path)
        assert (full_run.rounds, last.rounds) == (3, 3)
        assert same(read(full_run.arrays), read(last.arrays))
        with refuses("strategy of the state"):
            FedpruneStrategy(model(), "fedavg", state=path, **QUIET)
        raw = path.read_bytes()
        for spoilt_bytes in (raw[:-1], raw[:100], b"", raw.replace(b'"round"', b'"rounb"')):
            path.write_bytes(spoilt_bytes)
            with refuses("job.state"):
                FedpruneStrategy(model(), "fedprune", state=path, **QUIET)


def case_strategies_are_taken_or_refused_by_name() -> None:
    for name in strategies.PRESETS.keys() - set(PRESETS):
        with refuses("doesn't work under Flower"):
            FedpruneStrategy(model(), name, density=0.5)
    for name in PRESETS:
        _, _, arrays = one_round(FedpruneStrategy(model(), name, density=[1.0, 0.5], **QUIET), 2)
        assert all(np.isfinite(v).all() for v in arrays.values())
        assert not same(arrays, model().tensors)
    with refuses("Flower's rounds wait"):
        FedpruneStrategy(model(), "fedprune", options={"arrivals": 3})
    with refuses("stays on the device"):
        FedpruneStrategy(model(), "fedavg", recipe=Recipe(personal=("fc.*",)))
    with refuses("Flower has secure aggregation of its own"):
        compose_for_flower(Job(strategy="fedavg", secure_aggregation=True), ())
    assert compose_for_flower(Job(strategy="fedprune"), ()).core is None, "nodes share none"


def case_who_gets_how_much() -> None:
    sizes, architecture = model().architecture.sizes, model().architecture

    def widths(density: Any, nodes: int = 3, app: Any = noisy, name: str = "plain") -> list[tuple[int, ...]]:
        strategy = FedpruneStrategy(model(), name, density=density, **QUIET)
        sent = strategy.configure_train(1, strategy.arrays, ConfigRecord(), InProcess(nodes, app))
        return [NodePart.of(m).widths for m in sorted(sent, key=lambda m: m.metadata.dst_node_id)]

    half, quarter = widths_at(architecture, 0.5), widths_at(architecture, 0.25)
    assert widths(0.5) == [half] * 3
    assert widths([1.0, 0.5, 0.25]) == [sizes, half, quarter]
    assert widths({101: 0.25, 102: 0.5, 103: 1.0}) == [quarter, half, sizes]
    assert widths(lambda node: 0.5 if node % 2 else 0.25) == [half, quarter, half]
    assert widths("raspberry-pi-5") == [sizes] * 3
    assert widths("ask") == widths(None) == [half] * 3
    assert widths(None, 5, name="heterofl") == [widths_at(architecture, d) for d in (1, 0.5, 0.25, 0.125, 0.0625)]
    assert widths(None, name="fedavg") == [sizes] * 3
    with refuses("one for every node"):
        widths({101: 0.25})
    for wrong in (0, 1.5, [1.0, -1.0], "no-such-board"):
        with refuses("exp"):
            widths(wrong)

    def own_words(message: Message, context: Context) -> Message:
        """Four of five nodes don't answer as they should."""
        board = {"profile": "raspberry-pi-zero-2w"}
        records: list[dict[str, Any]] = [{"density": 2.0}, {"density": float("nan")}, {"profile": "/etc/passwd"}, board]
        if context.node_id == 105:
            raise ValueError("no such query")
        body = {"format": "fedprune.flower/1", **records[context.node_id - 101]}
        return Message(RecordDict({"fedprune": ConfigRecord(body)}), reply_to=message)

    assert len(widths("ask", 5, own_words)) == 1
    with refuses("no node says what it carries"):
        widths("ask", 2, own_words)


def case_arrays_that_are_not_the_model() -> None:
    from submodels.task import Net

    strategy, grid = FedpruneStrategy(model(), "fedavg", **QUIET), InProcess(2, noisy)
    state = ArrayRecord(Net().state_dict())
    sent = list(strategy.configure_train(1, state, ConfigRecord(), grid))
    assert set(sent[0].content["arrays"]) == set(state)  # counters go along
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(sent))
    assert arrays is not None
    Net().load_state_dict(arrays.to_torch_state_dict())
    fresh = FedpruneStrategy(model(), "fedavg", **QUIET)
    del state["fc.bias"]
    with refuses("tensor fc.bias is missing"):
        fresh.configure_train(1, state, ConfigRecord(), grid)
    tied = fresh.arrays
    tied["head.weight"] = tied["fc.weight"]
    with refuses("several names"):
        fresh.configure_train(1, tied, ConfigRecord(), grid)


def case_an_answer_must_fit_what_was_sent() -> None:
    def short(message: Message, context: Context) -> Message:
        node_part = NodePart.of(message)
        with refuses("lacks tensor fc.weight"):
            node_part.reply({n: v for n, v in node_part.tensors.items() if n != "fc.weight"}, samples=3)
        with refuses("shape of fc.weight"):
            node_part.reply({**node_part.tensors, "fc.weight": np.zeros((10, 3))}, samples=3)
        return node_part.reply(node_part.tensors, samples=3)

    strategy = FedpruneStrategy(model(), "fedavg", density=0.5, **QUIET)
    grid = InProcess(2, short)
    replies = list(grid.send_and_receive(strategy.configure_train(1, strategy.arrays, ConfigRecord(), grid)))
    assert not any(r.has_error() for r in replies)
    with refuses("fedprune.flower/1"):
        NodePart.of(Message(RecordDict({}), 1, "train"))


def case_a_narrow_message_is_as_small_as_its_widths() -> dict[str, int]:
    sizes = {}
    for density in (1.0, 0.5, 0.25):
        grid, _, _ = one_round(FedpruneStrategy(model(), "fedavg", density=density, **QUIET), 2)
        selection = Selection.of(model().architecture, widths_at(model().architecture, density))
        weights = sum(4 * int(np.prod(s)) for s in selection.shapes().values())
        beside = 18 * 128 + 2048  # NumPy's headers, and words
        assert weights < grid.down[0] < weights + 2 * beside
        assert weights < grid.up[0] < weights + 2 * beside
        sizes[f"{density:g}"] = grid.down[0]
    assert sizes["0.25"] < 0.2 * sizes["1"]
    return sizes


def run_app(grid: InProcess, app: Any, config: dict[str, Any]) -> None:
    app(grid, Context(1, 1, {}, RecordDict(), config))


def case_the_example_learns_on_four_nodes() -> dict[str, float]:
    from submodels import client_app, server_app, task

    accuracies: list[float] = []

    class Watched(FedpruneStrategy):
        def start(self, *arguments: Any, **named_arguments: Any) -> Any:
            out = super().start(*arguments, **named_arguments)
            accuracies.extend(m["accuracy"] for m in out.evaluate_metrics_serverapp.values())
            accuracies.append(out.evaluate_metrics_clientapp[3]["accuracy"])
            return out

    server_app.FedpruneStrategy, task.ALPHA = Watched, 5.0
    torch().manual_seed(0)
    grid = InProcess(4, client_app.app)
    run_app(grid, server_app.app, {"strategy": "fedprune", "rounds": 3})
    assert grid.kinds.count("query.fedprune") == 4
    assert (grid.kinds.count("train"), grid.kinds.count("evaluate")) == (12, 12)
    first, *_, last, nodes = accuracies
    assert first < 0.3
    assert last > 0.5
    assert nodes > 0.4
    return {"before": first, "after": last, "nodes": nodes}


def blocks() -> dict[str, str]:
    """The code of docs/flower.md, by its first line."""
    sections = (ROOT / "docs" / "flower.md").read_text().split("```python\n")[1:]
    return {code.split("\n")[0].removeprefix("# "): code for code in (p.split("```")[0] for p in sections)}


def run_block(name: str, code: str) -> Any:
    space: dict[str, Any] = {"__name__": name}
    exec(compile(code, name, "exec"), space)  # noqa: S102 - the page's own code
    return space["app"]


def case_the_page_runs_as_it_stands() -> None:
    code = blocks()
    assert len([x for x in code["server_app.py"].splitlines() if x and not x.startswith("#")]) <= 10
    client = run_block("client_app", code["client_app.py"] + code["client_app.py, further"])
    grid = InProcess(4, client)
    run_app(grid, run_block("server_app", code["server_app.py"]), {})
    assert grid.kinds.count("train") == grid.kinds.count("evaluate") == 12
    assert len(grid.up) == 24  # none failed
    question = Message(RecordDict({"fedprune": ConfigRecord({"format": "fedprune.flower/1"})}), 101, "query.fedprune")
    assert client(question, grid.contexts[101]).content["fedprune"]["profile"] == "raspberry-pi-4b"


def case_nodes_without_torch_train_the_graph() -> None:
    code = blocks()
    losses: list[float] = []

    def change(replies: list[Message]) -> list[Message]:
        assert not any(r.has_error() for r in replies), [r.error.reason for r in replies if r.has_error()]
        losses.extend([float(np.mean([r.content["metrics"]["loss"] for r in replies]))] if replies else [])
        return replies

    grid = InProcess(4, run_block("client_app", code["client_app.py, with a graph"]), change)
    run_app(grid, run_block("server_app", code["server_app.py, with a graph"]), {})
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]


def main(out: str, only: tuple[str, ...] = ()) -> None:
    """Run all cases, or only some."""
    case_results: dict[str, Any] = {}
    for name, case in list(globals().items()):
        if name.startswith("case_") and (not only or name in only):
            began = time.process_time()
            try:
                figures = case()
                case_results[name] = {"ok": True, "figures": figures, "seconds": round(time.process_time() - began, 2)}
            except Exception:  # noqa: BLE001 - another case may hold all the same
                case_results[name] = {"ok": False, "error": traceback.format_exc()}
    Path(out).write_text(json.dumps(case_results, indent=1))
