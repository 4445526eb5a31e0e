# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: whether it was built and loads, which calls take its kernels, and why others do not."""

from __future__ import annotations

import importlib
import inspect
import warnings
from types import ModuleType
from typing import Any

import torch

_C: ModuleType | None
load_error: str | None
try:
    _C = importlib.import_module("csgd_cuda._C")
except ImportError as error:
    _C, _with_cuda = None, False
    load_error = str(error)
else:
    load_error = None
    _with_cuda = _C.build_info()["cuda"] is not None  # once: torch.compile cannot trace the call

_warned_of: set[str] = set()  # reasons for the reference, in this process


def build_info() -> dict[str, Any] | None:
    """What the extension was built with (torch, cuda, cuda_architectures, compiler, cpu_isa), or None."""
    return None if _C is None else _C.build_info()


def why_no_kernel(device: torch.device) -> str | None:
    """Why there is no kernel for tensors on this device; None where there is one."""
    if _C is None:
        return f"the extension is not built or does not load ({load_error})"
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for device type {device.type!r}, only for cpu and cuda"
    if device.type == "cuda" and not _with_cuda:
        return "the extension was built without CUDA"
    return None


def takes_kernel(device: torch.device, fused: bool | None) -> bool:
    """Whether a call for tensors on one device takes the kernel; else it takes the pure-PyTorch reference.

    Both support the same dtypes; their checks name any other. Warns, once per process, where tensors on a GPU fall
    back to the reference; not from within torch.compile.

    Args:
        fused: None takes the kernel where there is one; True demands it; False takes the reference.

    Raises:
        RuntimeError: fused is True and there is no kernel; the message says why.
    """
    if fused is not None and not fused:
        return False
    reason = why_no_kernel(device)
    if reason is None:
        return True
    if fused:
        raise RuntimeError(
            f"fused=True, but {reason}; fused=None falls back to the reference (see csgd_cuda.show_config())"
        )
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_of_reference_on_cuda(reason)
    return False


def _warn_of_reference_on_cuda(reason: str) -> None:
    """Once per process: every step of every optimizer comes here."""
    if reason in _warned_of:
        return
    _warned_of.add(reason)
    warnings.warn(
        f"csgd_cuda steps parameters on a GPU with its slow pure-PyTorch reference, since {reason}. Reinstall "
        "csgd_cuda with CSGD_CUDA_BUILD=cuda, which says what is missing, or pass fused=False if the reference is "
        "what you want; csgd_cuda.show_config() shows what is built. This is said once per process.",
        stacklevel=_stacklevel_of_user(),
    )


def _stacklevel_of_user() -> int:
    """For a warning by the caller: how far up the first line is that is neither in this package nor in torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "torch"):
        frame, level = frame.f_back, level + 1
    return level


def backend_name(device: torch.device, fused: bool | None) -> str:
    """ "cpu kernel", "cuda kernel" or "reference": what ``takes_kernel`` decides, for people."""
    return f"{device.type} kernel" if takes_kernel(device, fused) else "reference"


def show_config() -> str:
    """Prints what was built, this machine, and which backend CSGD takes on which device, or why not a kernel.

    Returns:
        The same text.
    """
    info = build_info()
    lines = [f"csgd_cuda with torch {torch.__version__}"]
    if info is None:
        lines.append(f"extension: not available: {load_error}")
    else:
        lines.append(
            f"extension: built with torch {info['torch']}, {info['compiler']}, "
            + (f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "without CUDA")
        )
        lines.append(f"instruction set used on this CPU: {info['cpu_isa']}, {torch.get_num_threads()} threads")
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append("cuda: no GPU is visible to torch")
            continue
        reason = why_no_kernel(torch.device(device))
        lines.append(f"{device}: {'kernel' if reason is None else f'reference, since {reason}'}")
    text = "\n".join(lines)
    print(text)
    return text
