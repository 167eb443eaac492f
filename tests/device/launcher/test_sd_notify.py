"""Datagrams to systemd, received by a socket of one's own: in the file system and in Linux's abstract names."""

import os
import socket
import threading
from pathlib import Path

import pytest

from fedprune_device.launcher.sd_notify import READY, extend_start, notify, status_line, watchdog_seconds
from fedprune_flash.kit.unit import unit_text

pytestmark = pytest.mark.board


@pytest.mark.parametrize("abstract", [False, True])
def test_a_datagram_arrives(tmp_path: Path, abstract: bool) -> None:
    name = f"fedprune-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        address = f"@{name}" if abstract else name
        assert notify(READY, {"NOTIFY_SOCKET": address})
        assert notify(status_line("round 3\nof 20"), {"NOTIFY_SOCKET": address})
        assert [manager.recv(100) for _ in range(2)] == [b"READY=1", b"STATUS=round 3 of 20"]


def test_without_a_listener_nothing_happens(tmp_path: Path) -> None:
    for address in ("", "relative", "vsock:2:1", str(tmp_path / "nobody"), f"@fedprune-nobody-{os.getpid()}"):
        assert not notify(READY, {"NOTIFY_SOCKET": address})
    assert not notify(READY, {})


def test_a_full_queue_does_not_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        sent = [notify(READY, {"NOTIFY_SOCKET": str(tmp_path / "notify")}) for _ in range(5000)]
    assert sent[0]
    assert not sent[-1]


def test_a_start_that_waits_asks_for_more_time_again_and_again() -> None:
    texts: list[str] = []
    enough = threading.Event()

    def tell(text: str) -> None:
        texts.append(text)
        if len(texts) >= 3:
            enough.set()

    with extend_start("waiting for\napproval", tell, interval_s=0.001):
        assert enough.wait(30)
    count = len(texts)
    seconds = next(line for line in unit_text().splitlines() if line.startswith("TimeoutStartSec="))
    extension = f"EXTEND_TIMEOUT_USEC={int(seconds.partition('=')[2]) * 10**6}"
    assert {*texts} == {f"STATUS=waiting for approval\n{extension}"}
    assert not any(READY in text for text in texts), "the watchdog would begin to count"
    assert not [t for t in threading.enumerate() if t.name == "fedprune-starting"]
    assert len(texts) == count


@pytest.mark.parametrize(("interval", "seconds"), [("30000000", 30.0), ("0", None), ("x", None), (None, None)])
def test_how_often_to_feed_the_watchdog(interval: str | None, seconds: float | None) -> None:
    assert watchdog_seconds({} if interval is None else {"WATCHDOG_USEC": interval}) == seconds
