"""Carries bytes between standard input and output and a port of this machine: qemu starts one for each connection.

python arm_relay.py PORT
"""

import os
import selectors
import socket
import sys

PIECE = 65536


def main(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer, selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        ready.register(peer, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj == 0:
                    piece = os.read(0, PIECE)
                    peer.sendall(piece)
                else:
                    piece = peer.recv(PIECE)
                    _write(piece)
                if not piece:
                    return


def _write(piece: bytes) -> None:
    while piece:
        piece = piece[os.write(1, piece) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
