"""A crew gives what its worker gives, whichever process does it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import StorageError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune_export.pruning.model import Model
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.helper_processes import helper_processes
from fedprune_server.executor.worker import Worker
from support.fakes.digits_simulation import boards, digits_simulation
from support.waiting import until

DENSITIES = {"a": 1.0, "b": 0.5, "c": 0.25}
JOB = Job(rounds=2, devices=3, density=0.5, recipe=Recipe(max_steps=4))


@pytest.fixture
def worker(model: Model, tmp_path: Path) -> Worker:
    return Worker(JOB, model, BlobStore(tmp_path / "blobs", durable=False))


@pytest.fixture
def crew(worker: Worker) -> Iterator[DistributedWorker]:
    with closing(DistributedWorker(worker, helper_processes(worker, 2))) as crew:
        yield crew


def extracts(worker: Worker) -> list[do.Extract]:
    start = worker.put_initial_model()
    scored = worker.execute(do.Score(1, start, {}, tuple(DENSITIES)))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(1, start, scored.ranking)
    widths = {n: widths_at(worker.architecture, d) for n, d in DENSITIES.items()}
    return [do.Extract(basis, do.DevicePart(n, 1, widths[n], d, 10, None)) for n, d in DENSITIES.items()]


def test_helpers_make_the_same_offers(worker: Worker, crew: DistributedWorker) -> None:
    orders = extracts(worker)
    crew.expect([do.WakeAt(1.0), *orders])

    assert [crew.execute(o) for o in orders] == [worker.execute(o) for o in orders]
    assert crew.graph_digests() == worker.graph_digests()
    assert all(worker.store.has(g) for g in crew.graph_digests())


def test_what_was_expected_otherwise_is_done_as_ordered(worker: Worker, crew: DistributedWorker) -> None:
    order = extracts(worker)[0]
    crew.expect([order])
    other = replace(order, part=replace(order.part, widths=widths_at(worker.architecture, 0.75)))

    assert crew.execute(other) == worker.execute(other) != worker.execute(order)


def test_an_error_is_the_workers_own(worker: Worker, crew: DistributedWorker) -> None:
    order = extracts(worker)[0]
    lost = replace(order, basis=replace(order.basis, model="0" * 64))
    crew.expect([lost])

    with pytest.raises(StorageError, match="0" * 12):
        crew.execute(lost)


def test_helpers_that_were_killed_are_replaced(worker: Worker, crew: DistributedWorker) -> None:
    orders = extracts(worker)
    crew.expect(orders)
    expected = [crew.execute(o) for o in orders]
    for process in list(crew._pool._processes._processes.values()):
        with suppress(ProcessLookupError):  # the pool ends the others as soon as it misses one
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    while not crew._pool._processes._broken:  # the pool's own thread notices
        time.sleep(0.01)

    crew.expect(orders)

    assert [crew.execute(o) for o in orders] == expected


def test_helpers_leave_ctrl_c_to_their_parent_and_end_with_it() -> None:
    """The parent is interrupted with its helper, as by a terminal, and then killed."""
    program = (
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from fedprune_server.process.child_side import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), end_with_parent, (os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        os.kill(helper, signal.SIGINT)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert int(parent.stdout.readline()) == helper
        parent.kill()
        parent.wait()
        until(lambda: not _alive(helper))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_simulation_with_helpers_gives_the_same_models(tmp_path: Path) -> None:
    settings = {"fleet": boards(tuple(DENSITIES), "raspberry-pi-5"), "density": 0.5, "recipe": JOB.recipe}
    one, two = (digits_simulation(tmp_path / str(n), workers=n, **settings).run() for n in (1, 2))
    assert [h["model"] for h in one] == [h["model"] for h in two]
