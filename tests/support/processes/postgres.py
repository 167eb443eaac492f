"""A PostgreSQL server of a test's own, which can be killed and started again."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.processes.machine import free_port

USER = "fedprune"


def find_programs() -> Path:
    """The folder of initdb and postgres; Debian keeps them where nobody looks."""
    initdb = shutil.which("initdb")
    folders = [Path(initdb).resolve().parent] if initdb else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    if os.environ.get("CI") == "true":
        pytest.fail("CI must have PostgreSQL")
    pytest.skip("PostgreSQL is not installed")


class Postgres:
    """A cluster in a folder of its own, on this machine alone.

    Root may not run it: then it is another user's.

    Args:
        password: Its user's; without one everybody is let in.
        options: Further ones of initdb.
    """

    def __init__(self, password: str = "", options: Sequence[str] = ()) -> None:
        self._programs = find_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="fedprune-pg-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            names = {p.pw_name for p in pwd.getpwall()}
            self._user = {"user": "postgres" if "postgres" in names else "nobody", "extra_groups": []}
            shutil.chown(self._folder, self._user["user"])
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._names = 0
        self._password = password
        initdb = [self._programs / "initdb", "-D", self._folder / "data", "-U", USER, "-N", "-E", "UTF8", *options]
        if password:
            (self._folder / "password").write_text(password)
            initdb += ["--pwfile", self._folder / "password"]
        else:
            initdb += ["-A", "trust"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=self._folder, **self._user)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self._folder}
        settings |= {"fsync": "off", "max_connections": 40, "shared_buffers": "16MB"}
        options = [text for k, v in settings.items() for text in ("-c", f"{k}={v}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **self._user,
            )
        until = time.monotonic() + 60
        while self.sql("SELECT 1", check=False).returncode:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < until, (self._folder / "log").read_text()
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        """Of its first process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9 of its first process and of those that it started, which would serve open connections a while."""
        children = self.children()
        self._process.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        (self._folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def children(self) -> list[int]:
        """The processes that its first one has started."""
        pid = self._process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def backends(self) -> list[int]:
        """Those of them that serve a connection of ours."""
        pids = []
        for pid in self.children():
            with suppress(OSError):
                if f"postgres: {USER} ".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.append(pid)
        return pids

    def stop(self) -> None:
        """End it at once, but in order."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)

    def close(self) -> None:
        """End it and delete what it has."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def sql(self, text: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run something by the database's own program."""
        command = [
            self._programs / "psql",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            USER,
            "postgres",
            "-qtAc",
            text,
        ]
        environment = os.environ | {"PGPASSWORD": self._password}
        return subprocess.run(command, check=check, capture_output=True, text=True, env=environment)

    def database(self) -> str:
        """URL of a new, empty database."""
        self._names += 1
        self.sql(f"CREATE DATABASE test{self._names}")
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/test{self._names}"
