# SPDX-License-Identifier: Apache-2.0
"""Bytes that a step moves through GPU memory per parameter, as Nsight Compute counts them, against the floor.

    python tools/count_bytes.py        # needs a GPU and ncu; prints a Markdown table

The floor with momentum and without weight decay, for elements of b bytes: read gradient and momentum, write momentum,
and read and write the parameter in 32-byte sectors where something moved: b * (3 + 2 * touched).
"""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

NUMEL = 2**26  # larger than any cache
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
CASES = [(dtype, density) for dtype in ("float32", "bfloat16") for density in (1.0, 0.05, 0.01)]


def run_steps():
    """What is profiled: for each case one step of which the kernel is counted; prints touched shares."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from csgd_cuda import CSGD

    for name, density in CASES:
        param = torch.ones(NUMEL, dtype=getattr(torch, name), device="cuda")
        param.grad = torch.full_like(param, 0.5)
        # Without decay or dampening and with a momentum of 2^-10, d stays near the gradient: density = d / T.
        optimizer = CSGD([param], lr=0.5, momentum=2.0**-10, lipschitz=0.5 / density if density < 1 else 0.0)
        before = param.clone()
        optimizer.step()
        sector = 32 // param.element_size()
        touched = (param != before).view(-1, sector).any(dim=1).double().mean().item()
        print(f"case,{name},{density},{param.element_size()},{touched}", flush=True)


def counted(ncu):
    """Runs this file under ncu: (the lines of run_steps, bytes read and written by each step's kernel)."""
    command = [ncu, "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:csgd_kernel"]
    done = subprocess.run([*command, sys.executable, __file__, "--steps"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"ncu failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    lines = done.stdout.splitlines()
    cases = [line.split(",")[1:] for line in lines if line.startswith("case,")]
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"'))))
    units = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    sums = {}
    for row in table:
        value = float(row["Metric Value"].replace(",", "")) * units[row["Metric Unit"]]
        sums.setdefault(row["ID"], {})[row["Metric Name"]] = value
    return cases, list(sums.values())


def main():
    if "--steps" in sys.argv:
        return run_steps()
    ncu = shutil.which("ncu")
    if ncu is None:
        sys.exit("count_bytes: ncu (Nsight Compute) is not on the PATH")
    cases, kernels = counted(ncu)
    if len(cases) != len(kernels):
        sys.exit(f"count_bytes: {len(cases)} steps but {len(kernels)} kernels were counted")
    print("| dtype | density | sectors touched | read, B/param | written, B/param | both | floor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, density, size, touched), sums in zip(cases, kernels, strict=True):
        read, written = (sums[metric] / NUMEL for metric in METRICS)
        floor = int(size) * (3 + 2 * float(touched))
        print(
            f"| {name} | {density} | {float(touched):.1%} | {read:.2f} | {written:.2f} | {read + written:.2f} "
            f"| {floor:.2f} |"
        )


if __name__ == "__main__":
    main()
