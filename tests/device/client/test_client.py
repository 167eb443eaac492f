import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fedprune_device import client
from fedprune_device.client import Board, BoardError
from fedprune_device.data.image_decoding import Pixels
from support.fakes.local_board import LocalBoard
from support.paths import ROOT

pytestmark = pytest.mark.board

X = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
PAGE = ROOT / "docs" / "local-interface.md"


def examples(language: str) -> list[str]:
    return [str(block) for block in re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)]


def run_curl(script: str, folder: Path) -> list[str]:
    """The lines that a shell prints for the page's commands."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def inputs(folder: Path) -> None:
    np.save(folder / "batch.npy", X)
    np.save(folder / "sample.npy", X[0])
    np.save(folder / "another.npy", X[1])
    (folder / "sample.raw").write_bytes(X[2].tobytes())


def test_the_curl_examples_do_what_the_page_says(serving_board: LocalBoard, tmp_path: Path) -> None:
    inputs(tmp_path)
    text, _ = examples("sh")
    assert text.count("curl ") == 10
    answers = run_curl(text.replace("SOCKET=/var/lib/fedprune/local.sock", f"SOCKET={serving_board.socket}"), tmp_path)
    assert len(answers) == 9
    assert serving_board.board.samples()["classes"] == {"1": {"kept": 1, "seen": 1, "name": "bee"}}


def test_the_curl_examples_show_and_label_a_picture_that_waits(local: LocalBoard, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    _, text = examples("sh")
    assert text.count("curl ") == 4
    x = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.float32) / 255
    with local.serving(pixels=Pixels((0.0,), (1.0,))):
        name = local.board.add(x)["id"]
        listed, labelled = map(json.loads, run_curl(f"SOCKET={local.socket}\nID={name}\n{text}", tmp_path))
        assert listed == {"samples": [name]}
        assert (labelled["id"], labelled["label"], local.board.unlabelled_samples()) == (name, 1, [])
    assert (np.asarray(image.open(tmp_path / "sample.png")) == np.round(255 * x.transpose(1, 2, 0))).all()
    assert (np.load(tmp_path / "sample.npy") == x).all()


def test_the_python_example_does_what_the_page_says(serving_board: LocalBoard, tmp_path: Path) -> None:
    inputs(tmp_path)
    script = examples("python")[0].replace("unix:/var/lib/fedprune/local.sock", serving_board.address)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "label: expected a whole number from 0 to 2, or a class's name, got 'dog'" in done.stdout
    assert serving_board.board.samples()["classes"]["2"]["kept"] == 1


def test_the_client_needs_the_standard_library_alone(serving_board: LocalBoard, tmp_path: Path) -> None:
    """As a copy, in an interpreter that finds nothing else."""
    shutil.copy(str(client.__file__), tmp_path / "board.py")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import board\n"
        "found = board.Board(sys.argv[2]).predict([[0.0] * 6])\n"
        "assert {m.split('.')[0] for m in sys.modules} <= {'board', '__main__', *sys.stdlib_module_names}\n"
        "print(found.round)"
    )
    command = [sys.executable, "-I", "-S", "-c", script, str(tmp_path), serving_board.address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_a_board_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BoardError, match=r"can't be reached .*--local") as refusal:
        Board(f"unix:{tmp_path}/none", tries=2).status()
    assert refusal.value.status == 0
    assert not Board(f"unix:{tmp_path}/none", tries=1).healthy()
    with pytest.raises(BoardError, match="address of the board"):
        Board("nowhere")
    with pytest.raises(BoardError, match="an absolute one"):
        Board("unix:relative/path")


def test_an_error_of_the_board_has_its_parts(serving_board: LocalBoard) -> None:
    with pytest.raises(BoardError) as refusal:
        serving_board.board.predict(np.zeros((2, 7)))
    error = refusal.value
    assert (error.status, error.what, error.got) == (422, "shape of the input", "[2, 7]")
    assert "[6]" in error.expected


def answering(path: Path, *answers: bytes) -> threading.Thread:
    """A board that gives each connection the next answer, whatever it is asked."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def http(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)) + body


def test_a_busy_or_broken_board_is_asked_again(tmp_path: Path) -> None:
    answers = [http(503, b'{"error": {"what": "busy"}}'), b"", b"nonsense\r\n\r\n", http(200, b'{"phase": "idle"}')]
    thread = answering(tmp_path / "s", *answers)
    assert Board(f"unix:{tmp_path}/s").status() == {"phase": "idle"}
    thread.join()


@pytest.mark.parametrize("body", [b"", b"[1]", b"nonsense", b'{"error": 3}'])
def test_an_answer_that_makes_no_sense_is_an_error_of_its_status(tmp_path: Path, body: bytes) -> None:
    thread = answering(tmp_path / "s", http(500, body))
    with pytest.raises(BoardError, match=r"500|not JSON"):
        Board(f"unix:{tmp_path}/s", tries=1).status()
    thread.join()
