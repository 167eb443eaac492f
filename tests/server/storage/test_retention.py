"""Deleting what rounds leave behind: no offer is being made meanwhile, whatever the order of events."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune_server.executor.background import BackgroundExecutor, HeavyCommand
from fedprune_server.executor.retention import BlobCollector, sweep_blobs
from fedprune_server.maintenance.job_needs import read_job_needs
from fedprune_server.storage.storage import Storage
from support.fakes.asynchronous_shell import KINDS, Shell
from support.fakes.tiny_job import JOB

RESULTS = (on.Scored, on.Extracted, on.Folded, on.Closed, on.Evaluated)


def draw(shell: Shell, data: st.DataObject) -> on.Event:
    """Anything that waits, but of what the executor answers the first: it answers in the order of its commands."""
    events = [e for e in shell.inbox if isinstance(e, RESULTS)][:1]
    event = data.draw(st.sampled_from([*events, *(e for e in shell.inbox if not isinstance(e, RESULTS))]))
    shell.inbox.remove(event)
    return event


@pytest.mark.parametrize("job", [JOB, *KINDS.values()], ids=["synchronous", *KINDS])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_offer_is_being_made_when_a_round_begins(job: Job, data: st.DataObject) -> None:
    shell = Shell(job)
    shell.come()
    troubles = 6
    for _ in range(2000):
        if shell.state.phase is Phase.FINISHED:
            return
        trouble = data.draw(st.sampled_from([*["none"] * 6, "crash", "refusal", "deadline"])) if troubles else "none"
        troubles -= trouble != "none"
        if trouble == "crash":
            shell.crash()
        if not shell.inbox or (trouble == "deadline" and shell.wakes):
            shell.tick()
            continue
        event, round_ = draw(shell, data), shell.state.round
        if trouble == "refusal" and isinstance(event, on.UpdateAnnounced):
            event = on.OfferRefused(event.device, event.round, event.attempt, "no room")
        waiting = list(shell.inbox)
        shell.feed(event)
        if shell.state.round != round_ or shell.state.phase is Phase.FINISHED:
            assert not [e for e in waiting if isinstance(e, on.Extracted)]
            rounds = {shell.state.round_of(t) for t in shell.state.tasks.values() if t.progress is Progress.EXTRACTING}
            assert rounds <= {shell.state.round}
    pytest.fail("the job doesn't come to an end")


def test_the_executor_begins_with_nothing_before_what_was_ordered_earlier_is_answered() -> None:
    first, let = threading.Event(), threading.Event()

    class Slow:
        def execute(self, command: HeavyCommand) -> on.Event:
            assert isinstance(command, do.Evaluate)
            begun.append(command.round)
            if command.round == 1:
                first.set()
                assert let.wait(10)
            return on.Evaluated(command.round, {})

        def expect(self, commands: Sequence[do.Command]) -> None:
            pass

    begun: list[int] = []
    executor = BackgroundExecutor(Slow())
    try:
        for number in (1, 2, 3):
            executor.submit(do.Evaluate(number, ""))
        assert first.wait(10)
        assert executor.collect() is None
        assert begun == [1]
        let.set()
        events: list[on.Event] = []
        while executor.is_busy:
            if (event := executor.collect()) is not None:
                events.append(event)
        assert events == [on.Evaluated(n, {}) for n in (1, 2, 3)]
    finally:
        let.set()
        executor.close()


def test_a_round_that_begins_drops_what_has_arrived_of_blobs_that_no_longer_arrive(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, durable=False)
    abandoned, arriving = (name * LEAF_BYTES for name in (b"ab", b"ar"))
    for data in (abandoned, arriving):
        partial = store.partial(BlobRef.of(data))
        partial.set_table(leaf_table(data))
        assert partial.write(0, data[:LEAF_BYTES])
    model = store.put(b"model").sha256
    BlobCollector(store, 1, "accuracy").collect(State(model=model), {BlobRef.of(arriving).sha256})
    assert {path.name[:64] for path in (tmp_path / "partial").iterdir()} == {BlobRef.of(arriving).sha256}
    assert store.names() == [model]


@pytest.mark.parametrize(
    ("judged_by", "scores", "kept_rounds"),
    [
        ("accuracy", [0.5, 0.7, 0.7, 0.6, None], [2, 5]),  # the earliest of equals; the last wasn't evaluated
        ("loss", [2.0, 0.9, 1.1], [2, 3]),
        ("accuracy", [0.5, 0.6, 0.9], [3]),
        ("accuracy", [None, None], [2]),
    ],
)
def test_the_best_model_stays_beside_the_latest(
    tmp_path: Path, judged_by: str, scores: list[float | None], kept_rounds: list[int]
) -> None:
    store, state = BlobStore(tmp_path, durable=False), State(model="")
    for number, score in enumerate(scores, 1):
        state.round, state.model = number, store.put(b"model %d" % number).sha256
        metrics = {} if score is None else {judged_by: score}
        state.history.append({"round": number, "at": 0.0, "model": state.model, "metrics": metrics, "devices": {}})
        # A server that is started again begins with a sweep, and its collector knows of no earlier state.
        sweep_blobs(store, state, 1, judged_by)
        BlobCollector(store, 1, judged_by).collect(state, frozenset())

    models = [row["model"] for row in state.history]
    assert sorted(store.names()) == sorted(models[number - 1] for number in kept_rounds)


def test_a_backup_needs_the_best_model_too(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"round": n, "at": 0.0, "model": f"{n:064}", "metrics": {"accuracy": score}, "devices": {}}
        for n, score in enumerate((0.9, 0.5, 0.6), 1)
    ]
    with Storage.open_in(tmp_path) as storage:
        storage.put_settings({"job": JOB.to_dict(), "server": {"keep": 1}})
        storage.save(State(model=rows[-1]["model"], round=3, history=rows), (), 1.0)
        assert read_job_needs(storage).models == {f"{1:064}", f"{3:064}"}
