# SPDX-License-Identifier: Apache-2.0
"""Hosts on this machine: network namespaces on a bridge, with links of a given rate."""

from __future__ import annotations

import os
import shutil
import subprocess

from tools.program import UserError

DEVICE = "eth0"  # of every host, in its own namespace
_TOOLS = ("ip", "tc")
_BURST_SECONDS = 0.001  # what the token bucket may send at once; a timer tick later it is full again
_SMALLEST_BURST = 32 * 1024  # bytes
_QUEUE_SECONDS = 0.05  # what waits longer is dropped, as by a switch


def check_possible() -> None:
    """UserError where this machine cannot have such hosts."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise UserError("run: needs root on Linux, for network namespaces; run it with sudo.")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise UserError(f"run: {' and '.join(missing)} not found; install iproute2.")


class Network:
    """A context manager: hosts 0 ... count - 1, each with one link to a switch; all is gone after it.

    Names are of this process only, and everything lies in namespaces of its own: nothing else on the machine is
    touched, and several may be up at a time.
    """

    def __init__(self, hosts: int):
        self.hosts = hosts
        self._switch = f"csgd{os.getpid()}-switch"
        self._made: list[str] = []

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Deletes the namespaces, and with them all that is in there."""
        while self._made:
            subprocess.run(["ip", "netns", "delete", self._made.pop()], capture_output=True, check=False)

    def command(self, host: int, arguments: list[str]) -> list[str]:
        """What runs ``arguments`` on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *arguments]

    @staticmethod
    def address(host: int) -> str:
        """IPv4 address of a host; private, and seen by these hosts only."""
        return f"10.77.0.{host + 1}"

    def shape(self, mbit: float) -> None:
        """Limits every link to ``mbit`` Mbit/s in each direction: at the host's end and at the switch's.

        A token bucket that counts whole Ethernet frames. Packets of up to 64 KiB that the kernel hands over in one
        piece, as to a network card, are counted as the frames they become, headers and all.
        """
        rate = mbit * 1e6 / 8  # bytes per second
        burst = max(_SMALLEST_BURST, round(rate * _BURST_SECONDS))
        limit = ["rate", f"{round(rate * 8)}bit", "burst", str(burst), "latency", f"{_QUEUE_SECONDS * 1000:g}ms"]
        for host in range(self.hosts):
            for namespace, device in ((self._namespace(host), DEVICE), (self._switch, _port(host))):
                _run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limit])

    def _make(self) -> None:
        self._add_namespace(self._switch)
        _run(["ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge"])
        _run(["ip", "-n", self._switch, "link", "set", "bridge", "up"])
        for host in range(self.hosts):
            name = self._namespace(host)
            self._add_namespace(name)
            pair = ["type", "veth", "peer", "name", DEVICE, "netns", name]
            _run(["ip", "-n", self._switch, "link", "add", _port(host), *pair])
            _run(["ip", "-n", self._switch, "link", "set", _port(host), "master", "bridge", "up"])
            _run(["ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", DEVICE])
            for device in (DEVICE, "lo"):
                _run(["ip", "-n", name, "link", "set", device, "up"])

    def _add_namespace(self, name: str) -> None:
        self._made.append(name)  # first: what is interrupted between the two is deleted all the same
        _run(["ip", "netns", "add", name])

    def _namespace(self, host: int) -> str:
        return f"csgd{os.getpid()}-host{host}"


def _port(host: int) -> str:
    return f"port{host}"


def _run(command: list[str]) -> None:
    # In a session of its own: Ctrl-C is for this program, which then deletes what the command has made.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"run: {' '.join(command)!r} failed ({reason}); the kernel may lack it, or forbid it here.")
