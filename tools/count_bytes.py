# SPDX-License-Identifier: Apache-2.0
"""Bytes that a step moves through GPU memory per parameter, as Nsight Compute counts them, against the floor.

    python tools/count_bytes.py        # needs a GPU and ncu; prints a Markdown table, or says why there is none

The floor with momentum and without weight decay, for elements of b bytes: read gradient and momentum, write momentum,
and read and write the parameter in 32-byte sectors where something moved: b * (3 + 2 * touched). What a cache still
holds when the step ends is not counted as written: with the 50 MB of an H100 up to 0.2 bytes per parameter.
"""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

from output import say
from refusals import refusal

NUMEL = 2**28
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
CASES = [(dtype, density) for dtype in ("float32", "bfloat16") for density in (1.0, 0.05, 0.01)]


def run_steps():
    """For each case one step that is profiled; prints touched shares."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from csgd_cuda import CSGD

    for name, density in CASES:
        param = torch.ones(NUMEL, dtype=getattr(torch, name), device="cuda")
        param.grad = torch.full_like(param, 0.5)
        # Without decay or dampening and with a momentum of 2^-10, d stays near the gradient: density = d / T.
        bound = 0.5 / density if density < 1 else 0.0
        optimizer = CSGD([param], lr=0.5, momentum=2.0**-10, calibration=1.0, lipschitz=bound)
        optimizer.step()  # makes the momentum, which the next one reads
        before = param.clone()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        sector = 32 // param.element_size()
        touched = (param != before).view(-1, sector).any(dim=1).double().mean().item()
        print(f"case,{name},{density},{param.element_size()},{touched}", flush=True)


def counted(ncu):
    """Runs this file under ncu: (the lines of run_steps, bytes read and written by each step's kernel)."""
    command = [ncu, "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:step_kernel"]
    command += ["--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    done = subprocess.run([*command, sys.executable, __file__, "--steps"], capture_output=True, text=True, check=False)
    if refused := refusal(done.stdout + done.stderr):
        sys.exit(f"not measured, since ncu may not read the GPU's counters here: {refused}")
    cases, kernels = parse(done.stdout)
    if done.returncode != 0 or not cases or len(cases) != len(kernels):
        counts = f"{len(cases)} steps, {len(kernels)} kernels counted, exit status {done.returncode}"
        sys.exit(f"count_bytes: ncu failed: {counts}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return cases, kernels


def parse(output):
    """(the cases of run_steps, {metric: bytes} of each kernel) from the output of ncu --csv and the program."""
    lines = output.splitlines()
    cases = [line.split(",")[1:] for line in lines if line.startswith("case,")]
    kernels = {}
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"')))):
        if row["Metric Unit"] != "byte":
            raise ValueError(f"{row['Metric Name']} is in {row['Metric Unit']}, not in bytes")
        kernels.setdefault(row["ID"], {})[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return cases, list(kernels.values())


def main():
    if "--steps" in sys.argv:
        return run_steps()
    ncu = shutil.which("ncu")
    if ncu is None:
        sys.exit("count_bytes: ncu (Nsight Compute) is not on the PATH")
    cases, kernels = counted(ncu)
    say("| dtype | density | sectors touched | read, B/param | written, B/param | both | floor |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, density, size, touched), sums in zip(cases, kernels, strict=True):
        read, written = (sums[metric] / NUMEL for metric in METRICS)
        floor = int(size) * (3 + 2 * float(touched))
        say(
            f"| {name} | {density} | {float(touched):.1%} | {read:.2f} | {written:.2f} | {read + written:.2f} "
            f"| {floor:.2f} |"
        )


if __name__ == "__main__":
    main()
