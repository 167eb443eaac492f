"""A Ray cluster does a crew's tasks, to the same bits; and a server continues when it loses one."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, ExitCode, MissingExtraError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune_export.pruning.model import Model
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.executor import pool_tasks
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.ray_pool import ClusterError, RayPool
from fedprune_server.executor.worker import Worker
from fedprune_server.storage.s3.store import BucketStore
from support.processes.machine import free_port
from support.processes.s3 import S3
from support.waiting import attempts, until

JOB = Job(rounds=2, devices=3, density=0.5)
DENSITIES = (1.0, 0.5, 0.25)


def worker(model: Model, folder: Path) -> Worker:
    return Worker(JOB, model, BlobStore(folder, durable=False))


@pytest.mark.parametrize("url", ["", "ray:", "ray:host", "ray://a:1/../b", "dask://a:1"])
def test_what_is_no_place_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="workers_url"):
        ServerConfig(workers_url=url)


def test_ray_is_missed_by_name(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"\[scale\]"):
        RayPool("ray:auto", worker(model, tmp_path))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "grpc", None)
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(MissingExtraError, match=r"client.*\[scale\]"):
        RayPool("ray://localhost:10001", worker(model, tmp_path))


def test_a_cluster_that_is_not_there_is_one_clear_error(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    w = worker(model, tmp_path)
    with pytest.raises(ClusterError, match=r"can't be used.*refused") as caught:
        RayPool(f"ray:127.0.0.1:{free_port()}", w)
    assert caught.value.exit_code is ExitCode.CLUSTER
    assert w.store.names() == []


@pytest.fixture(scope="module", params=["folder", pytest.param("bucket", marks=pytest.mark.soak)])
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Two nodes of a cluster, of one processor each, and a head without any; with the place of the blobs that they
    see."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        s3: S3 | None = request.getfixturevalue("ceph") if request.param == "bucket" else None
        for name, value in s3.environment.items() if s3 is not None else ():
            patch.setenv(name, value)
        nodes = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8},
        )
        nodes.two = [nodes.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
        nodes.blobs = None if s3 is None else f"s3://{s3.bucket()}"
        yield nodes
        nodes.shutdown()


def cluster_worker(model: Model, folder: Path, cluster: Any) -> Worker:
    """A worker whose blobs the cluster sees, too."""
    if cluster.blobs is None:
        return worker(model, folder)
    return Worker(JOB, model, BucketStore(folder, cluster.blobs))


def orders(w: Worker, count: int) -> list[do.Extract]:
    start = w.put_initial_model()
    scored = w.execute(do.Score(1, start, {}, ("a",)))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(1, start, scored.ranking)
    widths = [widths_at(w.architecture, d) for d in DENSITIES]
    return [
        do.Extract(basis, do.DevicePart(f"d{k}", 1, widths[k % 3], DENSITIES[k % 3], 10, None)) for k in range(count)
    ]


def round_of(w: Worker, orders: list[do.Extract]) -> tuple[list[do.FoldUpdate], do.Close]:
    contributions = []
    for k, order in enumerate(orders):
        event, rng = w.execute(order), np.random.default_rng(k)
        assert isinstance(event, on.Extracted)
        sent = event.offer["weights"]["sha256"]
        tensors = tensorfile.decode(w.store.read(sent))
        update = {n: (v + 0.1 * rng.random(v.shape)).astype(np.float32) for n, v in tensors.items()}
        stored = w.store.put(tensorfile.encode(update)).sha256
        contributions.append(do.Contribution(order.basis, order.part, sent, None, stored, 10 + k, 3))
    start = orders[0].basis.model
    names = tuple(c.part.device for c in contributions)
    return [do.FoldUpdate(1, start, {}, c) for c in contributions], do.Close(1, start, {}, names, tuple(contributions))


def slow(w: Worker, path: str) -> str:
    """A task that says where it begins and takes its time; only the first try does."""
    log_file = Path(path)
    is_first_try = not log_file.exists()
    with log_file.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if is_first_try:
        time.sleep(60)
    return "done"


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_cluster_helps_loses_a_node_and_is_lost(
    model: Model, tmp_path: Path, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One after the other on one cluster, because it takes long to start."""
    caplog.set_level(logging.INFO)
    alone = cluster_worker(model, tmp_path, cluster)
    many = orders(alone, 60)
    folds, close = round_of(alone, many[:12])
    events = [alone.execute(fold) for fold in folds]
    expected, offers = alone.execute(close), [alone.execute(order) for order in many]

    pool = RayPool(f"ray:{cluster.address}", alone, retry_s=0.5)
    with closing(DistributedWorker(cluster_worker(model, tmp_path, cluster), pool, block=500, batch=5)) as crew:
        assert pool.size == 2
        crew.expect(many)
        assert [crew.execute(order) for order in many] == offers
        crew.expect(folds)
        assert [crew.execute(fold) for fold in folds] == events
        assert crew.execute(close) == expected
        assert not [r for r in caplog.records if "itself" in r.message]

        # A node dies under a task: it starts again on the other one.
        where = tmp_path / "began"
        future = pool.submit(slow, str(where))
        raylet = _node_of(int(until(lambda: where.exists() and where.read_text().split())[0]), cluster)
        cluster.remove_node(raylet, allow_graceful=False)
        assert future.result(120) == "done"
        assert len(where.read_text().split()) == 2
        assert play_round(crew, folds, close) == expected
        assert not [r for r in caplog.records if "itself" in r.message]

        # The process that talks with the cluster dies: the server does what there is to do, and is helped again later.
        assert pool._driver is not None
        os.kill(pool._driver._process.pid or 0, signal.SIGKILL)
        assert play_round(crew, folds, close) == expected
        assert len([r.message for r in caplog.records if "is lost" in r.message]) == 1
        for _ in attempts("a helper's return", pause_s=0.3):
            if "is back:" in caplog.text:
                break
            pool.submit(pool_tasks.extract_submodels, ())
        assert pool.submit(pool_tasks.extract_submodels, ()).result(60) == pool_tasks.ExtractedBatch((), {})
        assert [r.message for r in caplog.records if "is back:" in r.message]


def _node_of(pid: int, cluster: Any) -> Any:
    """The node of which a process is a worker."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for node in cluster.two:
        for process in node.all_processes.get("raylet", []):
            if process.process.pid == parent:
                return node
    raise AssertionError(f"no node has process {pid}")


def play_round(crew: DistributedWorker, folds: list[do.FoldUpdate], close: do.Close) -> on.Event:
    crew.expect(folds)
    for fold in folds:
        crew.execute(fold)
    return crew.execute(replace(close))
