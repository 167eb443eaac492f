"""Sessions whose graphs a child process loads and runs."""

import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import FedpruneError, ModelError, RuntimeUnavailableError
from fedprune.runtime import session as sessions
from fedprune.runtime import session_process
from fedprune.runtime.session import CHILD_PROGRAM, OnnxSession, run_by_child_process
from fedprune.runtime.session_process import SessionProcess
from support.paths import ROOT
from support.waiting import until

HANGS = "import time; time.sleep(3600)"
GRAPH = ROOT / "device_runtime" / "fedprune_device" / "assets" / "probe_training-cpu.onnx"


@pytest.fixture(name="process")
def run_child_process() -> Iterator[SessionProcess]:
    with run_by_child_process():
        process = sessions._process
        assert process is not None
        yield process
    assert sessions._process is None


def feeds(session: OnnxSession) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    arrays = {}
    for name, (kind, shape) in session.inputs.items():
        values = chance.standard_normal([d if isinstance(d, int) else 2 for d in shape])
        arrays[name] = values.astype(np.int64 if "int64" in kind else np.float32)
    return arrays


def pid(process: SessionProcess) -> int:
    assert process._child is not None
    return process._child.pid


def test_it_computes_the_same_bits_and_describes_a_graph_as_here() -> None:
    here = OnnxSession(GRAPH)
    expected = here.run(feeds(here))
    with run_by_child_process():
        there = OnnxSession(GRAPH)
        outputs = there.run(feeds(here))
        assert (there.inputs, there.outputs, there.metadata) == (here.inputs, here.outputs, here.metadata)
        assert (there.provider, here.provider) == ("cpu", "cpu")
        into = {name: np.empty_like(value) for name, value in expected.items()}
        there.run(feeds(here), into=into)
    for name, value in expected.items():
        assert value.tobytes() == outputs[name].tobytes() == into[name].tobytes()


def test_errors_are_those_of_a_session_here(process: SessionProcess) -> None:
    with pytest.raises(ModelError, match="doesn't load it"):
        OnnxSession(b"nothing of the kind")
    with pytest.raises(ModelError, match="couldn't run the graph"):
        OnnxSession(GRAPH).run({"x": np.zeros(3, np.float32)})
    assert pid(process)  # which has outlived both


def test_one_that_was_killed_or_has_ended_by_itself_is_replaced() -> None:
    with SessionProcess(CHILD_PROGRAM, idle_s=0.2) as process:
        session = process.load(GRAPH, 1, False, "CPUExecutionProvider", exact=False)
        first = pid(process)
        os.kill(first, signal.SIGKILL)
        assert session.get_outputs() == process.ask("describe", [session]).outputs
        second = process._child
        assert second is not None
        assert second.pid != first
        until(lambda: not Path(f"/proc/{second.pid}").exists())  # nor is it a zombie
        assert second.wait(30.0) == 0  # nothing was asked of it
        process.ask("describe", [session])
        assert pid(process) not in (first, second.pid)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", r"ended twice without an answer \(exit code 3\)$"),
        ("import os; os.kill(os.getpid(), 9)", r"\(exit code -9\)\. Check that this machine has enough memory"),
    ],
)
def test_one_that_ends_again_and_again_is_an_error(process: SessionProcess, program: str, message: str) -> None:
    session = OnnxSession(GRAPH)
    process._program = program
    os.kill(pid(process), signal.SIGKILL)
    with pytest.raises(RuntimeUnavailableError, match=message) as raised:
        session.run(feeds(session))
    assert isinstance(raised.value.__cause__, (OSError, EOFError))


def asking_thread(process: SessionProcess, graph: Path | bytes = GRAPH) -> tuple[threading.Thread, list[Exception]]:
    failed: list[Exception] = []

    def run() -> None:
        try:
            process.load(graph, 1, False, "CPUExecutionProvider", exact=False)
        except FedpruneError as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failed


@pytest.mark.parametrize("graph", [GRAPH, bytes(2**23)], ids=["without an answer", "while it is sent megabytes"])
def test_one_that_hangs_is_killed(graph: Path | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_process, "_REQUEST_TIMEOUT", struct.pack("@ll", 0, 100_000))
    with SessionProcess(HANGS) as process:
        asking, failed = asking_thread(process, graph)
        asking.join(30.0)
        assert not asking.is_alive()
    (error,) = failed
    assert isinstance(error, RuntimeUnavailableError)
    assert str(error).endswith("(exit code -9)")
    assert isinstance(error.__cause__, BlockingIOError)


def test_closing_ends_a_request_of_another_thread_at_once(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    process = SessionProcess(f"open({str(begun)!r}, 'w').close(); {HANGS}")
    asking, failed = asking_thread(process)
    until(begun.exists)
    closing = threading.Thread(target=process.close, daemon=True)
    closing.start()
    for thread in (closing, asking):
        thread.join(30.0)
        assert not thread.is_alive()
    assert [type(error) for error in failed] == [RuntimeUnavailableError]


def test_feeds_that_are_kept_outlast_the_process(process: SessionProcess) -> None:
    session = OnnxSession(GRAPH)
    all_feeds = feeds(session)
    expected = session.run(all_feeds)
    (first, value), *remaining_feeds = all_feeds.items()
    kept_feeds = session.keep(dict(remaining_feeds))
    runs = [session.run({first: value}, kept_feeds=kept_feeds) for _ in range(2)]
    os.kill(pid(process), signal.SIGKILL)
    runs.append(session.run({first: value}, kept_feeds=kept_feeds))
    for outputs in runs:
        assert {n: v.tobytes() for n, v in outputs.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_it_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with run_by_child_process():
        assert OnnxSession(GRAPH).inputs


def test_it_ends_with_the_process_that_started_it_and_this_one_loads_no_onnxruntime() -> None:
    program = f"""
import sys
from fedprune.runtime import session
with session.run_by_child_process():
    session.OnnxSession({GRAPH.read_bytes()!r})
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
    until(lambda: not _alive(child))


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
