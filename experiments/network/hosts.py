# SPDX-License-Identifier: Apache-2.0
"""The processes on the hosts: started, led through the rates, and ended whatever happens."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.program import UserError

from .namespaces import DEVICE, Network
from .worker import TIMEOUT, Settings

ROOT = Path(__file__).resolve().parents[2]
_PORT = 29401
Message = dict[str, Any]


class Processes:
    """A context manager: one worker.py on each host of a network."""

    def __init__(self, network: Network, **settings: Any):
        self._network, self._settings = network, settings
        self._processes: list[subprocess.Popen] = []
        self._inboxes: list[queue.Queue[Message | None]] = [queue.Queue() for _ in range(network.hosts)]
        self._errors = tempfile.TemporaryDirectory()

    def __enter__(self) -> Processes:
        try:
            for rank in range(self._network.hosts):
                self._start(rank)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all of them."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._errors.cleanup()

    def _start(self, rank: int) -> None:
        addresses = [self._network.address(host) for host in range(self._network.hosts)]
        settings = Settings(rank, self._network.hosts, addresses, _PORT, **self._settings)
        worker = [sys.executable, "-m", "experiments.network.worker", json.dumps(asdict(settings))]
        with self._error_file(rank).open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                self._network.command(rank, worker),
                cwd=ROOT,
                env=os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for this program, which then ends them
            )
        self._processes.append(process)
        threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def _listen(self, rank: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self._inboxes[rank].put(json.loads(line))
        self._inboxes[rank].put(None)

    def measure(
        self, shape: Callable[[float], None], after_round: Callable[[], object]
    ) -> tuple[list[Message], Message]:
        """For each rate {"link": [a message per host], "rounds": [[a message per host]]}, and the last message."""
        measured = []
        for rate in self._settings["rates"]:
            self._from_all("ready")
            shape(rate)
            for process in self._processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            link, rounds = self._from_all("stream"), []
            for _ in range(self._settings["rounds"]):
                rounds.append([message["round"] for message in self._from_all("round")])
                after_round()
            measured.append({"link": link, "rounds": rounds})
        return measured, self._from_all("done")[0]["done"]

    def _from_all(self, kind: str) -> list[Message]:
        """The next message of each host, in their order; all of the one kind."""
        return [self._from(rank, kind) for rank in range(len(self._processes))]

    def _from(self, rank: int, kind: str) -> Message:
        try:
            message = self._inboxes[rank].get(timeout=2 * TIMEOUT.total_seconds())
        except queue.Empty:
            raise UserError(f"run: no word from host {rank} for minutes; run it on a machine with less load.") from None
        if message is None:
            raise UserError(f"run: the process on host {rank} failed: {self._error(rank)}")
        if kind not in message:
            raise RuntimeError(f"host {rank} sent {list(message)}, not {kind}")
        return message

    def _error_file(self, rank: int) -> Path:
        return Path(self._errors.name, str(rank))

    def _error(self, rank: int) -> str:
        self._processes[rank].wait()
        text = self._error_file(rank).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        named = [line for line in lines if "Error: " in line]
        return (named or lines or [f"exit status {self._processes[rank].returncode}"])[-1]
