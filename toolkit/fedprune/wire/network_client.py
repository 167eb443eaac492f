"""paho's MQTT client with a network loop of fewer system calls, each of which makes this thread wait for the others.

paho reads a packet's first bytes one by one, and its own loop is woken by each message that another thread queues. Here
bytes are read many at a time, and the loop is woken once for all messages that were queued since it last wrote.
"""

from __future__ import annotations

import select
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode

# Bytes that are read at a time. Larger parts of a packet are read by themselves, so that no chunk is copied twice.
_READ_BYTES = 16 * 1024

# Calls of `loop_read` before something is written again, so that a flood doesn't stop what is sent. Each reads up to
# as many packets as messages are in flight.
_MAX_READS = 64


class NetworkClient(paho.Client):
    """A client whose `run_once` one thread calls again and again, while others publish.

    It replaces paho's `loop`, by paho's own functions for other loops.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._received = memoryview(b"")  # bytes that were read and are no packet yet
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for side in (self._wake_receiver, self._wake_sender):
            side.setblocking(False)
        super().__init__(*args, **options)
        # Called once when a message is queued, and again only after everything was written. It doesn't refer to this
        # client, which would then keep its sockets open until the garbage collector runs.
        self.on_socket_register_write = partial(_wake, self._wake_sender)

    def run_once(self, timeout: float) -> MQTTErrorCode:
        """Wait up to `timeout` seconds for the network or a queued message, then read and write what is there."""
        sock = self.socket()
        if sock is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        # Not `select`, which takes no descriptor from 1024 on.
        poll = select.poll()
        waiting = bool(self._received) or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)
        try:
            poll.register(sock, select.POLLIN | (select.POLLOUT if self.want_write() else 0))
            poll.register(self._wake_receiver, select.POLLIN)
            events = dict(poll.poll(0 if waiting else timeout * 1000))
        except (OSError, ValueError):  # the socket was closed meanwhile
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        was_woken = self._wake_receiver.fileno() in events
        if was_woken:
            with suppress(BlockingIOError):
                self._wake_receiver.recv(4096)
        sock_events = events.get(sock.fileno(), 0)
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        if waiting or sock_events & ~select.POLLOUT:  # errors and the end are read, too
            code = self.loop_read()
            for _ in range(_MAX_READS):
                if code != MQTTErrorCode.MQTT_ERR_SUCCESS or not self._received:
                    break
                code = self.loop_read()
        # Once woken also without a packet: only `loop_write` lets the next message wake the loop again, and the last
        # turn may have written the packet before its publisher woke the loop.
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS and (was_woken or sock_events & select.POLLOUT or self.want_write()):
            code = self.loop_write()
        return self.loop_misc() if code == MQTTErrorCode.MQTT_ERR_SUCCESS else code

    def close(self) -> None:
        """Close what wakes the loop, which doesn't run any more."""
        self._wake_receiver.close()
        self._wake_sender.close()

    def _sock_recv(self, bufsize: int) -> bytes:
        # A later paho that doesn't call this reads as before.
        if not self._received:
            received = super()._sock_recv(max(bufsize, _READ_BYTES))
            if len(received) <= bufsize:
                return received
            self._received = memoryview(received)
        part, self._received = bytes(self._received[:bufsize]), self._received[bufsize:]
        return part


def _wake(sender: socket.socket, *_: Any) -> None:
    with suppress(OSError):  # the loop is awake, or closed
        sender.send(b"\0")
