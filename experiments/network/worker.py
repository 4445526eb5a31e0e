# SPDX-License-Identifier: Apache-2.0
"""The training process of one host: python -m experiments.network.worker SETTINGS, started by hosts.py.

Writes a JSON object per line: {"ready": true} when it waits for a line on stdin (the links have been shaped
meanwhile), then {"stream": ..., "latency_s": ...}, one {"round": ...} per round; after the last rate {"done": ...}.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda.distributed import CalibratedHookState

from . import cnn, stream
from .exchanges import ALONE, PLAIN, POWERSGD_START, Exchange
from .namespaces import DEVICE

TIMEOUT = timedelta(seconds=120)
_WARM_UP = POWERSGD_START + 2
_STREAM_SECONDS = 1.0
_PINGS = 20  # all-reduces of one number
_WARM_BYTES = 2**20  # sent at a new rate before anything is timed, for TCP to find that rate


@dataclass(frozen=True)
class Settings:
    """One host of ``hosts``. rates: in Mbit/s, only their number matters here."""

    rank: int
    hosts: int
    addresses: list[str]
    port: int
    exchanges: list[str]
    rates: list[float]
    rounds: int
    batch_size: int
    hidden: int


class Replica:
    """A model with its own exchange, optimizer and data."""

    def __init__(self, exchange: Exchange, settings: Settings):
        # The same weights everywhere: nothing needs to be sent before the first step.
        self.model = DistributedDataParallel(cnn.build(settings.hidden), init_sync=False)
        self.state: CalibratedHookState | None = exchange.register(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(settings.rank)
        self._images = torch.randn(settings.batch_size, 1, cnn.SIDE, cnn.SIDE, generator=generator)
        self._labels = torch.randint(cnn.CLASSES, (settings.batch_size,), generator=generator)

    def step(self, exchanged: bool = True) -> None:
        """Forward, backward with or without the exchange, optimizer."""
        with nullcontext() if exchanged else self.model.no_sync():
            F.cross_entropy(self.model(self._images), self._labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def payload(self) -> int | None:
        """Bytes so far, as counted by the state; None where there is none."""
        return None if self.state is None else self.state.bytes_sent


def sent_bytes() -> int:
    """By this host so far, in whole frames: what the queue of its link counts.

    The counter of the device itself takes a packet that the kernel hands over in one piece for one frame.
    """
    command = ["tc", "-json", "-statistics", "qdisc", "show", "dev", DEVICE]
    queues = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return sum(queue.get("bytes", 0) for queue in queues)


def main(settings: Settings) -> None:
    """All rates, one after the other, on the same processes and connections."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{settings.addresses[0]}:{settings.port}",
        rank=settings.rank,
        world_size=settings.hosts,
        timeout=TIMEOUT,
    )
    replicas = {name: Replica(Exchange.of(name), settings) for name in settings.exchanges}
    for replica in replicas.values():
        for _ in range(_WARM_UP):
            replica.step()
    order = random.Random(0)  # the same on all hosts
    for _ in settings.rates:
        _say({"ready": True})
        if sys.stdin.readline() != "go\n":
            return  # the program that started this is no more
        _say(_link_figures(settings))
        for _ in range(settings.rounds):
            names = [*replicas, ALONE]
            order.shuffle(names)
            _say({"round": {name: _timed(replicas.get(name), replicas[PLAIN]) for name in names}})
    _say({"done": describe(replicas[PLAIN].model)})
    dist.barrier()  # rank 0 holds the store: nobody leaves before all are done
    dist.destroy_process_group()


def describe(model: DistributedDataParallel) -> dict[str, Any]:
    """Shapes of the parameters, and which of them each bucket holds, as DistributedDataParallel grouped them."""
    # No public function tells the buckets; this one is for torch's own logs.
    buckets = model._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]
    return {
        "shapes": [list(param.shape) for param in model.parameters()],
        "buckets": [sorted(map(int, bucket.split())) for bucket in buckets.split(",")],
    }


def _timed(replica: Replica | None, plain: Replica) -> dict[str, float | int | None]:
    """One step between two barriers: seconds, bytes of frames that this host sent, payload as counted."""
    shaped = dist.get_world_size() > 1
    before = (replica.payload() if replica else None), sent_bytes() if shaped else 0
    dist.barrier()
    start = time.perf_counter()
    if replica is None:
        plain.step(exchanged=False)
    else:
        replica.step()
    seconds = time.perf_counter() - start
    dist.barrier()
    wire = sent_bytes() - before[1] if shaped else 0
    payload = None if before[0] is None else replica.payload() - before[0]
    return {"seconds": seconds, "wire": wire, "payload": payload}


def _link_figures(settings: Settings) -> dict[str, Any]:
    """Achieved rates in Mbit/s of payload, one stream and all links at a time; seconds of a small all-reduce."""
    if settings.hosts == 1:
        return {"stream": None, "latency_s": 0.0}
    rates = {"one stream": _streams(settings, senders=[0]), "all links": _streams(settings, range(settings.hosts))}
    dist.all_reduce(torch.zeros(_WARM_BYTES // 4))
    pings = []
    for _ in range(_PINGS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(torch.zeros(1))
        pings.append(time.perf_counter() - start)
    return {"stream": rates, "latency_s": statistics.median(pings)}


def _streams(settings: Settings, senders: Any) -> float | None:
    """Each of the senders to its right neighbour; what this host received, None where it was no receiver."""
    left, right = (settings.rank - 1) % settings.hosts, (settings.rank + 1) % settings.hosts
    receiver = stream.Receiver(settings.addresses[settings.rank]) if left in senders else None
    dist.barrier()
    if settings.rank in senders:
        stream.send(settings.addresses[right], _STREAM_SECONDS)
    rate = receiver.rate() * 8 / 1e6 if receiver else None
    dist.barrier()
    return rate


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
