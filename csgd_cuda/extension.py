# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: whether it was built and loads, which calls take its kernels, and why others do not."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_NAME = "csgd_cuda._C"
_warned_of: set[str] = set()  # reasons for the reference, in this process


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension; or None, and why it is not there or cannot be used."""
    try:
        module = importlib.import_module(_NAME)
        misfit = _why_not_for_this_torch(module.build_info())
    except Exception as error:  # of a damaged or an older file: of any kind
        others = ", ".join(_built_for_another_python())
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        return None, f"{reason}; {others} is for another Python" if others else reason
    return (module, None) if misfit is None else (None, misfit)


def _why_not_for_this_torch(info: dict[str, Any]) -> str | None:
    """torch's C++ interface is that of one release, and a CUDA runtime that of one major version.

    What is left out is the local part of a version ("+cpu"), and the date of a nightly build.
    """
    here = torch.__version__
    if _release(info["torch"]) != _release(here):
        return f"it was built for torch {info['torch']}, and this is torch {here}"
    built, cuda = info.get("cuda"), torch.version.cuda
    if built is not None and (cuda is None or built.split(".")[0] != cuda.split(".")[0]):
        return f"it was built for CUDA {built}, and this torch is for {'the CPU' if cuda is None else f'CUDA {cuda}'}"
    return None


def _release(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:3]


def _built_for_another_python() -> list[str]:
    """Files of the extension that the import of this Python does not find by their names."""
    here = importlib.machinery.EXTENSION_SUFFIXES
    files = [path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd")]
    return sorted(name for name in files if name.removeprefix("_C") not in here)


def _is_there() -> bool:
    """Whether there is a file of the extension, of whatever use."""
    if sys.modules.get(_NAME) is not None:
        return True
    return importlib.util.find_spec(_NAME) is not None or bool(_built_for_another_python())


def stacklevel_of_user() -> int:
    """For a warning by the caller: how far up the first line is that is neither in this package nor in torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        module = frame.f_globals.get("__name__", "").split(".")
        if module[0] not in (__package__, "torch", "importlib"):
            break
        # Where a module is imported there are frames of the import, which warnings.warn does not count.
        level += module[:2] not in (["importlib", "_bootstrap"], ["importlib", "_bootstrap_external"])
        frame = frame.f_back
    return level


def _warn_of_reference(sentence: str, reason: str) -> None:
    """Once per process: every step of every optimizer comes here."""
    if reason in _warned_of:
        return
    _warned_of.add(reason)
    warnings.warn(
        f"{sentence}; csgd_cuda.show_config() shows what is built. This is said once per process.",
        stacklevel=stacklevel_of_user(),
    )


_C: ModuleType | None
load_error: str | None
_C, load_error = _load()
_with_cuda = _C is not None and _C.build_info().get("cuda") is not None  # once: torch.compile cannot trace the call
_broken = _C is None and _is_there()
if _broken:
    _warn_of_reference(
        f"The compiled extension of csgd_cuda is there, but cannot be used: {load_error}. The slow pure-PyTorch "
        "reference steps all parameters, on any device, with the same results. Build csgd_cuda for this torch in its "
        "source folder (rm -rf build && pip install --no-build-isolation --no-deps --force-reinstall .), with "
        "CSGD_CUDA_BUILD=none if the reference is what you want",
        reason=f"the extension is there, but cannot be used ({load_error})",
    )


def build_info() -> dict[str, Any] | None:
    """What the extension was built with (torch, cuda, cuda_architectures, compiler, cpu_isa), or None."""
    return None if _C is None else _C.build_info()


def why_no_kernel(device: torch.device) -> str | None:
    """Why there is no kernel for tensors on this device; None where there is one."""
    if _C is None:
        what = "is there, but cannot be used" if _broken else "is not built"
        return f"the extension {what} ({load_error})"
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
        _warn_of_reference(
            f"csgd_cuda steps parameters on a GPU with its slow pure-PyTorch reference, since {reason}. Reinstall "
            "csgd_cuda with CSGD_CUDA_BUILD=cuda, which says what is missing, or pass fused=False if the reference is "
            "what you want",
            reason,
        )
    return False


def backend_name(device: torch.device, fused: bool | None) -> str:
    """ "cpu kernel", "cuda kernel" or "reference": what ``takes_kernel`` decides, for people."""
    return f"{device.type} kernel" if takes_kernel(device, fused) else "reference"


def show_config() -> str:
    """Prints what was built, this machine, and which backend a step takes on which device, or why not a kernel.

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
