# SPDX-License-Identifier: Apache-2.0
"""How one step is measured on the CPU and on a GPU. All times in milliseconds unless the name says otherwise."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 2**28  # written before each sample: several times the L2 cache of any GPU so far
_SLEEP_CYCLES_PER_MS = 2_000_000  # at 2 GHz; a GPU at a lower clock only sleeps longer
_LONGEST_SLEEP_MS = 20.0
_LAUNCH = re.compile(r"^cu(da)?Launch(Cooperative)?Kernel")
_SHORT_MS = 2.0  # what takes less finds its data in a cache, if nothing else has been there since
MIB = 2**20


class CpuTimer:
    """Wall-clock time around a call."""

    device = torch.device("cpu")

    def prepare(self, call: Callable[[], object]) -> float:
        """One call that is not a sample; its time."""
        return self.sample(call, math.inf)

    def sample(self, call: Callable[[], object], host_ms: float) -> float:
        """Time of one call, which takes about ``host_ms``; a short one follows an untimed one."""
        if host_ms < _SHORT_MS:  # else it would depend on who came before it, and whether that left it any cache
            call()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def host_us(self, call: Callable[[], object], steps: int = 5, rounds: int = 15) -> None:
        """On a CPU the step has no second, asynchronous part."""

    def launches(self, call: Callable[[], object]) -> None:
        """A CPU launches no kernels."""

    def extra_mib(self, call: Callable[[], object]) -> None:
        """torch counts no memory of a CPU."""


class CudaTimer:
    """Device time between two events, with a cold L2 cache and the launches enqueued ahead."""

    def __init__(self, device: torch.device):
        self.device = device
        self._scratch = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def prepare(self, call: Callable[[], object]) -> float:
        """One call that is not a sample; its wall-clock time."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) * 1e3

    def sample(self, call: Callable[[], object], host_ms: float) -> float:
        """Device time of one call, whose host part takes about ``host_ms``.

        The GPU sleeps while the host enqueues, so that a slow host does not count here: host_us has its time.
        """
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        self._scratch.fill_(1)
        sleep = min(1.5 * host_ms + 0.1, _LONGEST_SLEEP_MS)
        torch.cuda._sleep(int(sleep * _SLEEP_CYCLES_PER_MS))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def host_us(self, call: Callable[[], object], steps: int = 5, rounds: int = 15) -> float:
        """Microseconds that the host spends per call: median over rounds of a few calls without a wait in between."""
        samples = []
        for _ in range(rounds):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(steps):
                call()
            samples.append((time.perf_counter() - start) / steps * 1e6)
        torch.cuda.synchronize(self.device)
        return sorted(samples)[rounds // 2]

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernel launches of one call as the profiler saw them; None where it saw nothing (no access to CUPTI)."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize(self.device)
        # The calls of the driver and the runtime, not what ran: the timeline of the GPU has annotations as well.
        return sum(_LAUNCH.match(event.name) is not None for event in profile.events()) or None

    def extra_mib(self, call: Callable[[], object]) -> float:
        """MiB allocated during one call above the level before it, at the peak."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB


def make_timer(device: torch.device) -> CpuTimer | CudaTimer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(
    calls: dict[str, Callable[[], float]], samples: dict[str, int], rounds: int, tick: Callable[[], object]
) -> dict[str, dict[int, float]]:
    """Samples of all calls in rounds: {name: {round: ms}}.

    In each round every call is sampled once, in a new order, so that none always follows the same one and inherits
    its caches. A call with fewer samples than rounds sits out evenly.
    """
    measured = {name: {} for name in calls}
    shuffle = random.Random(0)
    for turn in range(rounds):
        names = [name for name in calls if turn * samples[name] % rounds < samples[name]]
        shuffle.shuffle(names)
        for name in names:
            measured[name][turn] = calls[name]()
        tick()
    return measured
