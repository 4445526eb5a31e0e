# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on and with."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path

import torch

from csgd_cuda import extension


def describe(device: torch.device, command: list[str]) -> dict[str, str]:
    """What is stated above every table; values are texts. ``command`` is what was run, in words."""
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(command),
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores visible",
        "threads": str(torch.get_num_threads()),
        "load average at the start": _load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "csgd_cuda": _build(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors",
            "driver": driver(),
            "CUDA": str(torch.version.cuda),
        }
    return about


class OtherProcesses:
    """How much of the CPU other processes used since this was made; says whether the machine was quiet."""

    def __init__(self):
        self._begin = self._readings()

    def share(self) -> float | None:
        """Share of all cores, 0 to 1; None where the system does not say."""
        now = self._readings()
        if now is None or self._begin is None:
            return None
        (busy, own, clock), (busy_before, own_before, clock_before) = now, self._begin
        others = busy - busy_before - (own - own_before)
        return max(0.0, others / max(clock - clock_before, 1e-9) / os.cpu_count())

    @staticmethod
    def _readings() -> tuple[float, float, float] | None:
        """Seconds: all cores busy, this process on them, wall clock."""
        try:
            with open("/proc/stat", encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), time.process_time(), time.time()


def without_out(arguments: list[str]) -> list[str]:
    """The arguments but --out, which says nothing about the figures and may be a private path."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--out" and not argument.startswith("--out="):
            kept.append(argument)
        skip = argument == "--out"
    return kept


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load() -> str:
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _build() -> str:
    info = extension.build_info()
    if info is None:
        return f"extension not available: {extension.load_error}"
    cuda = f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "without CUDA"
    built = f"built with torch {info['torch']}, {info['compiler']}, {cuda}; CPU kernel uses {info['cpu_isa']}"
    return f"{built}; source {_revision()}"


def _revision() -> str:
    """The commit of the sources beside this file, "-dirty" where tracked files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not under git"


def driver() -> str:
    """The version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (no nvidia-smi)"
