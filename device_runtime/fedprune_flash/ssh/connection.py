"""A connection to a board: the system's own `ssh`, with the board's python3 running `on_board.remote_agent`."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprune.core.errors import BoardError, shown
from fedprune.core.line_process import LineProcess, StrayLinesError
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
_PIECE = 2**18
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
        source = Path(remote_agent.__file__).read_bytes()
        try:
            self._process = LineProcess(ssh_command(row, accept_new=accept_new, length=len(source)))
        except OSError as error:
            raise BoardError(f"can't run ssh: {error.strerror}", hint="Install OpenSSH's client here.") from error
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
        self._process.close()

    def kill(self) -> None:
        self._process.kill()

    def _send(self, data: bytes) -> None:
        try:
            self._process.send(data, _ANSWER_S)
        except OSError as error:
            raise self._lost(_ANSWER_S) from error

    def _answer(self, seconds: float) -> dict[str, Any]:
        body = self._heard(seconds)
        if not isinstance(body, dict):
            raise BoardError("the board sends something else than an answer", got=shown(body))
        if "error" in body:
            raise BoardError(f"on the board: {one_line(str(body['error']))}")
        return body

    def _heard(self, seconds: float) -> Any:
        try:
            return self._process.answer(seconds)
        except EOFError as error:
            raise self._lost(seconds) from error
        except StrayLinesError as error:
            raise BoardError(
                "the board's login prints too much", hint="Its shell must not print where there is no terminal."
            ) from error
        except (ValueError, RecursionError) as error:
            raise BoardError("the board's answer can't be read") from error

    def _lost(self, seconds: float) -> BoardError:
        """The error for a closed connection, by what ssh reported."""
        code, text = self._process.end()
        if self._process.late:
            return BoardError(f"no connection: it neither reads nor answers for {seconds:.0f} s", hint=_HINT)
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
        if code in (126, 127):
            return BoardError("it has no python3", hint="sudo apt install python3")
        return BoardError(f"no connection: {line}", hint=_HINT)
