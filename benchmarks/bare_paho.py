"""Bytes through a broker by paho alone, to compare with: one process publishes, one counts."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fedprune.blobs.blob_ref import LEAF, leaf_table


def bare(url: str, size: int, leaves: int, qos: int, *, stored: bool = False) -> float | None:
    """Seconds that paho takes for some bytes; None where the broker lost some of them.

    Args:
        url: The broker's.
        size: Bytes in all.
        leaves: Leaves of a chunk: pieces of 32 KiB.
        qos: Quality of service to publish at.
        stored: Let who counts hash what comes, leaf by leaf, write it to a file and flush that, too.
    """
    counter, theirs = multiprocessing.Pipe()
    sender, theirs_too = multiprocessing.Pipe()
    processes = [
        multiprocessing.Process(target=_count, args=(url, size, qos, stored, theirs)),
        multiprocessing.Process(target=_publish, args=(url, size, leaves, qos, theirs_too)),
    ]
    for process in processes:
        process.start()
    assert counter.recv() == sender.recv() == "ready"
    counter.send("go")
    sender.send("go")
    took: float | None = counter.recv()
    sender.send("stop")
    for process in processes:
        process.join()
    return took


def _new_client(url: str, name: str) -> paho.Client:
    host, port = url.removeprefix("mqtt://").split(":")
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name)
    client.connect(host, int(port))
    client.loop_start()
    return client


def _publish(url: str, size: int, leaves: int, qos: int, pipe: Connection) -> None:
    """Publish it all, as fast as paho takes it."""
    client, payload = _new_client(url, "sender"), bytes(leaves * LEAF)
    pipe.send("ready")
    pipe.recv()
    for at in range(0, size, len(payload)):
        client.publish("bare", payload[: size - at], qos)
    pipe.recv()
    client.disconnect()
    client.loop_stop()


def _count(url: str, size: int, qos: int, stored: bool, pipe: Connection) -> None:
    """Count payload bytes until all are there; tells how long they took, or that they didn't come."""
    done, ready, seen = threading.Event(), threading.Event(), 0
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the process

    def message(_client: Any, _user: Any, message: paho.MQTTMessage) -> None:
        nonlocal seen
        if stored:
            leaf_table(message.payload)
            file.write(message.payload)
        seen += len(message.payload)
        if seen >= size:
            done.set()

    client = _new_client(url, "counter")
    client.on_message = message
    client.on_subscribe = lambda *_: ready.set()
    client.subscribe("bare", qos)
    assert ready.wait(5)
    pipe.send("ready")
    pipe.recv()
    began = time.perf_counter()
    whole = done.wait(60)
    if stored:
        os.fsync(file.fileno())
    pipe.send(time.perf_counter() - began if whole else None)
    client.disconnect()
    client.loop_stop()
