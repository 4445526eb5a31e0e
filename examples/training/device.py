# SPDX-License-Identifier: Apache-2.0
"""The device that a command line names."""

import torch

from .errors import UserError


def choose(text: str) -> torch.device:
    """The device of ``--device text``: cpu, cuda or cuda:N; UserError where it is none of these or not there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {text}: not a device of this program; give cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "sees no CUDA GPU" if torch.version.cuda else "is built without CUDA"
            raise UserError(f"--device {text}: this PyTorch ({torch.__version__}) {why}; use --device cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {text}: there are {torch.cuda.device_count()} GPUs here; give a lower number.")
    return device
