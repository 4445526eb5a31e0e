# SPDX-License-Identifier: Apache-2.0
"""What a plain TCP stream achieves between hosts: whether a link has the rate it should have."""

from __future__ import annotations

import socket
import threading
import time

PORT = 29400
# What frames of 1514 bytes leave for the data after the headers of Ethernet, IP and TCP with time stamps.
PAYLOAD_SHARE = 1448 / 1514
_CHUNK = bytes(1 << 16)


class Receiver:
    """Takes one stream on ``address`` in a thread of its own."""

    def __init__(self, address: str, timeout: float = 30):
        self._server = socket.create_server((address, PORT))
        self._server.settimeout(timeout)
        self._rate = 0.0
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        with self._server, self._server.accept()[0] as stream:
            received = len(stream.recv(len(_CHUNK)))
            start, first = time.perf_counter(), received
            while chunk := stream.recv(len(_CHUNK)):
                received += len(chunk)
            self._rate = (received - first) / max(time.perf_counter() - start, 1e-9)

    def rate(self) -> float:
        """Bytes of payload per second; waits for the end of the stream."""
        self._thread.join()
        return self._rate


def send(address: str, seconds: float) -> None:
    """Sends zeros to the Receiver at ``address`` as fast as they go."""
    with socket.create_connection((address, PORT), timeout=30) as stream:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            stream.sendall(_CHUNK)
