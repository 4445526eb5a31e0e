# SPDX-License-Identifier: Apache-2.0
"""What was built, what is used, and why not."""

from __future__ import annotations

import torch

from . import extension


def show_config() -> str:
    """Prints what was built, this machine, and which backend CSGD takes on which device, or why not a kernel.

    Returns:
        The same text.
    """
    info = extension.build_info()
    lines = [f"csgd_cuda with torch {torch.__version__}"]
    if info is None:
        lines.append(f"extension: not available: {extension.load_error}")
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
        reason = extension.why_no_kernel(torch.device(device))
        lines.append(f"{device}: {'kernel' if reason is None else f'reference, since {reason}'}")
    text = "\n".join(lines)
    print(text)
    return text
