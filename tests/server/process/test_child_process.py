"""A child process that ends again and again is left alone for a while, and one that is asked to end does."""

import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from fedprune_server.process.child_process import MAX_SHORT_RUNS, RESTART_BACKOFF_S, ChildProcess, RestartedProcess
from support.waiting import until


def restarted_process(program: str) -> RestartedProcess[bytes]:
    def read(stream: BinaryIO) -> bytes | None:
        return stream.readline() or None

    return RestartedProcess(lambda: ChildProcess([sys.executable, "-c", program], "a child", read), "a child", stop_s=5)


def test_a_process_that_cannot_begin_is_left_alone_for_a_while() -> None:
    child = restarted_process("raise SystemExit(3)")
    for turn in range(MAX_SHORT_RUNS):
        assert child.start(lambda: b"\n", float(turn))
        until(lambda turn=turn: (list(child.receive_all(float(turn))), not child.is_alive)[1])  # type: ignore[misc]
    assert child.pid is None
    assert not child.start(lambda: b"\n", 10.0)
    assert child.start(lambda: b"\n", 10.0 + RESTART_BACKOFF_S)
    child.stop()


def test_a_line_goes_to_it_and_comes_back_and_it_ends_when_asked() -> None:
    child = restarted_process("import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
    assert child.start(lambda: b"first\n", 0.0)
    lines = until(lambda: list(child.receive_all(0.0)))
    pid = child.pid
    child.stop()
    assert lines == [b"first\n"]
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("guard", "error"), [("", 1), ("if True: ", 1), ("if __name__ == '__main__': ", 0)])
def test_a_script_that_its_processes_would_run_again_is_refused(tmp_path: Path, guard: str, error: int) -> None:
    script = tmp_path / "script.py"
    line = f"{guard}print(ProcessPool(1, list).submit(len).result())"
    script.write_text(f"from fedprune_server.process.pools import ProcessPool\n{line}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ("" if error else "0\n")
    assert done.stderr.count("Traceback") == done.stderr.count(f"ConfigError: {script}, line 2, ") == error
