# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command: build, bits, benchmark, tests, bytes moved, compute-sanitizer.

Needs Python with torch (a CUDA build), ninja, pytest and hypothesis, and nvcc; no network. With pytest-xdist the tests
run in several processes; without expecttest most of tests/torch_optim is skipped. Builds in place. Writes
gpu-suite.json and gpu-suite.md into --out, besides what the benchmark writes there. Exit status: 0 if every part
passed, 1 if one failed or found no time left (the later ones run all the same), 2 if there is nothing to run on.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from output import say

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TAIL = 60  # lines of a part's output that the report keeps: enough for a benchmark's tables
# The tests that put something on a GPU, by their names: "cuda" is also the device in the parameters of most of them.
GPU_TESTS = "cuda or gpu or nccl or twins_stay_equal or semi_structured or another_device"
# A step that is wrong need not be measured: the rule's arithmetic, and steps compared with the CPU's, come first.
BITS = ("tests/rule/test_philox.py", "tests/cuda/test_shortcuts.py", "tests/rule/test_backends_agree.py")
# What GPU_TESTS would find beside them: the emulation, and programs that only refuse a device.
CPU_ONLY = ("cuda/test_emulation", "cuda/test_sass", "cuda/test_gpu_tools", "cpu", "experiments", "integration")
TEST_PROCESSES = 6  # of which each holds a context of about 0.5 GB on the GPU
# Not the reference, which takes seconds for a step of the larger lists, nor torch.compile, which takes minutes.
PEERS = "sgd_fused,sgd_foreach,csgd,csgd_5,csgd_dense,csgd_off"


def machine(torch):
    """What the figures belong to."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from step_bench.machine import driver, without_out

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", "tools/gpu_suite.py", *without_out(sys.argv[1:])]),
    }


def parts(args):
    """(name, command) of each part, in order: what is wanted most first, in case the time runs out."""
    python = sys.executable
    yield "build", [python, "setup.py", "build_ext", "--inplace"]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    # Without this, tests would pass over a kernel that is not there.
    no_kernel = "import torch, csgd_cuda.extension as e; raise SystemExit(e.why_no_kernel(torch.device('cuda')))"
    yield "kernels", [python, "-c", no_kernel]
    yield "bits", [*pytest, "-q", *BITS]
    for dtype in ("float32", "bfloat16"):
        bench = [python, "benchmarks/bench_step.py", "--device", "cuda", "--dtype", dtype, "--peers", PEERS]
        yield f"benchmark {dtype}", [*bench, "--out", str(args.out)] if not args.no_benchmark else None
    skipped = [f"--ignore-glob=tests/{name}*" for name in CPU_ONLY] + [f"--ignore={path}" for path in BITS]
    parallel = ["-n", str(min(TEST_PROCESSES, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    yield "tests", [*pytest, "-rs", "-k", GPU_TESTS, *parallel, *skipped]
    yield "bytes moved", [python, "tools/count_bytes.py"] if shutil.which("ncu") else None
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "3", python, "tools/sanitize_step.py"]
        yield f"compute-sanitizer {tool}", command if sanitizer else None


def run_part(name, command, limit):
    """Runs one part, shows its output as it comes; returns what the report says of it."""
    if command is None:
        say(f"== {name}: left out")
        return {"part": name, "result": "left out", "seconds": 0.0, "output": ""}
    if limit < 1:
        say(f"== {name}: no time left")
        return {"part": name, "result": "no time left", "seconds": 0.0, "output": ""}
    say(f"== {name}: {shlex.join(command)}")
    start = time.perf_counter()
    lines = []
    environment = {**os.environ, "CSGD_CUDA_BUILD": "cuda", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        ["timeout", "--kill-after", "5", str(limit), *command], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    for line in process.stdout:
        say(line.rstrip("\n"))
        lines.append(line.rstrip())
    status = process.wait()
    late = f"not finished after {limit} s"
    result = {0: "passed", 124: late, 137: late}.get(status, f"failed, exit status {status}")
    return {"part": name, "result": result, "seconds": time.perf_counter() - start, "output": "\n".join(lines[-TAIL:])}


def report(info, results):
    """The readable table."""
    lines = ["# GPU suite", "", *(f"- {key}: {value}" for key, value in info.items()), ""]
    lines += ["| part | result | seconds |", "| --- | --- | --- |"]
    lines += [f"| {r['part']} | {r['result']} | {r['seconds']:.0f} |" for r in results]
    for r in results:
        if r["output"]:
            lines += ["", f"## {r['part']}", "", "```", r["output"], "```"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="for the reports")
    parser.add_argument("--no-benchmark", action="store_true", help="leave out the benchmark")
    parser.add_argument("--limit", type=int, default=240, help="seconds for each part (default: %(default)s)")
    parser.add_argument("--total", type=int, default=470, help="seconds for all parts (default: %(default)s)")
    args = parser.parse_args()
    end = time.monotonic() + args.total
    try:
        import torch
    except ImportError as error:
        print(f"gpu-suite: cannot import torch ({error}); use a Python that has torch with CUDA", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-suite: torch {torch.__version__} sees no CUDA GPU; nothing to run on", file=sys.stderr)
        return 2
    info = machine(torch)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name, command in parts(args):
        results.append(run_part(name, command, min(args.limit, int(end - time.monotonic()))))
        # After each part, so that an interrupted suite leaves its results so far.
        (args.out / "gpu-suite.json").write_text(
            json.dumps({**info, "parts": results}, indent=1) + "\n", encoding="utf-8"
        )
        (args.out / "gpu-suite.md").write_text(report(info, results), encoding="utf-8")
    say("\n".join(f"{r['result']:>30}  {r['seconds']:6.0f} s  {r['part']}" for r in results))
    return int(any(r["result"] not in ("passed", "left out") for r in results))


if __name__ == "__main__":
    sys.exit(main())
