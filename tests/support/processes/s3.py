"""S3 servers of a test's own, on this machine alone, which can be stopped and continued: moto's, a mock, and Ceph's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedprune_server.enrollment.pki import IdentityFolder
from support.processes.machine import free_port

SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class S3:
    """A server; what it has is gone with it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._names = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="fedprune-s3-"))

    @property
    def pid(self) -> int:
        """Of the process that answers."""
        return self._processes[-1].pid

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to know to use it."""
        return SECRETS | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def client(self) -> Any:
        """boto3's own."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def bucket(self) -> str:
        """Name of a new, empty bucket."""
        self._names += 1
        name = f"test-{os.getpid()}-{self._names}"
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> dict[str, int]:
        """Keys and sizes of a bucket's objects."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", ())}

    def hold(self) -> None:
        """Answer no request until `go_on`."""
        pid = self._processes[-1].pid
        os.kill(pid, signal.SIGSTOP)  # until its first thread gets a turn, the others go on
        until = time.monotonic() + 10
        while not all(map(_is_stopped, Path(f"/proc/{pid}/task").iterdir())):
            assert time.monotonic() < until
            time.sleep(0.001)

    def resume(self) -> None:
        """Answer again."""
        os.kill(self._processes[-1].pid, signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, command: Sequence[str | Path]) -> None:
        if shutil.which("setpriv"):  # it ends with a test run that is killed, too
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with (self._folder / "log").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder))

    def _wait(self) -> None:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:  # noqa: PERF203 - each turn waits anyway
                log = (self._folder / "log").read_text()
                assert not [p for p in self._processes if p.poll() is not None], log
                assert time.monotonic() < until, log
                time.sleep(0.1)


class Moto(S3):
    """A mock, which anybody may use with any key."""

    def __init__(self) -> None:
        if find_spec("moto") is None:
            _missing("moto")
        super().__init__()
        self._start([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)])
        self._wait()


class Ceph(S3):
    """A Ceph cluster with a gateway, one monitor and one daemon that keeps objects in memory.

    `authority` is of the certificate at `secure_endpoint`.
    """

    def __init__(self) -> None:
        for program in ("radosgw", "ceph-mon", "ceph-osd"):
            if shutil.which(program) is None:
                _missing(program)
        super().__init__()
        (self._folder / "osd").mkdir()
        monitor = free_port()
        self._settings = self._folder / "ceph.conf"
        with IdentityFolder.make(self._folder / "tls", "s3") as identity:
            certificate, key, self.authority = identity.listener_files("web", ("127.0.0.1",))
        secure = free_port()
        self.secure_endpoint = f"https://127.0.0.1:{secure}"
        fields = (self._folder, self.port, secure, certificate, key)
        self._settings.write_text(_CEPH.format(uuid.uuid4(), monitor, *fields))
        osd = str(uuid.uuid4())
        try:
            self._run("ceph-mon", "-i", "a", "--mkfs", "--public-addr", f"v2:127.0.0.1:{monitor}")
            self._daemon("ceph-mon", "-i", "a")
            self._run("ceph", "osd", "new", osd)
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            self._daemon("ceph-osd", "-i", "0")
            user = ("--uid", "test", "--display-name", "test", "--access-key", "test", "--secret-key", "test")
            self._run("radosgw-admin", "user", "create", *user)
            self._daemon("radosgw", "-n", "client.rgw.a")
            self._wait()
            self.client().put_object(Bucket=self.bucket(), Key="first", Body=b"")  # for which it makes its pools
        except BaseException:
            self.close()
            raise

    @property
    def secure_environment(self) -> dict[str, str]:
        """What a process needs to know to use it over TLS; `SSL_CERT_FILE` is for boards."""
        trusted = dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE"), str(self.authority))
        return self.environment | {"AWS_ENDPOINT_URL": self.secure_endpoint} | trusted

    def _run(self, program: str, *arguments: str) -> None:
        command = [program, "-c", str(self._settings), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=self._folder, check=False)
        assert done.returncode == 0, done.stderr

    def _daemon(self, program: str, *arguments: str) -> None:
        self._start([program, "-c", str(self._settings), "-f", *arguments])


_CEPH = """\
[global]
fsid = {0}
mon host = v2:127.0.0.1:{1}
mon data = {2}/mon
mon data avail warn = 1
mon data avail crit = 0
mon allow pool size one = true
paxos propose interval = 0.05
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
run dir = {2}
admin socket =
log file =
osd data = {2}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default pg num = 1
osd crush chooseleaf type = 0
rgw frontends = beast endpoint=127.0.0.1:{3} ssl_endpoint=127.0.0.1:{4} ssl_certificate={5} ssl_private_key={6}
rgw thread pool size = 16
"""


def _is_stopped(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return True


def _missing(program: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {program}")
    pytest.skip(f"{program} is not installed")
