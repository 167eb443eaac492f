"""Sessions whose graphs a child process loads and runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ModelError, RuntimeUnavailableError
from fedprune.runtime import session as sessions
from fedprune.runtime.session import PROGRAM, Session, run_by_child_process
from fedprune.runtime.session_process import SessionProcess
from support.paths import ROOT

GRAPH = next((ROOT / "device_runtime" / "fedprune_device" / "assets").glob("*.onnx"))


@pytest.fixture(name="process")
def started() -> Iterator[SessionProcess]:
    with run_by_child_process():
        process = sessions._process
        assert process is not None
        yield process
    assert sessions._process is None


def feeds(session: Session) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    found = {}
    for name, (kind, shape) in session.inputs.items():
        values = chance.standard_normal([d if isinstance(d, int) else 2 for d in shape])
        found[name] = values.astype(np.int64 if "int64" in kind else np.float32)
    return found


def pid(process: SessionProcess) -> int:
    assert process._child is not None
    return process._child.pid


def test_it_computes_the_same_bits_and_describes_a_graph_as_here() -> None:
    here = Session(GRAPH)
    wanted = here.run(feeds(here))
    with run_by_child_process():
        there = Session(GRAPH)
        found = there.run(feeds(here))
        assert (there.inputs, there.outputs, there.metadata) == (here.inputs, here.outputs, here.metadata)
        assert (there.provider, here.provider) == ("cpu", "cpu")
        into = {name: np.empty_like(value) for name, value in wanted.items()}
        there.run(feeds(here), into=into)
    for name, value in wanted.items():
        assert value.tobytes() == found[name].tobytes() == into[name].tobytes()


def test_errors_are_those_of_a_session_here(process: SessionProcess) -> None:
    with pytest.raises(ModelError, match="doesn't load it"):
        Session(b"nothing of the kind")
    with pytest.raises(ModelError, match="couldn't run the graph"):
        Session(GRAPH).run({"x": np.zeros(3, np.float32)})
    assert pid(process)  # which has outlived both


def test_one_that_was_killed_or_has_ended_by_itself_is_replaced() -> None:
    with SessionProcess(PROGRAM, idle_s=0.2) as process:
        session = process.load(GRAPH, 1, False, "CPUExecutionProvider", exact=False)
        first = pid(process)
        os.kill(first, signal.SIGKILL)
        assert session.get_outputs() == process.ask(session._number, session._graph, "describe").outputs
        second, until = process._child, time.monotonic() + 30.0
        assert second is not None
        assert second.pid != first
        while second.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert second.returncode == 0  # nothing was asked of it
        process.ask(session._number, session._graph, "describe")
        assert pid(process) not in (first, second.pid)


def test_one_that_is_killed_again_and_again_is_an_error() -> None:
    with SessionProcess("raise SystemExit(1)") as process, pytest.raises(RuntimeUnavailableError, match="was killed"):
        process.load(GRAPH, 1, False, "CPUExecutionProvider", exact=False)


def test_a_session_that_nothing_uses_any_more_is_dropped(process: SessionProcess) -> None:
    first = Session(GRAPH)
    request = first._session._number, first._session._graph
    del first
    Session(GRAPH)
    process._loaded.add(request[0])
    with pytest.raises(Exception, match=str(request[0])):
        process.ask(*request, "describe")


def test_it_ends_with_the_process_that_started_it_and_this_one_loads_no_onnxruntime() -> None:
    program = f"""
import sys
from fedprune.runtime import session
with session.run_by_child_process():
    session.Session({GRAPH.read_bytes()!r})
    assert "onnxruntime" not in sys.modules
    print(session._process._child.pid, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.kill()
        parent.wait()
    until = time.monotonic() + 30.0
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
