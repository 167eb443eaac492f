"""A connection to a board: the system's own `ssh`, with the board's python3 running `on_board.remote_agent`."""

from __future__ import annotations

import io
import json
import os
import subprocess  # nosec B404  # lists of words, never a shell
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedprune.core.errors import BoardError, shown
from fedprune.core.text import one_line
from fedprune_flash.on_board import remote_agent
from fedprune_flash.ssh.inventory import BoardRow

OLDEST = (3, 10)  # the oldest Python that the runtime supports

# It holds nothing of the inventory, so that nothing needs quoting for the remote shell.
_BEGIN = (
    "import sys; print('fedprune: [%d, %d]' % sys.version_info[:2]); sys.stdout.flush(); "
    "exec(compile(sys.stdin.buffer.read(int(sys.argv[1])), 'remote_agent', 'exec'))"
)
INSTALL_S = 1800.0  # limit of an installer, without the wait for the service

_CONNECT_S = 20
_ANSWER_S = 180.0
_CLOSE_S = 5.0
_KEPT = 2**16
_PIECE = 2**18
_LONGEST_LINE = 2**20
_STRAY_LINES = 1000
_HINT = "Is it on, and is the address right?"


def ssh_command(row: BoardRow, *, accept_new: bool, length: int) -> list[str]:
    """The command line for a board; `length` are the bytes of the program that follows on standard input.

    `accept_new` accepts the key of an unknown host; a changed key is never accepted.
    """
    options = {
        "BatchMode": "yes",
        "ClearAllForwardings": "yes",
        "ConnectTimeout": str(_CONNECT_S),
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "LogLevel": "ERROR",
        "ServerAliveCountMax": "4",
        "ServerAliveInterval": "15",
        "StrictHostKeyChecking": "accept-new" if accept_new else "yes",
    }
    if row.key:
        options["IdentitiesOnly"] = "yes"
    if row.known_hosts:
        options["UserKnownHostsFile"] = f'"{row.known_hosts}"'
    command = ["ssh", "-T"]
    if row.port is not None:
        command += ["-p", str(row.port)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    if row.key:
        command += ["-i", row.key]
    if row.user:
        command += ["-l", row.user]
    return [*command, "--", row.host, f'python3 -c "{_BEGIN}" {length}']


class BoardLink:
    """An open connection to a board. Every method raises `BoardError` if it breaks or the board reports an error."""

    def __init__(self, row: BoardRow, *, accept_new: bool) -> None:
        self._root = row.root
        self._said = bytearray()
        self._slow = ""
        source = Path(remote_agent.__file__).read_bytes()
        try:
            self._process = subprocess.Popen(  # noqa: S603  # nosec B603  # ssh with words that the inventory's checks let through
                ssh_command(row, accept_new=accept_new, length=len(source)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise BoardError(f"can't run ssh: {error.strerror}", hint="Install OpenSSH's client here.") from error
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            found = self._heard(_ANSWER_S)
            if not isinstance(found, list) or len(found) != 2 or not all(isinstance(n, int) for n in found):
                raise BoardError("the board's first answer can't be read", got=shown(found))
            if tuple(found) < OLDEST:
                raise BoardError(
                    "its Python is too old", expected="3.10 or newer", got=f"{found[0]}.{found[1]}",
                    hint="Put a newer system on it.",
                )  # fmt: skip
            self._send(source)
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **values: Any) -> dict[str, Any]:
        self._send(json.dumps({"op": op, "root": self._root, **values}).encode() + b"\n")
        return self._answer(_ANSWER_S)

    def put(
        self, path: str, data: bytes | Path, sha256: str, size: int, offset: int, told: Callable[[int], None]
    ) -> bool:
        """Copy a file of a kit, from an offset on; False if the board got something else, which it has deleted.

        `told` takes the number of bytes of each piece that was sent.
        """
        request = {"op": "put", "root": self._root, "path": path, "sha256": sha256, "size": size, "offset": offset}
        self._send(json.dumps(request).encode() + b"\n")
        left = size - offset
        with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as source:
            source.seek(offset)
            while left:
                piece = source.read(min(_PIECE, left))
                if not piece:
                    raise BoardError(f"{path} of the kit has become shorter", hint="Make the kit again.")
                self._send(piece)
                left -= len(piece)
                told(len(piece))
        return self._answer(_ANSWER_S).get("put") is True

    def install(self, words: list[str], told: Callable[[str], None], seconds: float = INSTALL_S) -> tuple[int, str]:
        """Run the copied installer; returns its exit code and last line. `told` takes each line of its output."""
        self._send(json.dumps({"op": "install", "root": self._root, "words": words}).encode() + b"\n")
        end = time.monotonic() + seconds
        while True:
            body = self._answer(end - time.monotonic())
            if "line" not in body:
                code, last = body.get("code"), body.get("last")
                return (code if isinstance(code, int) else 1), one_line(str(last))
            told(one_line(str(body["line"])))

    def close(self) -> None:
        with suppress(OSError), self._within(_CLOSE_S):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._listener.join(_CLOSE_S)

    def kill(self) -> None:
        self._process.kill()

    def _send(self, data: bytes) -> None:
        out = self._process.stdin
        try:
            if out is None:
                raise BrokenPipeError
            with self._within(_ANSWER_S):
                out.write(data)
                out.flush()
        except OSError as error:
            raise self._lost() from error

    def _answer(self, seconds: float) -> dict[str, Any]:
        body = self._heard(seconds)
        if not isinstance(body, dict):
            raise BoardError("the board sends something else than an answer", got=shown(body))
        if "error" in body:
            raise BoardError(f"on the board: {one_line(str(body['error']))}")
        return body

    def _heard(self, seconds: float) -> Any:
        """The next line of the remote agent; other lines, such as a login shell's, are skipped."""
        try:
            with self._within(seconds):
                source = self._process.stdout
                for _ in range(_STRAY_LINES):
                    raw = b"" if source is None else source.readline(_LONGEST_LINE)
                    if not raw:
                        raise self._lost()
                    line = raw.decode("utf-8", "replace")
                    if line.startswith(remote_agent.MARK):
                        return json.loads(line[len(remote_agent.MARK) :])
        except (ValueError, RecursionError) as error:
            raise BoardError("the board's answer can't be read") from error
        raise BoardError(
            "the board's login prints too much", hint="Its shell must not print where there is no terminal."
        )

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Close the connection if the block takes longer, so that a stuck board doesn't hold up the others."""
        timer = threading.Timer(max(seconds, 0.0), self._late, [seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _late(self, seconds: float) -> None:
        self._slow = f"it neither reads nor answers for {seconds:.0f} s"
        self.kill()

    def _listen(self) -> None:
        """Keep the end of the error output of ssh and the board's login, of any length."""
        source = self._process.stderr
        if source is None:
            return
        with source:
            while piece := os.read(source.fileno(), _PIECE):
                self._said += piece
                del self._said[:-_KEPT]

    def _lost(self) -> BoardError:
        """The error for a closed connection, by what ssh reported."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_CLOSE_S)
        self._listener.join(_CLOSE_S)
        if self._slow:
            return BoardError(f"no connection: {self._slow}", hint=_HINT)
        text = bytes(self._said).decode("utf-8", "replace")
        line = one_line(([part for part in text.splitlines() if part.strip()] or ["the connection broke"])[-1])
        if "HOST IDENTIFICATION HAS CHANGED" in text:
            return BoardError(
                "its host key is not the one that is known",
                hint="Was it set up again? Then `ssh-keygen -R` its address. If not, another machine answers.",
            )
        if "Host key verification failed" in text:
            return BoardError(
                "its host key is not known", hint="Log in by hand and compare it, or use --accept-new-hosts."
            )
        if "Permission denied" in text:
            return BoardError(f"it refuses the login: {line}", hint="See `user` and `key` in the inventory.")
        if self._process.returncode in (126, 127):
            return BoardError("it has no python3", hint="sudo apt install python3")
        return BoardError(f"no connection: {line}", hint=_HINT)
