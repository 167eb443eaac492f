"""The address of the local interface: a unix socket, or a port that only this machine reaches."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ConfigError, StorageError, path_remedy

SOCKET_MODE = 0o660  # the board's user and its group may connect
# Linux takes 107 bytes for the path of a unix socket (unix(7)); a temporary name is longer by the process's id.
_MAX_PATH_BYTES = 100

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TCP = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]+)):(\d{1,5})")
# Connections that wait in the kernel: more than are served at a time, so that a burst is answered and not refused.
_BACKLOG = 32

# The socket in the state folder, where no other address is given.
SOCKET = "local.sock"


class ListeningSocket(socket.socket):
    """A listening socket, with the identity of its file."""

    file_identity: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class LocalAddress:
    """An address that only this machine reaches: a socket's file, or host and port (0 takes a free one)."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> LocalAddress:
        """Read `unix:/path` or `127.0.0.1:PORT`; raises `ConfigError` for anything else."""
        if text.startswith("unix:"):
            path = Path(text.removeprefix("unix:"))
            if not path.is_absolute() or len(os.fsencode(path)) > _MAX_PATH_BYTES:
                expected = f"unix: and an absolute path of at most {_MAX_PATH_BYTES} bytes"
                raise ConfigError("address of the local interface", expected=expected, got=repr(text))
            return cls(path)
        match = _TCP.fullmatch(text)
        if match is None or int(match[3]) > 65_535:
            expected = "unix:/run/fedprune/local.sock or 127.0.0.1:PORT"
            raise ConfigError("address of the local interface", expected=expected, got=repr(text))
        host = match[1] or match[2]
        if host not in _LOOPBACK:
            raise ConfigError(
                "address of the local interface",
                expected=" or ".join(_LOOPBACK),
                got=host,
                hint="The interface has no authentication, so that no other machine may reach it; use ssh -L for that.",
            )
        return cls(None, "127.0.0.1" if host == "localhost" else host, int(match[3]))

    @classmethod
    def from_option(cls, text: str | None, state: Path) -> LocalAddress | None:
        """The address of the command line: None without one, by default the socket in the state folder."""
        return None if text is None else cls.parse(text or f"unix:{state.absolute() / SOCKET}")

    def bind(self) -> ListeningSocket:
        """A listening socket; raises `StorageError` if another program listens there or the file can't be made."""
        return self._bind_port() if self.path is None else self._bind_file(self.path)

    def release(self, bound: ListeningSocket) -> None:
        """Close the socket, and delete its file if it is still this one's."""
        bound.close()
        if self.path is not None and bound.file_identity is not None:
            with contextlib.suppress(OSError):
                if _file_identity(self.path) == bound.file_identity:
                    self.path.unlink()

    def _bind_port(self) -> ListeningSocket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = ListeningSocket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, self.port))
            bound.listen(_BACKLOG)
        except OSError as error:
            bound.close()
            raise StorageError(
                f"can't listen on {self.host}:{self.port}: {error.strerror or error}", hint="Choose another port."
            ) from error
        return bound

    def _bind_file(self, path: Path) -> ListeningSocket:
        _check_free(path)
        # Under another name until its permissions are set and it listens: a client never meets a half-made socket, and
        # replace() takes the place of a dead one at once.
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        bound = ListeningSocket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            temporary.unlink(missing_ok=True)
            bound.bind(str(temporary))
            temporary.chmod(SOCKET_MODE)
            bound.listen(_BACKLOG)
            bound.file_identity = _file_identity(temporary)
            temporary.replace(path)
        except OSError as error:
            bound.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(f"can't listen on {path}: {error.strerror or error}", hint=path_remedy(error)) from error
        return bound


def _file_identity(path: Path) -> tuple[int, int, int]:
    """Identify a file by device, inode and modification time: inode numbers are reused."""
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _check_free(path: Path) -> None:
    """Raise `StorageError` if a process listens there; a socket that a killed process left doesn't matter."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"can't listen on {path}: {error.strerror}", hint=path_remedy(error)) from error
    if not stat.S_ISSOCK(status.st_mode):
        raise StorageError(f"{path} is there already, and no socket", hint="Choose another path.")
    # Only a connection tells a live socket from one that was left: the file looks the same.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise StorageError(f"can't listen on {path}: {error.strerror or error}", hint=path_remedy(error)) from error
    raise StorageError(f"another program listens on {path}", hint="Stop it, or choose another path.")
