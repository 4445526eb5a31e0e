# SPDX-License-Identifier: Apache-2.0
"""Whether the installed csgd_cuda steps with its kernels, and with the bits of the pure-PyTorch reference.

    python try_installed.py    # from a folder in which there are no sources; prints show_config() and what has stepped

make_wheel.py runs it in an environment into which a wheel was installed. Ends with an error where the package is not
the installed one, there is no kernel, or the bits differ.
"""

import sys
from pathlib import Path

import torch

import csgd_cuda
from csgd_cuda.extension import backend_name

OPTIMIZERS = {
    "CSGD": lambda params, fused: csgd_cuda.CSGD(params, lr=0.1, momentum=0.9, fused=fused),
    "CalibratedAdamW": lambda params, fused: csgd_cuda.CalibratedAdamW(params, lr=0.1, fused=fused),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def after_steps(make, fused, device):
    """Bytes of parameters of all dtypes after three steps."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(37, 5, generator=generator).to(device, dtype).requires_grad_() for dtype in DTYPES]
    optimizer = make(params, fused)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()
    return [param.detach().cpu().view(torch.uint8) for param in params]


def main():
    here = Path(csgd_cuda.__file__).resolve()
    if Path(sys.prefix).resolve() not in here.parents:
        sys.exit(f"csgd_cuda is {here}, which is not in this environment, {sys.prefix}")
    csgd_cuda.show_config()
    stepped = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() and csgd_cuda.extension._with_cuda else [])]:
        for name, make in OPTIMIZERS.items():
            kernel, reference = (after_steps(make, fused, device) for fused in (True, False))
            if not all(map(torch.equal, kernel, reference)):
                sys.exit(f"{name} on {device}: kernel and reference make different bits")
        stepped.append(backend_name(torch.device(device), None))
    print(f"{' and '.join(stepped)}: bits of the reference")


if __name__ == "__main__":
    main()
