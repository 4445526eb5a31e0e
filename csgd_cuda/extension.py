# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: loaded where it was built, and the reason where it is not to be had."""

import torch

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

try:
    from . import _C
except ImportError as error:
    _C = None
    load_error = str(error)
else:
    load_error = None

    # Both operators return nothing and the mutation is in the schema, so that is all torch.compile has to know.
    @torch.library.register_fake("csgd_cuda::csgd_")
    def _(*args, **kwargs):
        return None

    @torch.library.register_fake("csgd_cuda::check_csgd")
    def _(*args, **kwargs):
        return None


def build_info():
    """What the extension was built with (torch, cuda, cuda_architectures, compiler, cpu_isa), or None."""
    return None if _C is None else _C.build_info()


def why_no_kernel(device, dtype=torch.float32):
    """Why a tensor of this device and dtype cannot be stepped by a kernel; None where it can."""
    if _C is None:
        return f"the extension is not built or does not load ({load_error})"
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for device type {device.type!r}, only for cpu and cuda"
    if device.type == "cuda" and build_info()["cuda"] is None:
        return "the extension was built without CUDA"
    if dtype not in SUPPORTED_DTYPES:
        return f"there is no kernel for {dtype}, only for float32, float64, bfloat16 and float16"
    return None
