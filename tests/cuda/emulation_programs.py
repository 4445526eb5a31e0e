# SPDX-License-Identifier: Apache-2.0
"""Programs that compare a kernel with its CPU loop, compiled and run ahead, as many at a time as there are cores."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from csgd_cuda import extension

ROOT = Path(__file__).parents[2]

# Two warps instead of eight, where the thousands of threads would take minutes under a sanitizer.
SMALL_BLOCKS = "-DCSGD_CUDA_THREADS=64"
# -O1: the reports name lines. An out-of-bounds access, undefined behaviour or a data race ends the program.
PLAIN = ("-O2",)
ADDRESS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", SMALL_BLOCKS)
THREAD = ("-O1", "-g", "-fsanitize=thread", SMALL_BLOCKS)
QUICK = ("-O1", SMALL_BLOCKS)
# A race need not show in the result, so it must end the program.
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}


class Program(NamedTuple):
    """Of a kernel; ``changes``: ((text in its source, what stands there instead), ...), for one that is broken."""

    kernel: str
    flags: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()


def compile_with(flags, *arguments):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    done = subprocess.run([*command, *flags, *arguments], capture_output=True, text=True, check=False)
    if "cannot find -l" in done.stderr or "cannot find lib" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {flags}")
    assert done.returncode == 0, done.stderr


def loops_of(flags):
    """[(source of CPU loops, its flags)]: with sanitizers the loops that run here, for others only have to be there."""
    info = extension.build_info()
    others = {"avx512", "avx2", "baseline"} - {info["cpu_isa"]} if info else set()
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        runs = source.stem.removeprefix("csgd_cpu_") not in others
        yield source, flags if runs and flags in (ADDRESS, THREAD) else QUICK


def changed_tree(program, tree):
    """A copy of the sources in which the kernel is broken."""
    for folder in ("core", "cpu", "cuda"):
        shutil.copytree(ROOT / "csrc" / folder, tree / "csrc" / folder)
    shutil.copytree(ROOT / "tests" / "cuda" / "emulation", tree / "tests" / "cuda" / "emulation")
    own = sorted(f"cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").glob(f"{program.kernel}_*.cu*"))
    if program.kernel == "csgd":
        own += ["cuda/pruned.cuh", "cuda/warp_pass.cuh"]
    shared = [f"cuda/{name}.cuh" for name in ("blocks", "block8", "vectors", "rounding")]
    shared += [f"core/{name}.h" for name in ("shard", "hard_threshold", "magnitude_key")]
    for right, wrong in program.changes:
        changed = 0
        for name in (*own, *shared):
            path = tree / "csrc" / name
            text = path.read_text()
            changed += text.count(right)
            path.write_text(text.replace(right, wrong))
        assert changed == 1, f"the kernel was changed: name another line to break than {right!r}"
    return tree


class Programs:
    """Whatever is asked for twice is compiled once."""

    def __init__(self, folder):
        self._pool, self._folder = ThreadPoolExecutor(os.cpu_count()), folder
        self._started = {}

    def start(self, program):
        """The future of how it ends, and of what it printed."""
        # What a program waits for is in the queue before it, so somebody is at work on it.
        objects = tuple(self._once(self._compile_loop, source, flags) for source, flags in loops_of(program.flags))
        return self._once(self._compile_and_run, program, objects)

    def stop(self):
        self._pool.shutdown(cancel_futures=True)

    def _once(self, call, *arguments):
        if arguments not in self._started:
            path = self._folder / str(len(self._started))
            self._started[arguments] = self._pool.submit(call, *arguments, path)
        return self._started[arguments]

    def _compile_loop(self, source, flags, path):
        path = path.with_suffix(".o")
        compile_with(flags, "-c", source, "-o", path)
        return path

    def _compile_and_run(self, program, objects, path):
        root = changed_tree(program, path) if program.changes else ROOT
        emulation = root / "tests" / "cuda" / "emulation"
        flags = [*program.flags, *(["-Wno-error"] if program.changes else []), f"-I{emulation}"]
        source = emulation / f"{program.kernel}_against_cpu_loop.cpp"
        built = path.with_suffix(".program")
        compile_with(flags, source, *(each.result() for each in objects), "-pthread", "-o", built)
        command = [built, *program.arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
