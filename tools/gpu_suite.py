# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command.

    python tools/gpu_suite.py --out out/gpu                       # at most 565 s
    python tools/gpu_suite.py --out out/gpu --parts sanitizers    # at most 565 s, of what the first one has built

Needs Python with torch (a CUDA build) and ninja, and nvcc; no network. Builds in place. What else a part needs (pytest,
hypothesis, ncu, compute-sanitizer) may be missing, or be refused the GPU: the part is then left out, and the table says
why. A failed build, or kernels that make other bits than the CPU, end the suite.

Writes gpu-suite.log, gpu-suite.json and gpu-suite.md into --out as results come, so that an interrupted suite leaves
them, besides what the benchmarks write there. Each part has a time limit of its own. Exit status: 0 if nothing failed,
1 if a part failed or found no time left, 2 if there is nothing to run on.
"""

import argparse
import ast
import datetime
import functools
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
from typing import NamedTuple

from output import say
from refusals import refusal

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 560  # seconds; a part that does not end with them has 5 more
TAIL = 60  # lines of a part's output that the report keeps: enough for a benchmark's tables
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The tests that put something on a GPU, by their names: "cuda" is also the device in the parameters of most of them.
GPU_TESTS = "cuda or gpu or nccl or twins_stay_equal or semi_structured or another_device"
# Those that compare bits over backends come first: what is wrong need not be measured.
BITS = (
    "tests/rule/test_philox.py", "tests/cuda/test_shortcuts.py", "tests/rule/test_backends_agree.py",
    "tests/layers/test_calibrate_grad.py", "tests/pruning/test_hard_threshold.py",
    "tests/distributed/test_exchange_kernels.py",
)  # fmt: skip
# What GPU_TESTS would find beside them: emulations, and programs that only refuse a device.
CPU_ONLY = (
    "cuda/test_emulation", "cuda/ptx", "cuda/test_sass", "cuda/test_gpu_tools", "rule/test_as_on_cuda", "cpu",
    "experiments", "integration",
)  # fmt: skip
TEST_PROCESSES = 12  # of which each holds a context of about 0.5 GB on the GPU
# Not the reference, which takes seconds for a step of the larger lists, nor torch.compile, which takes minutes.
PEERS = "sgd_fused,sgd_foreach,csgd,csgd_5,csgd_dense,csgd_off"
ADAMW_PEERS = "adamw_fused,adamw_foreach,adamw_25,adamw_5,adamw_dense,adamw_off"


class Command(NamedTuple):
    """One line of the table."""

    name: str
    words: list[str]
    limit: int  # seconds
    missing: str = ""  # why it cannot be run, if it cannot
    ends_suite: bool = False  # where it fails


def _pytest(name, limit, *arguments):
    absent = [package for package in ("pytest", "hypothesis") if importlib.util.find_spec(package) is None]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "--durations=5"]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(min(TEST_PROCESSES, os.cpu_count())), "--dist", "loadgroup"]
    missing = f"{absent[0]} is not installed" if absent else ""
    return Command(name, [*words, *(f"--ignore={path}" for path in wanting()), *arguments], limit, missing)


def build(args):
    yield Command("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, ends_suite=True)


def kernels(args):
    yield Command("kernels", [sys.executable, "tools/call_kernels.py", "--compare"], 40, ends_suite=True)


def bits(args):
    wanted = [path for path in BITS if path not in wanting()]
    yield _pytest("bits", 90, *wanted)


def benchmarks(args):
    for dtype in ("float32", "bfloat16"):
        words = [sys.executable, "benchmarks/bench_step.py", "--device", "cuda", "--dtype", dtype, "--peers", PEERS]
        yield Command(f"benchmark {dtype}", [*words, "--out", str(args.out)], 40)
    for dtype in ("float32", "bfloat16"):
        words = [
            sys.executable,
            "benchmarks/bench_step.py",
            "--optimizer",
            "adamw",
            "--device",
            "cuda",
            "--dtype",
            dtype,
        ]
        words += ["--lists", "flat,resnet50", "--repeat", "9", "--peers", ADAMW_PEERS, "--out", str(args.out)]
        yield Command(f"benchmark AdamW {dtype}", words, 40)


def moved_bytes(args):
    missing = "" if shutil.which("ncu") else "ncu is not on the PATH"
    yield Command("bytes moved", [sys.executable, "tools/count_bytes.py"], 40, missing)


def tests(args):
    skipped = [f"--ignore-glob=tests/{name}*" for name in CPU_ONLY] + [f"--ignore={path}" for path in BITS]
    yield _pytest("tests", 80, "-k", GPU_TESTS, *skipped)


def sanitizers(args):
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS:
        words = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
        missing = "" if sanitizer else "compute-sanitizer is not on the PATH"
        yield Command(f"sanitizer {tool}", [*words, sys.executable, "tools/call_kernels.py"], TOTAL // 4, missing)


# In this order: what is wanted most first, in case the time runs out.
PARTS = {
    "build": build, "kernels": kernels, "bits": bits, "benchmarks": benchmarks, "bytes": moved_bytes, "tests": tests,
    "sanitizers": sanitizers,
}  # fmt: skip
DEFAULT = [name for name in PARTS if name != "sanitizers"]


@functools.cache
def wanting():
    """{test file: a package that it imports and that is not installed}"""
    own = {path.stem for path in ROOT.iterdir()}
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.relative_to(ROOT / "tests").as_posix().startswith(CPU_ONLY):
            continue
        names = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
        for name in {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names:
            if importlib.util.find_spec(name) is None:
                found[str(path.relative_to(ROOT))] = name
    return found


def machine(torch):
    """What the figures belong to."""
    sys.path.insert(0, str(ROOT))
    from tools.machine import driver, without_out

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", "tools/gpu_suite.py", *without_out(sys.argv[1:])]),
    }


class Suite:
    """Runs commands one after another, and keeps the report up to date in a folder."""

    def __init__(self, info, out, end):
        """``end``: when no part may run any more, by time.monotonic()."""
        self._info, self._out, self._end = info, out, end
        self._ended_by = None
        self.results = []
        out.mkdir(parents=True, exist_ok=True)
        self._log = open(out / "gpu-suite.log", "a", encoding="utf-8")  # noqa: SIM115 - as long as the suite

    def run(self, command):
        """Adds what became of a command to the results."""
        result = {"part": command.name, "result": "", "seconds": 0.0, "output": ""}
        self.results.append(result)
        limit = min(command.limit, int(self._end - time.monotonic()))
        if command.missing:
            result["result"] = f"left out: {command.missing}"
        elif self._ended_by is not None:
            result["result"] = f"not begun, since {self._ended_by} failed"
        elif limit < 1:
            result["result"] = "no time left"
        else:
            result["result"] = "begun"  # what the report of a killed suite says
            self._write()
            result.update(self._run(command, limit))
            if command.ends_suite and result["result"] != "passed":
                self._ended_by = command.name
        self._say(f"== {command.name}: {result['result']}")
        self._write()

    def failed(self):
        """Whether a command failed, or was not run for want of time."""
        return any(not result["result"].startswith(("passed", "left out")) for result in self.results)

    def _run(self, command, limit):
        self._say(f"== {command.name}, at most {limit} s: {shlex.join(command.words)}")
        start = time.perf_counter()
        lines = []
        environment = {**os.environ, "CSGD_CUDA_BUILD": "cuda", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        process = subprocess.Popen(
            ["timeout", "--kill-after", "5", str(limit), *command.words], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )  # fmt: skip
        for line in process.stdout:
            self._say(line.rstrip("\n"))
            lines.append(line.rstrip())
        status = process.wait()
        refused = refusal("\n".join(lines)) if status else None
        if refused:
            result = f"left out: {refused}"
        elif status in (124, 137):
            result = f"not finished after {limit} s"
        else:
            result = f"failed, exit status {status}" if status else "passed"
        return {"result": result, "seconds": time.perf_counter() - start, "output": "\n".join(lines[-TAIL:])}

    def _say(self, line):
        say(line)
        print(line, file=self._log, flush=True)

    def table(self):
        lines = ["| part | result | seconds |", "| --- | --- | --- |"]
        return [*lines, *(f"| {r['part']} | {r['result']} | {r['seconds']:.0f} |" for r in self.results)]

    def _write(self):
        lines = ["# GPU suite", "", *(f"- {key}: {value}" for key, value in self._info.items()), "", *self.table()]
        for result in self.results:
            if result["output"]:
                lines += ["", f"## {result['part']}", "", "```", result["output"], "```"]
        (self._out / "gpu-suite.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        report = json.dumps({**self._info, "parts": self.results}, indent=1)
        (self._out / "gpu-suite.json").write_text(report + "\n", encoding="utf-8")


def parse_parts(text):
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part of the suite; the parts are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="for the results (default: out/gpu)")
    parser.add_argument(
        "--parts", type=parse_parts, default=DEFAULT, metavar="A,B",
        help=f"of {', '.join(PARTS)} (default: all but the last)",
    )  # fmt: skip
    parser.add_argument("--total", type=int, default=TOTAL, help="seconds for all parts (default: %(default)s)")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.total
    try:
        import torch
    except ImportError as error:
        print(f"gpu-suite: cannot import torch ({error}); use a Python that has torch with CUDA", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-suite: torch {torch.__version__} sees no CUDA GPU; nothing to run on", file=sys.stderr)
        return 2
    args.out = args.out.resolve()
    suite = Suite(machine(torch), args.out, end)
    for path, package in wanting().items() if "bits" in args.parts or "tests" in args.parts else ():
        say(f"left out: {path}, since {package} is not installed")
    for name in args.parts:
        for command in PARTS[name](args):
            suite.run(command)
    say("\n".join(suite.table()))
    return int(suite.failed())


if __name__ == "__main__":
    sys.exit(main())
