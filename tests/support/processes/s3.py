"""An S3 of a test's own: moto's server in a process beside it, which can be stopped and let go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import pytest

from support.processes.machine import free_port

SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class S3:
    """A stand-in for a bucket's server, on this machine alone; what it holds is gone with it."""

    def __init__(self) -> None:
        if find_spec("moto") is None:
            if os.environ.get("CI") == "true":
                pytest.fail("CI must have moto")
            pytest.skip("moto is not installed")
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._names = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:  # noqa: PERF203 - each turn waits anyway
                assert self._process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)

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
        """What lies in a bucket, and how large it is."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", ())}

    def hold(self) -> None:
        """Answer nobody until `go_on`."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again."""
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
